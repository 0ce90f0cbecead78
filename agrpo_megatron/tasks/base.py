"""The interface of a task: its problems, their prompts, and the grading of completions."""

import inspect
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks.own.service import Services
from agrpo_megatron.tasks.sandbox.worker import failed
from agrpo_megatron.types import Chat, Message, Problem, Prompt, Reward

type Split = Literal["train", "eval"]
type Splits = Mapping[Split, Sequence[Problem]]

SPLITS: tuple[Split, ...] = ("train", "eval")
MESSAGE = set(Message._fields)
SHAPE = '{"train": [Problem(...), ...], "eval": [Problem(...), ...]}'  # of what `load` returns
BETWEEN = "\n\n"  # after each example of a prompt that is text
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class NoOptions:
    """A task without options."""


class Task:
    """Base class of tasks; a custom task overrides `load`, `prompt` and `reward`.

    Problems are loaded by the first call of `problems`: a process that only grades loads none.
    """

    name: ClassVar[str]
    options_type: ClassVar[type] = NoOptions
    # Whether `reward` and `verdict` grade any text in bounded time and memory.
    is_bounded: bool = False
    services: Services | None = None  # that also score; None: `reward` says all

    def __init__(self, settings: TaskSettings, options: Any):
        self.settings, self.options = settings, options
        self.notes: list[str] = []  # remarks on the problems, for the user
        # Solved problems before each one of evaluation: prompts and solutions.
        self.examples: Sequence[tuple[Prompt, str]] = ()
        self._splits: Splits | None = None

    def prepare(self) -> None:
        """Import what grading needs; called once, before worker processes are forked."""

    def load(self) -> Splits:
        """Return `{"train": [...], "eval": [...]}`: always the same problems, no key in both."""
        raise NotImplementedError

    def prompt(self, problem: Problem) -> Prompt:
        """Return the prompt of training: text, or the messages of a chat."""
        raise NotImplementedError

    def eval_prompt(self, problem: Problem) -> Prompt:
        """Return the prompt of evaluation."""
        return self.prompt(problem)

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade a completion for training; it ends before end-of-text, without special tokens."""
        raise NotImplementedError

    def known_solution(self, problem: Problem, split: Split) -> str:
        """Return a completion that the split's grader has to accept; empty if none is known."""
        return problem.solution

    def verdict(self, problem: Problem, completion: str, raw: str) -> Reward:
        """Grade a completion for evaluation; `raw` is its whole text, special tokens included."""
        return self.reward(problem, completion)

    def summary(self, problems: Sequence[Problem], verdicts: Sequence[Reward]) -> dict[str, float]:
        """Return extra metrics of an evaluation; means of scores and parts exist without it."""
        return {}

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split.

        Raises:
            ValueError: a file cannot be read, or has fewer problems than requested.
        """
        if self._splits is None:
            self._splits = self._load_checked()
        return self._splits[split]

    def leak_key(self, problem: Problem, other: "Task") -> str:
        """Return the key that no training problem may share with a held-out problem of `other`.

        `other` is a task of the same class: this one, or another part of a mixture.
        """
        return problem.key

    def _load_checked(self) -> Splits:
        """Load the problems; check the result of a custom task's `load`."""
        if type(self).__module__.startswith("agrpo_megatron."):
            return self.load()
        name = f"task.name={self.settings.name}"
        code = getattr(inspect.unwrap(type(self).load), "__code__", None)  # it may be cached
        at = "" if code is None else f" at {code.co_filename}:{code.co_firstlineno}"
        try:
            loaded = self.load()
            if not isinstance(loaded, Mapping) or not {*SPLITS} <= {*loaded}:
                is_mapping = isinstance(loaded, Mapping)
                found = f"the keys {[*loaded]}" if is_mapping else f"a {type(loaded).__name__}"
                raise ValueError(f"{name}: its load(){at} returned {found}; return {SHAPE}")
            splits: Splits = {split: list(loaded[split]) for split in SPLITS}  # may be generators
            for problem in (*splits["train"], *splits["eval"]):
                _check_problem(problem, name)
            train, held_out = ({p.key for p in splits[split]} for split in SPLITS)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            trace = failed(error).trace
            at = f" at {trace.place}" if trace is not None and trace.place else ""
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{name}: its load() raised {reason}{at}; fix it there, and return {SHAPE}"
            ) from error
        shared = sorted(train & held_out)
        if shared and self.settings.leaks != "keep":
            raise ValueError(
                f"{name}: its load() has {len(shared)} keys in both splits, such as {shared[0]!r}; "
                "give each problem one split, or use task.leaks=keep"
            )
        return splits

    @property
    def code_files(self) -> list[str]:
        """Return the user's files of code that the rewards depend on."""
        file, _, _ = self.settings.name.partition(":")
        return [file] if file.endswith(".py") else []

    @property
    def shares(self) -> Sequence[tuple[int, float]]:
        """Return the number of training problems and the weight of each part of the task."""
        return ((len(self.problems("train")), 1.0),)

    def show_examples(self, count: int, *, among: Sequence[Problem] | None = None) -> None:
        """Show training problems with their solutions before each one of evaluation; mutates.

        They are drawn by `task.seed`, and are always the same ones.

        Args:
            among: the problems to draw from; None: all that have a known solution.

        Raises:
            ValueError: too few problems have a known solution.
        """
        problems = self.problems("train") if among is None else among
        solved = [p for p in problems if self.known_solution(p, "eval")]
        if len(solved) < count:
            raise ValueError(
                f"evaluation.few_shot={count}: task {self.settings.name} has {len(solved)} "
                f"training problems with a known solution; use at most {len(solved)}"
            )
        chosen = random.Random(self.settings.seed).sample(solved, count)
        prompts = task_prompts(self, chosen, split="eval")
        solutions = [self.known_solution(problem, "eval") for problem in chosen]
        self.examples = tuple(zip(prompts, solutions, strict=True))

    def examples_for(self, problem: Problem) -> Sequence[tuple[Prompt, str]]:
        """Return the solved problems that evaluation shows before a problem."""
        return self.examples

    def keep(self, rule: Callable[[Split, Problem], bool]) -> None:
        """Keep only the problems that satisfy `rule`; mutates the task."""
        self._splits = {
            split: [problem for problem in self.problems(split) if rule(split, problem)]
            for split in SPLITS
        }


