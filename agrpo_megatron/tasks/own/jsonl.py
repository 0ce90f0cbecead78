"""`task.name=jsonl`: problems from the user's rows, graded by rewards that settings name."""

import hashlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.schema import setting
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks.base import GENERATED, Split, Splits, Task
from agrpo_megatron.tasks.data import (
    Row,
    listed,
    messages_of,
    optional_column,
    said_text,
    without_leaks,
)
from agrpo_megatron.tasks.own.columns import Columns, find_columns, read_fields
from agrpo_megatron.tasks.own.files import NONE, FileTask
from agrpo_megatron.tasks.own.rewards import Part, build_parts, combine
from agrpo_megatron.tasks.own.service import Asked, ask
from agrpo_megatron.tasks.rewards import equivalence
from agrpo_megatron.tasks.rewards.scores import as_reward
from agrpo_megatron.types import Chat, Message, Problem, Prompt, Reward

SHARE = 10  # without `held_out`, at most one of so many rows is held out


@dataclass(frozen=True)
class JsonlOptions:
    """Options of a task of the user's own rows."""

    train: str | None = setting(
        None,
        "training rows: a .jsonl, .json, .csv or .parquet file, NAME[:CONFIG][@SPLIT] on Hugging "
        "Face, or none, for evaluation only",
    )
    eval: str | None = setting(None, "held-out rows, in the same form; null: `held_out` of train")
    held_out: float | None = setting(
        None,
        "without eval: number of training rows that are held out, or their share if below 1; "
        "always the same rows; null: 256, or a tenth if that is less",
        low=0,
    )
    columns: dict[str, Any] = setting(
        {},
        "columns by role: messages or prompt, answer, solution (shown in the supervised phase), "
        "key; {}: known names",
    )
    system: str | None = setting(None, "system message of each prompt, which is then a chat")
    template: str | None = setting(
        None, "the prompt, with columns in braces, as 'Question: {question}'; null: the column"
    )
    chat: bool | None = setting(
        None, "prompts go through the chat template; null: if there are messages, or a system"
    )
    reward: str | dict[str, Any] | list[str | dict[str, Any]] = setting(
        "exact",
        "exact, number, math, contains, FILE.py:FUNCTION, an address, or a section such as {name: "
        "regex, pattern: '#### (.+)', weight: 0.5} or {url: http://...}; or a list of them",
    )


