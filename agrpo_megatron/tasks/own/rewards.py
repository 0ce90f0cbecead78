"""The rewards of `task.name=jsonl` by name, each a function of a completion and a row's fields."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from agrpo_megatron.config.own_code import is_file_name
from agrpo_megatron.config.schema import build, setting
from agrpo_megatron.tasks.own.functions import Function, find_reward
from agrpo_megatron.tasks.own.service import Service
from agrpo_megatron.tasks.rewards.equivalence import equal, equal_in_text
from agrpo_megatron.tasks.rewards.extract import Fields, boxed, last_tagged
from agrpo_megatron.types import Reward

ADDRESS = ("http://", "https://")
KEY = "task.options.reward"
MARK = "####"  # before the answer of a solution, as in GSM8K
TAKEN = ("mean", "std")  # metrics of the whole reward
_NUMBER = re.compile(r"(?:(?<![\w.)\]}])[-\u2212])?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
MOST_DIGITS = 4000  # of a number; Python reads 4300


@dataclass(frozen=True)
class Named:
    """A reward by name, for `exact`, `number` and `math`."""

    name: str = setting("exact", "exact, number, math, regex or contains")
    weight: float = setting(1.0, "factor of its score in the sum")
    label: str | None = setting(None, "its name in the metrics; null: its own")


@dataclass(frozen=True)
class Regex(Named):
    """A pattern that is searched in the completion."""

    pattern: str = setting("", "of Python's re; its first group, if any, must be the answer")


@dataclass(frozen=True)
class Contains(Named):
    """A text in the completion."""

    text: str | None = setting(None, "text to find; null: the answer")


@dataclass(frozen=True)
class Python:
    """A function of the user."""

    python: str = setting("", "FILE.py:FUNCTION")
    weight: float = setting(1.0, "factor of its score in the sum")
    label: str | None = setting(None, "its name in the metrics; null: the function's")


@dataclass(frozen=True)
class Part:
    """One of the rewards of a task."""

    label: str
    weight: float
    score: Callable[[str, Fields], Any] | None  # None: the service scores
    service: Service | None = None
    function: Function | None = None  # of the user
    needs_answer: bool = False
    is_bounded: bool = False  # grades any text in bounded time and memory
    accepts_answer: bool = False  # the answer, as a completion, is right
    uses_math: bool = False  # math-verify


KINDS: dict[str, type[Named]] = dict.fromkeys(("exact", "number", "math"), Named)
KINDS |= {"regex": Regex, "contains": Contains}


def build_parts(reward: Any) -> list[Part]:
    """Return the rewards that `task.options.reward` names: one, or a list.

    Raises:
        ValueError: an unknown name, a wrong option, or two with one label.
    """
    several = isinstance(reward, list)
    if several and not reward:
        raise ValueError(f"{KEY}=[] names no reward; give one of {', '.join(KINDS)}")
    keys = [f"{KEY}[{place}]" for place in range(len(reward))] if several else [KEY]
    parts = [
        _part(one, key=key) for key, one in zip(keys, reward if several else [reward], strict=True)
    ]
    for place, part in enumerate(parts):
        if part.label in TAKEN or any(part.label == other.label for other in parts[:place]):
            raise ValueError(
                f"{keys[place]}: the label {part.label} is taken; give it another, as label: format"
            )
    return parts


def combine(parts: Sequence[Part], rewards: Mapping[str, Reward]) -> Reward:
    """Return the weighted sum of rewards by label; the first part of the task says what is right.

    The parts of the sum are the scores without weights, with the parts of their own.
    """
    score, found = 0.0, {}
    for part in parts:
        if (one := rewards.get(part.label)) is not None:
            score += part.weight * one.score
            own = {f"{part.label}/{name}": value for name, value in one.parts.items()}
            found |= {part.label: one.score, **own}
    first = rewards.get(parts[0].label)
    return Reward(score, first is not None and first.correct, found)


def _part(reward: Any, *, key: str) -> Part:
    tree = _tree(reward, key=key)
    if "url" in tree:
        service = build(Service, tree, f"{key}.")
        if not service.url.startswith(ADDRESS):
            raise ValueError(f"{key}.url={service.url} is no address; write http://HOST:PORT/PATH")
        return Part(service.label or "service", service.weight, None, service)
    if "python" in tree:
        made = build(Python, tree, f"{key}.")
        function = find_reward(made.python, said=f"{key}.python={made.python}")
        label = made.label or made.python.partition(":")[2]
        needs = "answer" in function.needed
        return Part(label, made.weight, function, function=function, needs_answer=needs)
    name = tree.get("name")
    if not isinstance(name, str) or name not in KINDS:
        known = f"one of {', '.join(KINDS)}; or give python: FILE.py:FUNCTION, or url: http://..."
        near = difflib.get_close_matches(str(name), KINDS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use {known}"
        raise ValueError(f"{key}.name={name} is not a reward; {fix}")
    made = build(KINDS[name], tree, f"{key}.")
    is_math = name == "math"
    part = Part(made.label or name, made.weight, SCORES.get(name), uses_math=is_math)
    if isinstance(made, Regex):
        pattern = _compiled(made.pattern, key=key)
        has_group = pattern.groups > 0
        score = _grouped(pattern) if has_group else lambda text, _: bool(pattern.search(text))
        return replace(part, score=score, needs_answer=has_group)
    if isinstance(made, Contains) and made.text is not None:
        wanted = made.text
        return replace(part, score=lambda text, _: wanted in text, is_bounded=True)
    return replace(part, needs_answer=True, accepts_answer=True, is_bounded=not is_math)


def _tree(reward: Any, *, key: str) -> dict[str, Any]:
    """Return a reward as a mapping; a text is a name, a function or an address."""
    if isinstance(reward, Mapping):
        return dict(reward)
    if not isinstance(reward, str):
        raise ValueError(f"{key}={reward!r} must be a name or a section; use for example exact")
    if reward.startswith(ADDRESS):
        return {"url": reward}
    return {"python": reward} if is_file_name(reward) else {"name": reward}


def _compiled(pattern: str, *, key: str) -> re.Pattern[str]:
    if not pattern:
        raise ValueError(f"{key}.pattern is empty; give one such as '#### (-?[0-9]+)'")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{key}.pattern={pattern} is not a pattern of Python's re: {error}"
        ) from None


def _grouped(pattern: re.Pattern[str]) -> Callable[[str, Fields], bool]:
    def is_answer(text: str, row: Fields) -> bool:
        found = pattern.search(text)
        return found is not None and (found[1] or "").strip() == row["answer"].strip()

    return is_answer


def exact(text: str, row: Fields) -> bool:
    """Return whether the completion, without blanks at its ends, is the answer."""
    return text.strip() == row["answer"].strip()


def contains(text: str, row: Fields) -> bool:
    """Return whether the answer is in the completion."""
    return row["answer"].strip() in text


def number(text: str, row: Fields) -> bool:
    """Return whether the last number of the final answer has the value of the gold one."""
    gold = last_number(final_answer(row["answer"]) or row["answer"])
    return gold is not None and last_number(final_answer(text) or text) == gold


def math(text: str, row: Fields) -> bool:
    """Return whether math-verify finds the gold value in the final answer, or else in the text."""
    gold, answer = final_answer(row["answer"]) or row["answer"], final_answer(text)
    return equal_in_text(f"${gold}$", text) if answer is None else equal(gold, answer)


SCORES: dict[str, Callable[[str, Fields], bool]] = {
    "exact": exact,
    "number": number,
    "math": math,
    "contains": contains,
}


def final_answer(text: str) -> str | None:
    r"""Return what a text marks as its answer, or None.

    That is the last `<answer>` block, and in it, or in a text without one, the last box, or what
    follows the last `####`.
    """
    block = last_tagged(text)
    inner = text if block is None else block
    box = boxed(inner[max(0, inner.rfind("\\boxed{")) :])
    if box is not None:
        return box
    _, mark, after = inner.rpartition(MARK)
    return after.strip() if mark else block


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text: decimals, thousands commas, a sign before its digits."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None or len(found[0]) > MOST_DIGITS:
        return None
    written = found[0].replace("\u2212", "-")
    whole, dot, decimals = written.lstrip("-").rstrip(",").partition(".")
    if "," in whole and not _THOUSANDS.fullmatch(whole):  # a list: its last number has no sign
        return Fraction((whole.rpartition(",")[2] or "0") + dot + decimals)
    value = Fraction((whole.replace(",", "") or "0") + dot + decimals)
    return -value if written.startswith("-") else value