class NoTask(Task):
    """No problems: for a model that is used without its task."""

    def load(self) -> Splits:
        """Return no problems."""
        return {"train": [], "eval": []}


def task_prompts(task: Task, problems: Sequence[Problem], *, split: Split) -> list[Prompt]:
    """Return the prompt of each problem in training, or in evaluation.

    Raises:
        ValueError: the task raised an error or returned no prompt; names task and problem.
    """
    write, prompts = task.eval_prompt if split == "eval" else task.prompt, []
    for problem in problems:
        at = f"task.mixture.{problem.task}" if problem.task else f"task.name={task.settings.name}"
        at += f", problem {problem.key!r:.80}: its prompt"
        try:
            made = write(problem)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{at}() raised {reason}; fix it there") from error
        examples = task.examples_for(problem) if split == "eval" else ()
        prompts.append(_after_examples(as_prompt(made, of=at), examples))
    return prompts


def _after_examples(prompt: Prompt, examples: Sequence[tuple[Prompt, str]]) -> Prompt:
    """Put solved problems before a prompt: as text, or as earlier turns of its chat."""
    if not examples:
        return prompt
    if isinstance(prompt, str):
        if not all(isinstance(text, str) for text, _ in examples):
            raise ValueError(
                "evaluation.few_shot: the task's prompts are both texts and chats; use one kind"
            )
        return "".join(f"{text}{solution}{BETWEEN}" for text, solution in examples) + prompt
    turns: list[Message] = [m for m in prompt.messages if m.role == "system"]
    for asked, solution in examples:
        chat = asked if isinstance(asked, Chat) else Chat((Message("user", asked),))
        turns += [m for m in chat.messages if m.role != "system"]
        turns.append(Message("assistant", chat.prefill + solution))
    turns += [m for m in prompt.messages if m.role != "system"]
    return replace(prompt, messages=tuple(turns))


def as_prompt(made: Any, *, of: str) -> Prompt:
    """Return text, a Chat, or a list of messages (dicts of role and content) as a prompt.

    Raises:
        ValueError: it is of another kind, empty, or not valid Unicode; `of` names the prompt.
    """
    prompt = made
    if isinstance(made, list) and all(isinstance(m, dict) and set(m) == MESSAGE for m in made):
        prompt = Chat(tuple(Message(**message) for message in made))
    texts: list[Any] = [prompt]
    if isinstance(prompt, Chat) and all(isinstance(each, Message) for each in prompt.messages):
        texts = [prompt.prefill, *(message.content for message in prompt.messages)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{of} is {made!r:.80}; give text, a Chat, or a list of messages such as "
            "{'role': 'user', 'content': '...'}"
        )
    text = "".join(texts)
    if not text.strip() or _SURROGATE.search(text):
        problem = "holds a lone surrogate" if text.strip() else "is empty"
        raise ValueError(f"{of} {problem}; give it valid text")
    return prompt


def _check_problem(problem: Any, name: str) -> None:
    """Refuse what a custom task's `load` returned in place of a problem."""
    is_problem = isinstance(problem, Problem) and isinstance(problem.fields, Mapping)
    if not is_problem or not all(isinstance(t, str) for t in (problem.key, problem.solution)):
        raise ValueError(
            f"{name}: its load() has {problem!r:.120}; return Problem(key, fields, solution), with "
            "text as key and solution, and a mapping as fields"
        )


GENERATED: dict[Split, int] = {"train": 20000, "eval": 256}  # default numbers of problems


def problem_count(settings: TaskSettings, split: Split) -> int:
    """Return how many problems to generate for a split."""
    asked = settings.train_problems if split == "train" else settings.eval_problems
    return GENERATED[split] if asked is None else asked


def distinct(problems: Iterable[Problem], count: int | None = None) -> list[Problem]:
    """Return the first `count` problems with different keys; all if there are fewer."""
    chosen: dict[str, Problem] = {}
    for problem in problems:
        chosen.setdefault(problem.key, problem)
        if len(chosen) == count:
            break
    return list(chosen.values())


def split_problems(problems: Sequence[Problem], settings: TaskSettings, *, fix: str) -> Splits:
    """Divide problems with distinct keys into held-out and training problems.

    The held-out problems come first: they stay the same when the number of training problems
    grows. `fix` names the options that make more problems, for the error.

    Raises:
        ValueError: fewer problems than requested.
    """
    held_out, train = problem_count(settings, "eval"), problem_count(settings, "train")
    if len(problems) < held_out + train:
        room = len(problems) - held_out
        fewer = f"use at most {room} training problems or " if room > 0 else ""
        raise ValueError(
            f"task.train_problems={train} and task.eval_problems={held_out} ask for "
            f"{held_out + train} different problems, but {settings.name} yields "
            f"{len(problems)} with these options; {fewer}{fix}"
        )
    return {"eval": problems[:held_out], "train": problems[held_out : held_out + train]}
