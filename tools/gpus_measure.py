"""Measurements of one layout on all its ranks: against one GPU, and sampler against trainer.

Every row starts from the same weights, drawn by name. It samples, updates on the rollouts of the
row `one`, samples again with the updated weights, and updates on its own rollouts.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_model import LLADA_8B, Scale, free_memory, random_weights, scale_settings
from gpu_record import ROOT
from gpu_timing import machine
from gpus_rows import ALONE, Row
from torch import Tensor

from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.checkpoint.sharded import load_checkpoint
from agrpo_megatron.config.parallel import layout_text
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.parallel import gather_objects, start_ranks, world_size
from agrpo_megatron.megatron.reshard import RolloutCopy
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.rollout.session import Output, Run, Session
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.runs.progress import Progress
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.trajectories import map_tensors, moved
from agrpo_megatron.types import Rollout

PROMPT = 256  # tokens, of the task
# LLaDA-8B's layers, as many as a check has time for, and a smaller vocabulary.
WIDE = replace(LLADA_8B, layers=4, vocab=32768, prompt=PROMPT, steps=32, group=2, micro_batches=4)
# Small enough for float32, in which a layout's rounding hides no fault.
EXACT = replace(WIDE, hidden=1024, ffn=3072, heads=8, vocab=8192, completion=64, steps=16, rows=8)
TINY = replace(EXACT, hidden=64, ffn=96, heads=4, vocab=512, completion=8, steps=2, micro_batches=1)
SCALES = {"fp32": EXACT, "bf16": WIDE}
RESHARDS = 3  # updates of the rollout copy that are timed

type Figures = dict[str, Any]


def measure(row: Row, folder: Path, *, is_rehearsal: bool) -> Figures:
    """Return the figures of a row on every rank; `refused` says why it cannot run here.

    Args:
        folder: holds what the row `one` found, for the others.
    """
    found: Figures = {}
    for precision, scale in SCALES.items():
        if row.then is not None and precision != "fp32":
            continue  # only weights and moments matter
        free_memory()
        chosen = TINY if is_rehearsal else scale
        layouts = [row.overrides] if row.then is None else [row.overrides, row.then]
        try:
            resolved = [_resolved(chosen, precision, *layout) for layout in layouts]
        except ValueError as error:
            return {"refused": str(error)}
        if row.then is None:
            is_alone = row.name == ALONE
            found[precision] = _layout(resolved[0], folder / f"{precision}.pt", is_alone=is_alone)
        else:
            found[precision] = _checkpoint(resolved[0], resolved[1], folder)
    if row.name == ALONE:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found["machine"] = machine(torch.device(device))
    return found


def _resolved(scale: Scale, precision: str, *overrides: str) -> Resolved:
    """Return complete settings of a layout.

    Raises:
        ValueError: this machine cannot run them.
    """
    top_k = ["sampling.top_k=150"] if precision == "bf16" else []
    settings = scale_settings(
        scale,
        f"precision={precision}",
        f"model.init_std={scale.hidden**-0.5}",
        f"model.max_sequence_length={2 * (scale.prompt + scale.completion)}",
        f"task.name={ROOT / 'examples' / 'llada_8b' / 'one_gpu.py'}",
        "task.train_problems=64",
        "task.eval_problems=2",
        "algorithm.prompts_per_iteration=8",
        f"algorithm.mc_samples={scale.micro_batches}",
        "algorithm.baseline=none",
        "optimizer.learning_rate=1e-4",
        # Where a gradient is only rounding, Adam's step would be only rounding, too.
        "optimizer.megatron.adam_eps=1e-4",
        *([] if torch.cuda.is_available() else ["run.threads=1"]),
        *top_k,
        *overrides,
    )
    resolved = resolve(settings, world_size=world_size(), needs=("train",))
    kernels_for(resolved.settings)
    return resolved


def _open(resolved: Resolved) -> tuple[Session, Engine]:
    """Start the ranks; return a session that writes no files, and an engine with random weights."""
    settings = resolved.settings
    ranks = start_ranks(settings)
    grader = Grader(resolved.task, settings.task)
    run = Run(settings, ranks, resolved.task, resolved.tokenizer, grader)
    session = Session(run, Output(RunLog(Path(), settings=settings, is_main=False)))
    engine = build_engine(settings, settings.optimizer, iterations=10, ranks=ranks)
    engine.init_main_weights(random_weights(engine.network, settings.model, seed=0))
    return session, engine


def _layout(resolved: Resolved, path: Path, *, is_alone: bool) -> Figures:
    """Measure a layout in one precision; `path` is the file of what one GPU found."""
    session, engine = _open(resolved)
    device, is_exact = engine.ranks.device, resolved.settings.precision == "fp32"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _weights(session, engine) if is_exact else {}
    first, _ = collect_rollout(session, engine, 0)
    given, theirs = (first, None) if is_alone else _load(path, device)
    against, _ = update_policy(session, engine, given, None)
    change = _change(session, engine, before) if is_exact else {}
    second, sampled = collect_rollout(session, engine, 1)
    started = _now()
    own, tokens = update_policy(session, engine, second, None)
    updating = _now() - started
    found: Figures = {
        "own": _ratio_error(own),
        "rollout tokens/s": sampled["tokens"] / sampled["timing/rollout"],
        "update tokens/s": tokens / updating,
        "peak GiB": _peak(device),
    }
    if theirs is None:
        _save(path, first, {"grad_norm": against["grad_norm"], "change": change})
    else:
        same = (first.trajectory.tokens == given.trajectory.tokens).double().mean()
        found["against one"] = {
            "ratio error": _ratio_error(against),
            "same tokens": float(same),
            "grad norm": abs(against["grad_norm"] / theirs["grad_norm"] - 1),
            "weights": _difference(change, theirs["change"]) if is_exact else None,
        }
    if engine.rollout_copy is not None:
        found["reshard"] = _reshard(engine, engine.rollout_copy)
    return found


def _checkpoint(saved: Resolved, resumed: Resolved, folder: Path) -> Figures:
    """Save at one layout and resume at another; compare the weights, and those one update later."""
    given, _ = _load(folder / "fp32.pt", torch.device("cpu"))
    names = [layout_text(each.settings.parallel) for each in (saved, resumed)]
    root = folder / "-to-".join(names)
    path, weights, later, saving = _saved(saved, given, root)
    free_memory()
    session, engine = _open(resumed)
    loading = _seconds(lambda: load_checkpoint(path, engine))
    loaded = _weights(session, engine)
    update_policy(session, engine, _to(given, engine.ranks.device), None)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "largest difference": max(float((loaded[n] - t).abs().max()) for n, t in weights.items()),
        "next update": _difference(_change(session, engine, loaded), later),
        "GB": size / 1e9,
        "save seconds": saving,
        "load seconds": loading,
    }


def _saved(
    resolved: Resolved, given: Rollout, root: Path
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor], float]:
    """Update and save; return the checkpoint, its weights, their next change, and seconds."""
    session, engine = _open(resolved)
    given = _to(given, engine.ranks.device)
    update_policy(session, engine, given, None)
    saver = Saver(root, engine, keep=1, is_async=False, files=None)
    progress = Progress("rl", 1, {})
    seconds = _seconds(lambda: saver.save(progress))
    weights = _weights(session, engine)
    update_policy(session, engine, given, None)
    return root / progress.name, weights, _change(session, engine, weights), seconds


def _reshard(engine: Engine, copy: RolloutCopy) -> Figures:
    """Time the copy of the training weights into the rollout layout; its plan is already made.

    The bandwidth counts each weight that a rank of the rollout layout holds, also those that were
    on the same rank before.
    """
    spent = [_seconds(lambda n=n: copy.update(engine.network, -1 - n)) for n in range(RESHARDS)]
    mine = sum(p.nbytes for _, p in copy.network.named_parameters())
    total, seconds = sum(gather_objects(mine)), statistics.median(spent)
    return {"GB": total / 1e9, "seconds": seconds, "GB/s": total / 1e9 / seconds}


def _ratio_error(metrics: dict[str, float]) -> Figures:
    return {"largest": metrics["ratio/max_error"], "99 %": metrics["ratio/p99_error"]}


def _weights(session: Session, engine: Engine) -> dict[str, Tensor]:
    """Return whole weights in float32 by Hugging Face name; called by every rank."""
    engine.finish_parameters()
    named = {name: p.detach() for name, p in engine.network.named_parameters()}
    whole = export_hf(named, session.run.settings.model, session.run.ranks)
    return {name: tensor.float().cpu() for name, tensor in whole.items()}


def _change(session: Session, engine: Engine, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t - before[name] for name, t in _weights(session, engine).items()}


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a tensor, relative to its norm."""
    norms = {name: t.norm().clamp(min=1e-30) for name, t in theirs.items()}
    return max(float((ours[name] - t).norm() / norms[name]) for name, t in theirs.items())


def _seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes until all ranks are done with it."""
    dist.barrier()
    started = _now()
    function()
    _now()
    dist.barrier()
    return time.perf_counter() - started


def _now() -> float:
    """Return the time, once the device has done all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(device: torch.device) -> float | None:
    """Return the largest peak of a rank's memory, in GiB; called by every rank."""
    if device.type != "cuda":
        return None
    return max(gather_objects(torch.cuda.max_memory_allocated())) / 2**30


def _save(path: Path, rollout: Rollout, found: Figures) -> None:
    torch.save((_to(rollout, torch.device("cpu")), found), path)


def _load(path: Path, device: torch.device) -> tuple[Rollout, Figures]:
    """Return the rollouts of one GPU on this rank's device, and what their update gave."""
    rollout, found = torch.load(path, weights_only=False)
    return _to(rollout, device), found


def _to(rollout: Rollout, device: torch.device) -> Rollout:
    there = map_tensors(rollout, lambda tensor: tensor.to(device))
    return replace(there, trajectory=moved(rollout.trajectory, device))