class Jsonl(FileTask):
    """Problems from rows of the user; several rewards add up, the first says what is right."""

    name = "jsonl"
    options_type = JsonlOptions
    options: JsonlOptions

    def __init__(self, settings: TaskSettings, options: Any):
        super().__init__(settings, options)
        self.parts = build_parts(options.reward)
        self._local = [part for part in self.parts if part.score is not None]
        self._columns: Columns = {}  # of the source that is being read
        self.is_bounded = all(part.is_bounded for part in self._local)
        if len(self._local) < len(self.parts):
            self.services = _RowServices(self)
        if options.train is None and options.eval is None:
            raise ValueError("task.options.train is empty; give a file with your rows")

    def prepare(self) -> None:
        """Import math-verify if a reward uses it."""
        if any(part.uses_math for part in self._local):
            equivalence.load_comparison()

    @property
    def code_files(self) -> list[str]:
        """Return the files of the user's reward functions."""
        return [part.function.file for part in self.parts if part.function is not None]

    def source(self, split: Split) -> str | None:
        """Return the source of a split; that of no problems where only `eval` is given."""
        chosen = super().source(split)
        return NONE if chosen is None and split == "train" else chosen

    def begin(self, rows: Sequence[tuple[int, Row]], *, key: str, source: str) -> None:
        """Find the columns of a source, and note them."""
        names = list(dict.fromkeys(n for _, row in rows if isinstance(row, dict) for n in row))
        needs_prompt = self.options.template is None
        try:
            self._columns = find_columns(names, self.options.columns, needs_prompt=needs_prompt)
        except ValueError as error:
            raise ValueError(f"{key}={source}: {error}") from None
        needy = [part.label for part in self._local if part.needs_answer]
        has_answer = "answer" in self._columns or _is_chat(rows[0][1], self._columns)
        if needy and not has_answer:
            raise ValueError(
                f"{key}={source}: reward {needy[0]} needs an answer, and the columns are "
                f"{listed(names)}; name it: "
                "task.options.columns={answer: gold}"
            )
        said = ", ".join(f"{role}={column}" for role, column in self._columns.items())
        self.notes.append(f"{key}={source}: {len(rows):,} rows with the columns {said}")

    def make_problem(self, row: Row) -> Problem:
        """Read one row."""
        fields = read_fields(row, self._columns, self.options.template)
        if not any(part.needs_answer for part in self._local) and fields["answer"] is None:
            del fields["answer"]  # a row without it is a problem too
        if not isinstance(fields["prompt"], str) and self.options.chat is False:
            raise ValueError("the prompt is a chat; leave task.options.chat=false out")
        key = str(fields["key"]) if "key" in self._columns else _text(fields["prompt"])
        return Problem(key, fields, fields["solution"])

    def fill(self, train: list[Problem] | None, held_out: list[Problem] | None) -> Splits:
        """Return both splits; hold out some of the training rows if there is no other source."""
        assert train is not None
        if held_out is not None:
            splits: Splits = {"train": train, "eval": held_out}
        else:
            splits = self._split(train)
        functions = [part.function for part in self.parts if part.function is not None]
        for function, problems in itertools.product(functions, splits.values()):
            for first in problems[:1]:
                function.check(first.fields)
        return splits

    def prompt(self, problem: Problem) -> Prompt:
        """Return the text, or the chat of messages, with the system message of the options."""
        prompt, options = problem.fields["prompt"], self.options
        if isinstance(prompt, str) and not options.chat and options.system is None:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if options.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": options.system}, *messages]
        return Chat(tuple(Message(**message) for message in messages))

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Return the sum of the rewards that no service computes."""
        fields, parts = problem.fields, self.parts
        made = {p.label: as_reward(p.score(completion, fields)) for p in parts if p.score}
        return combine(parts, made)

    def known_solution(self, problem: Problem, split: Split) -> str:
        """Return the solution, or the answer if the first reward takes it as a completion."""
        is_own = problem.solution != problem.fields.get("answer")
        return problem.solution if is_own or self.parts[0].accepts_answer else ""

    def leak_key(self, problem: Problem, other: Task) -> str:
        """Return what the prompt says, whatever its key: in a column, or in messages."""
        return said_text(messages_of(self.prompt(problem)))

    def _split(self, rows: list[Problem]) -> Splits:
        """Hold out some of the rows."""
        count = self._held_out(len(rows))
        chosen = {problem.key for problem in sorted(rows, key=self._rank)[:count]}
        held_out = [problem for problem in rows if problem.key in chosen]
        train = [problem for problem in rows if problem.key not in chosen]
        kept, notes = without_leaks(train, held_out, task=self, holder=self, name=self.name)
        source = f"task.options.train={self.options.train}"
        said = f"{source}: {count:,} of {len(rows):,} rows are held out (task.options.held_out)"
        self.notes += [said, *notes]
        return {"train": kept, "eval": held_out}

    def _rank(self, problem: Problem) -> str:
        """Return a place among all rows that does not depend on their order."""
        text = f"{self.settings.seed} {_text(problem.fields['prompt'])}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _held_out(self, total: int) -> int:
        """Return how many rows to hold out."""
        asked = self.options.held_out
        if asked is None:
            asked = max(1, min(GENERATED["eval"], total // SHARE))
        count = round(asked * total) if asked < 1 else int(asked)
        if count != asked and asked >= 1 or not 0 < count < total:
            raise ValueError(
                f"task.options.held_out={asked:g} of {total} rows: both splits need some; give a "
                "whole number, or a share such as 0.1, or a source as task.options.eval"
            )
        return count


class _RowServices:
    """The reward services of a task; see `Services`."""

    def __init__(self, task: Jsonl):
        self._task = task

    def add(
        self, asked: Sequence[Asked], rewards: Sequence[Reward], *, closed: threading.Event
    ) -> list[Reward]:
        """Return the rewards with what the services add; those that failed are not asked for."""
        places = [place for place, reward in enumerate(rewards) if reward.failure is None]
        items = [_item(*asked[place]) for place in places]
        found, grader = list(rewards), self._task.settings.grader
        scored = {
            part.label: ask(part.service, items, workers=grader.workers, closed=closed)
            for part in self._task.parts
            if part.service is not None
        }
        for number, place in enumerate(places):
            several = {label: made[number] for label, made in scored.items()}
            failures = [reward.failure for reward in several.values() if reward.failure is not None]
            if failures:
                found[place] = Reward(grader.failed_score, False, failure=failures[0])
            else:
                found[place] = _sum(self._task.parts, rewards[place], several)
        return found

    def check(self) -> None:
        """Ask each service for the reward of one problem's solution."""
        problem = (*self._task.problems("eval"), *self._task.problems("train"))[0]
        item = _item(problem, problem.solution)
        for part in self._task.parts:
            if part.service is None:
                continue
            (reward,) = ask(part.service, [item], workers=1, closed=threading.Event())
            if reward.failure is not None:
                raise ValueError(
                    f"task.options.reward: the service {reward.failure}; start it before the run, "
                    "or mend its answer (docs/tasks.md has an example)"
                )


def _is_chat(row: Row, columns: Columns) -> bool:
    """Return whether the prompt of a row is a list of messages, which may end with an answer."""
    prompt = optional_column(row, columns.get("prompt", ""))
    return "messages" in columns or isinstance(prompt, list | tuple)


def _sum(parts: Sequence[Part], local: Reward, several: dict[str, Reward]) -> Reward:
    """Return what the task's own rewards and its services make together."""
    more = combine(parts, several)
    decides = more if parts[0].service is not None else local
    return Reward(local.score + more.score, decides.correct, {**local.parts, **more.parts})


def _item(problem: Problem, completion: str) -> dict[str, Any]:
    row = {name: value for name, value in problem.fields.items() if name != "prompt"}
    return {"prompt": problem.fields["prompt"], "completion": completion, "row": row}


def _text(prompt: str | list[dict[str, str]]) -> str:
    """Return the text of a prompt, without differences in white space."""
    texts = (
        [prompt] if isinstance(prompt, str) else [f"{m['role']}: {m['content']}" for m in prompt]
    )
    return " ".join(" ".join(texts).split())
