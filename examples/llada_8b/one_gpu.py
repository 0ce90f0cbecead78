"""A task for measurements: prompts of one length, and the same reward for any text."""

from agrpo_megatron.tasks.base import Splits, Task, problem_count, split_problems
from agrpo_megatron.types import Problem, Reward

PROMPT = 256  # characters; each is a token of the built-in tokenizer


class Anything(Task):
    """Write any text."""

    name = "anything"
    is_bounded = True

    def load(self) -> Splits:
        """Make numbered problems."""
        count = problem_count(self.settings, "train") + problem_count(self.settings, "eval")
        problems = [
            Problem(key=str(n), fields={"number": str(n)}, solution="") for n in range(count)
        ]
        return split_problems(problems, self.settings, fix="ask for fewer")

    def prompt(self, problem: Problem) -> str:
        """Return the problem's number after leading zeros."""
        return problem.fields["number"].zfill(PROMPT)

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Return 1 for any text."""
        return Reward(1.0, False)
