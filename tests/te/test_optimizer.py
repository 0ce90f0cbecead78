"""Transformer Engine's Adam: its states, and checkpoints of every kind of optimizer.

Run by Transformer Engine's own Python code, with stand-ins for its kernels (see `kernels`).
"""

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

from agrpo_megatron.training.sft import run_sft
from tests.checkpoint import test_sharded as plain
from tests.ranks import run_ranks
from tests.te.models import MXFP8, TENSORWISE

# These test the optimizer: except for FP8 weights, the layers need no kernels.
BF16 = ["precision=bf16", "kernels.layer_spec=local"]
DISTRIBUTED = [*BF16, "sft.optimizer.distributed=true"]
SHORT = ["sft.optimizer.moments=bf16", "sft.optimizer.main_gradients=bf16"]
PRIMARY = [
    "precision=fp8",
    "fp8.primary_weights=true",
    "optimizer.distributed=true",
    "sft.optimizer.distributed=true",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.init_std=0.1",
]
FP8_MOMENTS = ["sft.optimizer.moments=fp8"]
KINDS = {  # ranks, settings
    "float32": (1, []),
    "bf16": (1, BF16),
    "distributed": (2, DISTRIBUTED),
    "moments and gradients of bf16": (2, [*DISTRIBUTED, *SHORT]),
    "half of it offloaded": (2, [*DISTRIBUTED, "sft.optimizer.offload=0.5"]),
    "all of it offloaded": (1, [*DISTRIBUTED, "sft.optimizer.offload=1"]),
    "weights in FP8": (2, PRIMARY),
    "weights in FP8 with one scale": (2, [*PRIMARY, TENSORWISE]),
    "weights in MXFP8": (2, [*PRIMARY, MXFP8]),
}


class _Host(TorchFunctionMode):
    """Distinguish host memory from the emulated GPU's memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func is torch.Tensor.to and args[1:] in (("cuda",), ("cpu",)):
            return _to_host(args[0]) if args[1] == "cpu" else args[0].detach().view_as(args[0])
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and args and _is_on_host(args[0]):
            result.on_host = True  # type: ignore[attr-defined]
        return result


def _is_on_host(thing):
    return getattr(thing, "on_host", False)


def _to_host(tensor):
    moved = tensor.clone()
    moved.on_host = True
    return moved


def _install(overrides):
    """Emulate kernels, GPU memory and NCCL's gathers; once a process.

    Gloo converts the tensors of one gather to one dtype; they may be bytes and bf16.
    """
    from megatron.core.distributed import param_and_grad_buffer

    from agrpo_megatron.megatron import platform
    from tests.te.kernels import install

    install(overrides)
    torch.Tensor.is_cuda = property(lambda tensor: not _is_on_host(tensor))  # type: ignore
    torch.Tensor.cpu = _to_host  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign]
    platform._Stream.record_event = lambda stream: stream  # type: ignore[attr-defined]
    param_and_grad_buffer._coalescing_manager = lambda *_, **__: nullcontext()
    _Host().__enter__()


def _whole_run(root, overrides):
    _install(overrides)
    return plain._train_and_save_halfway(root, overrides)


def _second_half(source, overrides):
    _install(overrides)
    return plain._continue(source, overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_continues_bit_for_bit(tmp_path, kind):
    ranks, overrides = KINDS[kind]
    whole = run_ranks(ranks, _whole_run, tmp_path, overrides)
    again = run_ranks(ranks, _second_half, tmp_path / "sft-000002", overrides)
    assert len(whole[0][0]) == 2
    assert all(plain._same(a, b) for a, b in zip(again, whole, strict=True))


def _states(overrides):
    """Return the optimizer of the weights, and the dtypes of its states."""
    _install(overrides)
    session, engine = plain._open(overrides)
    run_sft(session, engine, start=3, on_iteration_end=lambda _: None)
    (part,) = engine.optimizer.chained_optimizers
    inner = getattr(part.optimizer, "sub_optimizers", [part.optimizer])
    kept = [state for adam in inner for state in adam.state.values()]
    names = ("exp_avg", "exp_avg_sq", "master_param")
    dtypes = {tuple(str(s[n].dtype) for n in names if n in s) for s in kept}
    held = {(type(s["exp_avg"]).__name__, _is_on_host(s["exp_avg"])) for s in kept}
    return {type(adam).__name__ for adam in inner}, dtypes, held


@pytest.mark.parametrize(
    ("overrides", "adams", "dtypes", "held"),
    [
        ([], {"FusedAdam"}, "float32 float32", {("Tensor", False)}),
        (SHORT[1:], {"FusedAdam"}, "float32 float32 int16", {("Tensor", False)}),
        (SHORT, {"FusedAdam"}, "bfloat16 bfloat16 int16", {("Tensor", False)}),
        # An FP8 tensor reports the dtype it represents.
        (FP8_MOMENTS, {"FusedAdam"}, "float32 bfloat16 int16", {("Float8Tensor", False)}),
        (
            ["sft.optimizer.offload=0.5"],
            {"FusedAdam", "AdamW"},
            "float32 float32 float32",
            {("Tensor", False), ("Tensor", True)},
        ),
    ],
)
def test_states_are_kept_as_asked_for(overrides, adams, dtypes, held):
    ((found, kept, where),) = run_ranks(1, _states, [*DISTRIBUTED, *overrides])
    assert found == adams and where == held
    assert kept == {tuple(f"torch.{name}" for name in dtypes.split())}


def _without_fused(run, *arguments):
    """Run with torch's optimizers; the settings come last."""
    from agrpo_megatron.megatron.platform import use_torch_optimizers

    _install(arguments[-1])
    use_torch_optimizers()
    return run(*arguments)


