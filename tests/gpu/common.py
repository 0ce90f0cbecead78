"""Shared by the GPU tests: sizes, engines, and separate processes.

Without a GPU, AGRPO_REHEARSE_GPU=1 runs them at tiny sizes on the CPU. If Transformer Engine is
installed, the kernels of `tests.te` replace its own; else tests that need it are skipped. A
rehearsal shows that the tests run and that their invariants hold; it measures nothing.
"""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.estimators.objective import make_loss
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.megatron import graphs
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.training.step import accumulate_gradients, optimizer_step
from agrpo_megatron.types import PackedRows, TimestepBatch
from tools.gpu_model import LLADA_8B, REHEARSAL, Scale, open_engine, random_batch, scale_settings

ROOT = Path(__file__).parent.parent.parent
REHEARSES = os.environ.get("AGRPO_REHEARSE_GPU") == "1"

# Wide enough for the kernels that a real model gets, small enough for seconds.
MIDDLE = replace(
    LLADA_8B,
    layers=4,
    hidden=1024,
    ffn=3072,
    heads=8,
    vocab=8192,
    prompt=128,
    completion=128,
    steps=32,
    rows=16,
    group=4,
    micro_batches=2,
)
SCALE = REHEARSAL if REHEARSES else MIDDLE
WIDE = REHEARSAL if REHEARSES else replace(LLADA_8B, layers=2, rows=8, micro_batches=2)
# So that the logits' standard deviation is about 1: no distribution is near uniform.
STD = f"model.init_std={SCALE.hidden**-0.5}"


@cache
def prepare() -> None:
    """Install the replacement kernels of a rehearsal; called before anything is built."""
    if REHEARSES and find_spec("transformer_engine") is not None:
        from tests.te.kernels import install

        install()
    if REHEARSES:
        graphs.record_on_gpu = lambda: _record_on_cpu


def _record_on_cpu(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Replace the capture of a CUDA graph: a replay computes again, into the same tensor."""
    written = run()
    return lambda: written.copy_(run()), written


def scaled(*overrides: str, scale: Scale = SCALE) -> Settings:
    """Return settings at the tests' size; skips if the machine cannot run them."""
    prepare()
    settings = scale_settings(scale, STD, "run.threads=1", *overrides)
    validate(settings)
    skip_unless_possible(settings)
    return settings


def skip_unless_possible(settings: Settings) -> None:
    """Skip, with the reason, if this machine cannot run the settings."""
    try:
        kernels_for(settings)
    except ValueError as error:
        pytest.skip(str(error))


def te(precision: str, *more: str) -> tuple[str, ...]:
    """Return the overrides of the te layers in a precision, such as `fp8 blockwise`."""
    name, _, recipe = precision.partition(" ")
    chosen = [f"fp8.recipe={recipe}"] if recipe else []
    return ("kernels.layer_spec=te", f"precision={name}", *chosen, *more)


def local(precision: str, *more: str) -> tuple[str, ...]:
    """Return the overrides of the local layers in a precision."""
    return ("kernels.layer_spec=local", f"precision={precision}", *more)


def weights_of(network: Network) -> dict[str, Tensor]:
    """Return a float32 copy of the weights, by name."""
    return {name: p.detach().float().clone() for name, p in network.named_parameters()}


def set_weights(engine: Engine, weights: dict[str, Tensor]) -> None:
    """Give an engine other weights; mutates them."""
    with torch.no_grad():
        for name, parameter in engine.network.named_parameters():
            parameter.copy_(weights[name])
    engine.optimizer.reload_model_params()


@contextmanager
def engine_of(
    *overrides: str, weights: dict[str, Tensor] | None = None, scale: Scale = SCALE
) -> Iterator[tuple[Engine, Settings]]:
    """Yield an engine with given or seeded weights; it is freed afterwards."""
    settings = scaled(*overrides, scale=scale)
    engine = open_engine(settings)
    if weights is not None:
        set_weights(engine, weights)
    try:
        yield engine, settings
    finally:
        del engine
        gc.collect()
        torch.cuda.empty_cache()


@torch.no_grad()
def logits_of(network: Network, rows: PackedRows) -> Tensor:
    """Return the logits [S, V] in float32, as a rollout computes them."""
    network.set_training("eval")
    network.renew_casts()
    return network.chunks[0](rows).float()


def gradients_of(engine: Engine, batches: Sequence[TimestepBatch]) -> dict[str, Tensor]:
    """Return the gradients of the targets' log-probs by name, in float32; no weight changes."""

    def loss(logits: Tensor, batch: TimestepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = policy_logits(logits, engine.network.vocab)
        logprobs, _ = token_logprobs(policy, batch.targets, vocab=engine.network.vocab)
        return -logprobs.sum(), {}

    accumulate_gradients(engine, batches, loss=loss, examples=len(batches))
    named = engine.network.named_parameters()
    return {name: p.main_grad.float().clone() for name, p in named}  # type: ignore[attr-defined]


def update(engine: Engine, settings: Settings, *, seed: int = 0) -> dict[str, float]:
    """Make one optimizer step on random micro-batches; returns its metrics."""
    device = engine.ranks.device
    loss = make_loss(engine.network.vocab, settings.sampling, settings.algorithm)
    batches = [
        random_batch(SCALE, seed=1000 * seed + number, device=device)
        for number in range(SCALE.micro_batches)
    ]
    return optimizer_step(engine, batches, loss=loss, examples=len(batches))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference, relative to that of `theirs`."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def one_row(rows: PackedRows, number: int) -> PackedRows:
    """Return one of the packed rows by itself."""
    first, last = rows.cu_seqlens[number : number + 2].tolist()
    mine = rows.scored[(rows.scored >= first) & (rows.scored < last)]
    bounds = torch.tensor([0, last - first], dtype=torch.int32, device=rows.tokens.device)
    return PackedRows(rows.tokens[first:last], bounds, mine - first)


def allocated() -> int:
    """Return the bytes of all tensors that are alive on the device."""
    gc.collect()
    gc.collect()  # FP8 weights are freed only after their owner
    if not REHEARSES:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = (thing for thing in gc.get_objects() if _is_tensor(thing))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _is_tensor(thing: object) -> bool:
    return type(thing) in (Tensor, torch.nn.Parameter)


def in_fresh_process(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Call a module's function in a separate process, for switches that a process sets only once.

    Returns its result; a skip there is a skip here.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        job.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        command = [sys.executable, "-c", "from tests.gpu.common import be_child; be_child()"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # `platform.prepare_kernels` sets it on a GPU.
        given = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"} if REHEARSES else {}
        done = subprocess.run(
            [*command, str(job), str(result)],
            env={**os.environ, **given, "PYTHONPATH": path},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert result.exists(), f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        kind, value = pickle.loads(result.read_bytes())
    if kind == "skipped":
        pytest.skip(value)
    return value


def be_child() -> None:
    """Run as the process that `in_fresh_process` starts."""
    job, result = map(Path, sys.argv[1:])
    module, name, args = pickle.loads(job.read_bytes())
    prepare()
    try:
        found = ("returned", getattr(importlib.import_module(module), name)(*args))
    except pytest.skip.Exception as skipped:
        found = ("skipped", str(skipped))
    result.write_bytes(pickle.dumps(found))
