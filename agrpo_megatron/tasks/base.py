"""What a task is: problems, how they are put to the model, and how its answers are graded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.types import Problem, Prompt, Reward

type Split = Literal["train", "eval"]
type Splits = Mapping[Split, Sequence[Problem]]


@dataclass(frozen=True)
class NoOptions:
    """A task without options."""


class Task:
    """Base of every task; a user's own overrides `load`, `prompt` and `reward`.

    Nothing is loaded before `problems` is called, so that a process which only grades never does.
    """

    name: ClassVar[str]
    options_type: ClassVar[type] = NoOptions
    # Whether `reward` and `verdict` answer any text in bounded time and memory by themselves.
    is_bounded: bool = False

    def __init__(self, settings: TaskSettings, options: Any):
        self.settings, self.options = settings, options
        self.notes: list[str] = []  # what the user should know about the problems
        self._splits: Splits | None = None

    def prepare(self) -> None:
        """Import what grading needs; called once, in the process that graders are forked from."""

    def load(self) -> Splits:
        """Return the problems of both splits: the same ones every time, no key in both."""
        raise NotImplementedError

    def prompt(self, problem: Problem) -> Prompt:
        """Return what the completion follows: text, or the messages of a chat."""
        raise NotImplementedError

    def eval_prompt(self, problem: Problem) -> Prompt:
        """Return what an evaluation's completion follows."""
        return self.prompt(problem)

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade a completion for training, cut at end-of-text and without special tokens."""
        raise NotImplementedError

    def verdict(self, problem: Problem, completion: str, raw: str) -> Reward:
        """Grade a completion for evaluation.

        Args:
            completion: as `reward` gets it.
            raw: all of it, special tokens written out.
        """
        return self.reward(problem, completion)

    def summary(self, problems: Sequence[Problem], verdicts: Sequence[Reward]) -> dict[str, float]:
        """Return metrics of an evaluation beyond the mean of every score and part."""
        return {}

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split.

        Raises:
            ValueError: a file that cannot be read, or more problems asked for than there are.
        """
        if self._splits is None:
            self._splits = self._load_checked()
        return self._splits[split]

    def leak_key(self, problem: Problem, other: "Task") -> str:
        """Return what no training problem may share with one that `other` holds out.

        Args:
            other: a task of the same class; in a mixture, another part.
        """
        return problem.key

    def _load_checked(self) -> Splits:
        """Load, and hold a task of the user's own to what `load` promises."""
        if type(self).__module__.startswith("agrpo_megatron."):
            return self.load()
        name = f"task.name={self.settings.name}"
        try:
            splits = self.load()
            train, held_out = ({p.key for p in splits[split]} for split in ("train", "eval"))
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: its load() raised {said}; mend it there") from error
        shared = sorted(train & held_out)
        if shared and self.settings.leaks != "keep":
            raise ValueError(
                f"{name}: its load() has {len(shared)} keys in both splits, such as {shared[0]!r}; "
                "give each problem one split, or use task.leaks=keep"
            )
        return splits

    @property
    def shares(self) -> Sequence[tuple[int, float]]:
        """Return how many training problems each part of the task has, and the part's weight."""
        return ((len(self.problems("train")), 1.0),)

    def keep(self, rule: Callable[[Split, Problem], bool]) -> None:
        """Drop the problems that a rule refuses; mutates the task."""
        splits: tuple[Split, ...] = ("train", "eval")
        self._splits = {
            split: [problem for problem in self.problems(split) if rule(split, problem)]
            for split in splits
        }


def task_prompts(task: Task, problems: Sequence[Problem], *, split: Split) -> list[Prompt]:
    """Return the prompt that each problem has in training, or in evaluation."""
    write = task.eval_prompt if split == "eval" else task.prompt
    return [write(problem) for problem in problems]


GENERATED: dict[Split, int] = {"train": 20000, "eval": 256}  # problems where none are asked for


def problem_count(settings: TaskSettings, split: Split) -> int:
    """Return how many generated problems a split asks for."""
    asked = settings.train_problems if split == "train" else settings.eval_problems
    return GENERATED[split] if asked is None else asked


def split_problems(problems: Sequence[Problem], settings: TaskSettings, *, fix: str) -> Splits:
    """Cut problems with distinct keys into held-out ones and training ones.

    The held-out problems come first, so that they stay the same when more training problems are
    asked for. `wider` tells the user which options make more problems.

    Raises:
        ValueError: fewer problems than asked for.
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
