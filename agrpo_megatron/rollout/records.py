"""Records of completions for the run's file of samples."""

from collections.abc import Sequence

from agrpo_megatron.rollout.session import Run
from agrpo_megatron.tasks.base import Split, task_prompts
from agrpo_megatron.text.chat import shown_prompt
from agrpo_megatron.types import GradedRollouts, Problem


def sample_records(
    run: Run, problems: Sequence[Problem], rollouts: GradedRollouts, *, split: Split
) -> list[dict]:
    """Describe the first completions for samples.jsonl, `logging.samples` of them."""
    trajectory, chosen = rollouts.trajectory, problems[: run.settings.logging.samples]
    prompts = task_prompts(run.task, chosen, split=split)
    completions = trajectory.tokens[: len(chosen)].tolist()
    return [
        {
            "prompt": shown_prompt(prompt),
            "completion": run.tokenizer.decode(ids),
            "pieces": run.tokenizer.pieces(ids),
            "unmask_step": trajectory.unmask_step[row].tolist(),
            "num_steps": int(trajectory.num_steps[row]),
            "reward": rollouts.rewards[row].score,
            "correct": rollouts.rewards[row].correct,
            "solution": problems[row].solution,
        }
        for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True))
    ]
