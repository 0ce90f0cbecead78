"""Adapter for the generated tasks of reasoning-gym; an optional extra."""

import functools
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.base import Splits, Task, distinct, problem_count, split_problems
from agrpo_megatron.tasks.data import one_line
from agrpo_megatron.tasks.rewards.extract import boxed, last_tagged
from agrpo_megatron.types import Chat, Message, Problem, Prompt, Reward

SYSTEM = (
    "Think through the problem step by step, enclosing your reasoning in <think> tags. Then give "
    "the final answer alone in <answer> tags."
)


@dataclass(frozen=True)
class GymOptions:
    """Options of a reasoning-gym task."""

    dataset: str = setting("basic_arithmetic", "name of the generator, such as leg_counting")
    config: dict[str, Any] = setting({}, "passed to the generator by name")
    threshold: float = setting(1.0, "lowest score of a correct answer", low=0, high=1)

    def __post_init__(self) -> None:
        for name, key in (("seed", "task.seed"), ("size", "task.train_problems")):
            if name in self.config:
                raise ValueError(
                    f"task.options.config.{name}={self.config[name]!r} has no effect; use {key}"
                )


class ReasoningGym(Task):
    """Problems and scores of reasoning-gym; the score of an answer is the reward."""

    name = "reasoning_gym"
    options_type = GymOptions
    options: GymOptions

    def prepare(self) -> None:
        """Import reasoning-gym and create the scoring generator."""
        _ = self._scorer

    def load(self) -> Splits:
        """Make the problems without repeated questions, held-out ones first."""
        needed = problem_count(self.settings, "eval") + problem_count(self.settings, "train")
        made = distinct(map(_read_entry, self._generator(2 * needed)), needed)
        return split_problems(made, self.settings, fix="widen task.options.config")

    def prompt(self, problem: Problem) -> Prompt:
        """Return the question and the format of the answer."""
        return Chat((Message("system", SYSTEM), Message("user", problem.fields["question"])))

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Score the last answer block by the generator's rule."""
        answer, entry = last_tagged(completion), problem.fields["entry"]
        if answer is None:
            answer = boxed(completion)
        score = 0.0 if answer is None else float(self._scorer.score_answer(answer, entry))
        correct = score >= self.options.threshold
        return Reward(score, correct, {"answer": float(answer is not None)})

    @functools.cached_property
    def _scorer(self) -> Any:
        return self._generator(1)

    def _generator(self, size: int) -> Any:
        try:
            import reasoning_gym
        except ImportError:
            raise ValueError(
                "task.name=reasoning_gym: the package reasoning-gym is not installed; "
                "`pip install agrpo-megatron[gym]`"
            ) from None
        config = {**self.options.config, "seed": self.settings.seed, "size": size}
        try:
            return reasoning_gym.create_dataset(self.options.dataset, **config)
        except Exception as error:  # many kinds, by generator
            raise ValueError(
                f"task.options.dataset={self.options.dataset} cannot be made with "
                f"task.options.config={self.options.config} ({one_line(error)})"
            ) from None


def _read_entry(entry: dict[str, Any]) -> Problem:
    question, answer = entry["question"], entry["answer"]
    fields = {"question": question, "entry": entry}
    return Problem(question, fields, "" if answer is None else f"<answer>{answer}</answer>")
