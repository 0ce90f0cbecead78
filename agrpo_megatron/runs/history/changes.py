"""Which settings may change when a run resumes: freely, with a line in its log, or never."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import flatten
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.values import text
from agrpo_megatron.config.yaml_files import with_file_names
from agrpo_megatron.runs.files import append_records, read_records
from agrpo_megatron.runs.progress import Progress

CHANGES = "changes.jsonl"  # in a run directory: one line for each changed setting

# They alter no number. The digest of a run (`directory.run_digest`) leaves out exactly these.
FREE = ("run.dir", "run.threads", "run.timeout", "logging", "checkpoint", "parallel")
FREE += ("rollout", "ddp", "optimizer.distributed", "sft.optimizer.distributed")
FREE += ("task.grader.workers", "task.grader.most_failed", "resilience", "profile", "launch")
# Files, which may be moved: `check_data` compares the problems.
FREE += ("task.options.train", "task.options.eval", "task.pass_rates")
FREE += ("sft.data", "sft.eval_data")

SCHEDULE = ("learning_rate", "min_learning_rate", "decay", "warmup_iterations", "weight_decay")
SCHEDULE += ("clip_grad",)
# They alter what follows, and nothing of what was computed before.
LOGGED = tuple(f"optimizer.{name}" for name in SCHEDULE)
LOGGED += ("train.iterations", "train.flops", "train.token_budget", "train.ratio_alarm")
LOGGED += ("train.mismatch_alarm", "train.mismatch_tail_alarm")
LOGGED += ("train.stop_metric", "train.stop_target", "train.stop_patience")
LOGGED += ("algorithm.mc_samples", "algorithm.auto_share", "evaluation.interval")
# Of `agrpo evaluate` only.
LOGGED += tuple(
    f"evaluation.{name}"
    for name in ("completion_lengths", "steps", "tokens_per_step", "tasks", "split", "samples")
)
LOGGED += ("evaluation.batch_size",)
# Until reinforcement learning has a checkpoint: settings of the supervised phase, and those that
# it does not use. With `task.leaks`, `check_data` compares the rows that are trained.
OF_SFT = (
    "sft.iterations",
    "sft.epochs",
    *(f"sft.optimizer.{name}" for name in SCHEDULE),
    "task.leaks",
)
OF_RL = ("algorithm", "evaluation", "optimizer", "train")

# Of the longest fitting name counts the reason.
FROZEN = {
    "run.seed": "all noise, and the order of the problems, follows from it",
    "precision": "the curve would have two roundings in it",
    "fp8": "the curve would have two roundings in it",
    "kernels": "the curve would have two roundings in it",
    "model": "the weights and the optimizer's states are of this model",
    "tokenizer": "the model has learned these ids and this template",
    "lora": "the adapters and the optimizer's states are of these layers and ranks",
    "task": "rewards and accuracies before and after would not compare",
    "task.leaks": "the supervised phase is over",
    "sft": "the phase would be of two kinds of data; its loss before and after would not compare",
    **dict.fromkeys(
        ("sft.iterations", "sft.epochs"),
        "reinforcement learning has begun, from the end of the supervised phase",
    ),
    "sft.optimizer": "Adam's states were averaged and stored with it",
    **{f"sft.optimizer.{name}": "the supervised phase is over" for name in SCHEDULE},
    "optimizer": "Adam's states were averaged and stored with it",
    "sampling": "another sampler is another policy; rewards before and after would not compare",
    "algorithm": "the run would be of two methods",
    "evaluation": "accuracies before and after would not compare; `agrpo evaluate RUN` takes any",
    "train.async_steps": "the age of the rollouts would change within the curve",
    "train.from_rollouts": "the curve would be of two sources of rollouts",
}


@dataclass(frozen=True)
class Change:
    """A changed setting; a value that is not set is None."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {text(self.old)} -> {text(self.new)}"


def fixed(tree: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, object]:
    """Return the settings of a tree that are not below a name of `free`, by dotted name.

    Files of code have no folders: they may be moved, and `check_data` compares those of the task.
    """
    names, flat = tuple(f"{name}." for name in free), flatten(with_file_names({**tree}))
    return {k: value for k, value in flat.items() if not f"{k}.".startswith(names)}


def differences(there: Settings, here: Settings, *, phase: str) -> list[Change]:
    """Return the logged changes between a run's settings and those that it resumes with.

    Args:
        phase: of the run's latest checkpoint.

    Raises:
        ValueError: a setting that may not change differs; the message has the reason.
    """
    old, new = (fixed(asdict(settings), FREE) for settings in (there, here))
    found = [
        Change(key, old.get(key), new.get(key))
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key)
    ]
    allowed = tuple(f"{name}." for name in may_change(phase))
    for change in found:
        if not f"{change.key}.".startswith(allowed):
            raise ValueError(
                f"run.dir={here.run.dir} holds a run with {change.key}={change.old}, not "
                f"{change.new}, which may not change: {reason(change.key)}"
            )
    return found


def may_change(phase: str) -> tuple[str, ...]:
    """Return the names of settings that may change, with a log line, when a phase resumes."""
    return LOGGED + (OF_SFT + OF_RL if phase == "sft" else ())


def reason(key: str) -> str:
    """Return why a setting may not change."""
    name = max((name for name in FROZEN if f"{key}.".startswith(f"{name}.")), key=len)
    return FROZEN[name]


def write_changes(directory: Path, changes: Iterable[Change], done: Progress) -> None:
    """Append changes to the run's file; they hold after the iteration that is done."""
    where = {"phase": done.phase, "iteration": done.iteration}
    append_records(directory / CHANGES, [{**where, **asdict(change)} for change in changes])


def read_changes(directory: Path) -> list[dict[str, Any]]:
    """Return the changes of a run, oldest first, as `write_changes` has them."""
    return read_records(directory / CHANGES)
