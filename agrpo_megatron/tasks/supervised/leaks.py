"""Rows of `sft.data` that ask what the task holds out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agrpo_megatron.tasks.base import NoTask, Task, task_prompts
from agrpo_megatron.tasks.data import messages_of, said_text
from agrpo_megatron.tasks.mixture import Mixture
from agrpo_megatron.text.replies import Conversation, TokenRow
from agrpo_megatron.text.tokenizer import Tokenizer
from agrpo_megatron.types import Message, Problem, Prompt

NOT_ASKED = ("prompt", "answer", "solution")  # fields that are no question within a template


@dataclass(frozen=True)
class HeldOut:
    """The held-out problems of a task, or of a part of a mixture."""

    name: str
    leaks: str  # its setting
    texts: set[str]  # what is asked, see `said_text`
    prompts: set[tuple[int, ...]]  # tokens of the whole prompts

    def has(self, talk: Conversation, rows: Sequence[TokenRow]) -> bool:
        """Return whether a trained reply answers one of the problems."""
        texts = (said_text(part) for at in talk.replies for part in _asked(talk.messages[:at]))
        tokens = (tuple(row.ids[: row.prompt].tolist()) for row in rows)
        return not self.texts.isdisjoint(texts) or not self.prompts.isdisjoint(tokens)


def held_out_problems(task: Task, tokenizer: Tokenizer) -> list[HeldOut]:
    """Return the held-out problems of each part of a task; none of `NoTask`.

    A problem is known by its prompt as RL writes it, also without a system message, and by the
    longest text of its row that the prompt contains: a template may stand around it.
    """
    if isinstance(task, NoTask):
        return []
    parts = {task.name: task}
    if isinstance(task, Mixture):
        parts = {label: part for label, (part, _) in task.parts.items()}
    return [_held_out(name, part, tokenizer) for name, part in parts.items()]


def without_asked(
    numbered: Sequence[tuple[int, Conversation]],
    rows: Sequence[Sequence[TokenRow]],
    held_out: Sequence[HeldOut],
    *,
    said: str,
) -> tuple[set[int], list[str]]:
    """Return the numbers of rows that are left out, by `task.leaks` of each part, and notes.

    Args:
        rows: token rows of each conversation.
        said: key and value of the source, for messages.

    Raises:
        ValueError: a row asks a held-out problem of a task with task.leaks=refuse.
    """
    left, notes = set[int](), list[str]()
    for part in held_out:
        pairs = zip(numbered, rows, strict=True)
        leaked = {number for (number, talk), mine in pairs if part.has(talk, mine)}
        if not leaked:
            continue
        found = (
            f"{said}: {len(leaked):,} of {len(rows):,} rows ask held-out problems of {part.name}"
        )
        if part.leaks == "refuse":
            raise ValueError(
                f"{found}, the first in row {min(leaked)}; use task.leaks=drop, or other rows"
            )
        if part.leaks == "keep":
            notes.append(f"{found}; KEPT (task.leaks=keep)")
            continue
        left |= leaked
        notes.append(f"{found}; left out")
    return left, notes


def _held_out(name: str, task: Task, tokenizer: Tokenizer) -> HeldOut:
    problems = task.problems("eval")
    prompts = task_prompts(task, problems, split="train")  # without examples
    ids = set(map(tuple, tokenizer.encode_prompts(prompts)))
    texts = {
        text
        for problem, prompt in zip(problems, prompts, strict=True)
        for text in (said_text(messages_of(prompt)), _question(problem, prompt))
    }
    return HeldOut(name, task.settings.leaks, texts - {""}, ids)


def _question(problem: Problem, prompt: Prompt) -> str:
    """Return the longest text among a problem's fields that its prompt contains."""
    whole = " ".join(message.content for message in messages_of(prompt))
    cells = [v for k, v in problem.fields.items() if isinstance(v, str) and k not in NOT_ASKED]
    longest = max((text for text in cells if text in whole), key=len, default="")
    return " ".join(longest.split())


def _asked(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Return what a reply answers: all that is before it, and the last turn alone."""
    yield messages
    yield messages[-1:]