def test_offloading_without_a_fused_optimizer_continues_bit_for_bit(tmp_path):
    overrides = [*DISTRIBUTED, "sft.optimizer.offload=0.5"]
    (whole,) = run_ranks(1, _without_fused, plain._train_and_save_halfway, tmp_path, overrides)
    (again,) = run_ranks(1, _without_fused, plain._continue, tmp_path / "sft-000002", overrides)
    assert len(whole[0]) == 2 and plain._same(again, whole)


def _through(source, root, overrides):
    """Load and save again, without a step in between."""
    _install(overrides)
    return plain._load_and_save(source, root, overrides)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, BF16),
        (2, DISTRIBUTED),
        (2, [*DISTRIBUTED, *SHORT[1:]]),
        (1, [*DISTRIBUTED, "sft.optimizer.offload=0.5"]),
    ],
)
def test_states_go_from_torch_through_another_optimizer_and_back(tmp_path, ranks, overrides):
    (whole,) = run_ranks(1, plain._train_and_save_halfway, tmp_path / "a", DISTRIBUTED)
    run_ranks(ranks, _through, tmp_path / "a" / "sft-000002", tmp_path / "b", overrides)
    (back,) = run_ranks(1, plain._continue, tmp_path / "b" / "sft-000002", DISTRIBUTED)
    assert len(whole[0]) == 2 and plain._same(back, whole)


def test_fp8_moments_are_rounded_once_more_by_a_checkpoint(tmp_path):
    overrides = [*DISTRIBUTED, *FP8_MOMENTS]
    (whole,) = run_ranks(1, _whole_run, tmp_path, overrides)
    (again,) = run_ranks(1, _second_half, tmp_path / "sft-000002", overrides)
    for ours, theirs in zip(again[0], whole[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def _without_gradient(overrides):
    """Make an update whose gradient is zero, then a real one.

    Returns:
        The first moments' largest number after the first, and whether all is finite at the end.
    """
    _install(overrides)
    session, engine = plain._open(overrides)
    (part,) = engine.optimizer.chained_optimizers
    for ddp in engine.ddp:
        ddp.zero_grad_buffer()
    engine.optimizer.step()
    moments = [state["exp_avg"] for state in part.optimizer.state.values()]
    zeros = max(float(moment.float().abs().max()) for moment in moments)
    run_sft(session, engine, start=3, on_iteration_end=lambda _: None)
    weights = [p for _, p in engine.network.named_parameters()]
    values = [*weights, *(moment.float() for moment in moments)]
    trained = max(float(moment.float().abs().max()) for moment in moments)
    return zeros, trained, all(bool(value.isfinite().all()) for value in values)


def test_fp8_moments_without_a_gradient_are_zero():
    """The scale of a tensor of zeros has no inverse; a moment's part on a rank may be such."""
    [(zeros, trained, is_finite)] = run_ranks(1, _without_gradient, [*DISTRIBUTED, *FP8_MOMENTS])
    assert zeros == 0.0 and trained > 0 and is_finite


def _beginning(overrides):
    """Return how far main weights of FP8 weights are from the values and from the casts."""
    from megatron.core.fp8_utils import is_float8tensor

    from agrpo_megatron.megatron.weights import initialise

    _install(overrides)
    session, engine = plain._open(overrides)
    given = initialise(engine.network, session.run.settings.model, session.run.settings.run.seed)
    off = []
    (part,) = engine.optimizer.chained_optimizers
    for name, weight in engine.network.named_parameters():
        if not is_float8tensor(weight) or weight.main_param is None:
            continue
        place = part._get_model_param_range_map(weight)["param"]
        mine = slice(place.start, place.end)
        values, cast = given[name].flatten()[mine], weight.dequantize().flatten()[mine]
        main = weight.main_param
        off.append((float((main - values).abs().max()), float((main - cast).abs().max())))
    return off


def test_main_weights_of_fp8_weights_start_from_the_values_before_the_cast():
    for off in run_ranks(2, _beginning, PRIMARY):
        assert off
        assert all(from_values == 0 < from_cast for from_values, from_cast in off)
