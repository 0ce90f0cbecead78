"""A model, a task and settings small enough that a test trains in seconds, on any layout."""

import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.rollout.session import NoView, Output, Run, Session
from agrpo_megatron.runs.metrics import find_metric
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.base import Splits
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.rl import update_policy
from agrpo_megatron.types import Problem, Prompt, Reward, Rollout

# Initial weights are large, so that attention matters and no distribution is near uniform. The
# vocabulary is odd and wider than the tokenizer's: a tensor-parallel split has to pad it.
TINY = [
    "run.threads=1",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.max_sequence_length=64",
    "model.init_std=0.3",
    "model.vocab_size=83",
    "task.name=countdown",
    "task.options.numbers=2",
    "task.train_problems=24",
    "task.eval_problems=6",
    "sampling.completion_length=8",
    "sampling.block_length=4",
    "sampling.denoising_steps=4",
    "sft.batch_size=6",
    "algorithm.prompts_per_iteration=3",
    "algorithm.group_size=4",
    "algorithm.mc_samples=2",
    "optimizer.learning_rate=1e-2",
    "train.token_budget=90",
    "logging.wandb=disabled",
    "logging.live=false",
]

NOWHERE = Path(tempfile.gettempdir(), "agrpo-unused")  # only what is not finite is written

# What the metrics begin with that a clock measured.
TIMED = (
    "timing/",
    "section/",
    "straggler/",
    "perf/tokens_per_second",
    "perf/unmasked_per_second",
    "perf/mfu",
    "totals/seconds",
)
TIMED += ("rollout/packing_efficiency",)  # of the work of one attempt
TIMED += ("memory/",)  # or of which the process had more, or less, than another


def tiny(*overrides: str) -> Settings:
    """Return settings of a run that takes a second; later overrides win."""
    return load(Settings, None, [*TINY, *overrides])


class HashedReward(Task):
    """A task whose reward is a hash of the text: half of the groups differ under any weights."""

    name = "hashed"
    is_bounded = True
    levels = 5  # scores there are

    def __init__(self, task: Task, constant: float | None = None):
        super().__init__(task.settings, task.options)
        self.task, self.constant = task, constant  # every reward is the constant, where one is set

    def load(self) -> Splits:
        return {"train": self.task.problems("train"), "eval": self.task.problems("eval")}

    def prompt(self, problem: Problem) -> Prompt:
        return self.task.prompt(problem)

    def reward(self, problem: Problem, completion: str) -> Reward:
        if self.constant is not None:
            return Reward(self.constant, False)
        hashed = zlib.crc32(f"{problem.key} {completion}".encode())
        score = hashed % self.levels / (self.levels - 1)
        return Reward(score, score == 1.0, {"hash": score})


def silent_view() -> NoView:
    """Return a view that shows nothing; a test may replace its methods."""
    return NoView()


def resolved_run(run_dir: str | Path, *overrides: str, world_size: int = 1) -> Resolved:
    """Return what `training.run.train` takes, graded by hash."""
    resolved = resolve(tiny(f"run.dir={run_dir}", *overrides), world_size=world_size)
    return replace(resolved, task=HashedReward(resolved.task))


class Recorder:
    """Stand in for the run's log: keep the metrics instead of writing them."""

    def __init__(self) -> None:
        self.records: list[dict] = []

    def metrics(self, record: dict) -> None:
        self.records.append(record)

    def last(self, phase: str) -> dict:
        return next((r for r in reversed(self.records) if r["phase"] == phase), {})

    def samples(self, records: list[dict], **common: object) -> None:
        pass


def open_session(
    *overrides: str,
    world_size: int = 1,
    phase: str = "rl",
    fill: Callable[[Network, Settings], dict[str, Tensor] | None] = load_start_weights,
) -> tuple[Session, Engine]:
    """Start the ranks and build a session that writes no files, and an engine with weights.

    Args:
        fill: what fills the network with them.
    """
    resolved = resolved_run(NOWHERE, *overrides, world_size=world_size)
    return _opened(resolved, phase=phase, fill=fill)


def open_run(settings: Settings) -> tuple[Session, Engine]:
    """Return session and engine of a supervised phase on rows, on one rank."""
    settings = replace(settings, run=replace(settings.run, dir=str(NOWHERE)))
    resolved = resolve(settings, world_size=1, needs=None, phases=("sft",))
    return _opened(resolved, phase="sft", fill=load_start_weights)


def _opened(
    resolved: Resolved,
    *,
    phase: str,
    fill: Callable[[Network, Settings], dict[str, Tensor] | None],
) -> tuple[Session, Engine]:
    settings = resolved.settings
    ranks = start_ranks(settings)
    grader = Grader(resolved.task, settings.task)
    own = resolved.supervised
    run = Run(settings, ranks, resolved.task, resolved.tokenizer, grader, supervised=own)
    session = Session(run, Output(Recorder(), silent_view()))  # type: ignore[arg-type]
    optimizer = settings.optimizer if phase == "rl" else settings.sft.optimizer
    engine = build_engine(settings, optimizer, iterations=10, ranks=ranks)
    engine.init_main_weights(fill(engine.network, settings) or {})
    return session, engine


def gradient(
    session: Session,
    engine: Engine,
    rollout: Rollout,
    reference: Network | None = None,
    *,
    is_applied: bool = False,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return metrics and whole gradients of one update; weights stay unless it is applied."""
    caught: dict[str, Tensor] = {}
    own = engine.optimizer.step

    def step():
        grads = {n: p.main_grad.clone() for n, p in engine.network.named_parameters()}
        caught.update(export_hf(grads, session.run.settings.model, session.run.ranks))
        return own() if is_applied else (True, 0.0, None)

    engine.optimizer.step = step  # type: ignore[method-assign]
    metrics, _ = update_policy(session, engine, rollout, reference)
    del engine.optimizer.step
    return metrics, caught


def leaves(
    session: Session, engine: Engine, *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return copies of the weights that take a gradient, by their Hugging Face names."""
    weights = {name: p.detach().clone() for name, p in engine.network.named_parameters()}
    found = export_hf(weights, session.run.settings.model, session.run.ranks)
    return {name: table.to(dtype).requires_grad_() for name, table in found.items()}


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the worst difference of a tensor, relative to its norm."""
    return max(float((ours[n] - t).norm() / t.norm().clamp(min=1e-12)) for n, t in theirs.items())


def unknown_metrics(records: Sequence[dict]) -> set[tuple[str, str]]:
    """Return phase and name of what a run logged and `runs.metrics` does not explain."""
    names = {(record["phase"], name) for record in records for name in record}
    return {(phase, name) for phase, name in names if find_metric(name, phase=phase) is None}


def same_metrics(ours: Sequence[dict], theirs: Sequence[dict]) -> bool:
    """Say whether two runs' metrics agree in every bit of every key but those of time."""

    def timeless(record: dict) -> dict:
        return {key: value for key, value in record.items() if not key.startswith(TIMED)}

    return [timeless(record) for record in ours] == [timeless(record) for record in theirs]
