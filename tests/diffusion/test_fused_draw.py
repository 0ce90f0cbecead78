"""The kernel that draws from the whole vocabulary: run by Triton's interpreter, built for Hopper.

The interpreter runs the kernel's Python on a CPU, so it shows what is computed, but not that a GPU
does so: `tests/gpu/test_drawing.py` shows that.
"""

import importlib.util
import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import draw as drawing
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import draw_tokens
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.sampler import sample
from tests.diffusion.hashed import SAMPLINGS, HashedModel, prompts_of
from tests.interpreter import run_interpreted
from tests.ranks import run_ranks

torch.set_num_threads(1)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# (true size, padded size, forbidden ids): below a block; three blocks, the last of them nearly
# empty, or with nothing but padding.
VOCABULARIES = {
    "one block": (31, 40, (30,)),
    "three blocks": (4100, 4104, (0, 2047, 2048, 4099)),
    "a block of padding": (4090, 6000, (5,)),
}
POLICIES = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "untempered": {"temperature": 1.6, "confidence": "untempered"},
    "margin": {"unmasking": "margin"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = 4
NEAR = 2e-6  # nats, of log-probs and entropies in float32


def logits_of(vocabulary: str, dtype: str) -> torch.Tensor:
    """Return logits that would draw what must not be drawn, and that tie in bfloat16."""
    size, padded, forbidden = VOCABULARIES[vocabulary]
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(ROWS, padded, generator=generator)
    logits[:, size:] += 30
    logits[:, list(forbidden)] += 30
    return logits.to(DTYPES[dtype])


def draws(vocabulary: str, policy: str, dtype: str, rank: int = 0, ranks: int = 1) -> Any:
    """Draw from a shard of the vocabulary, by tensor operations or by the kernel."""
    size, padded, forbidden = VOCABULARIES[vocabulary]
    width = padded // ranks
    group = dist.group.WORLD if ranks > 1 else None
    vocab = Vocabulary(size, start=rank * width, forbidden=forbidden, group=group)
    shard = logits_of(vocabulary, dtype)[:, rank * width : (rank + 1) * width].contiguous()
    keys = noise.noise_key(3, noise.TOKENS, torch.arange(ROWS))
    return draw_tokens(shard, keys, vocab=vocab, sampling=SamplingSettings(**POLICIES[policy]))


def _use_the_kernel() -> Any:
    from agrpo_megatron.diffusion import fused_draw

    drawing.kernel_for = lambda _logits: fused_draw
    return fused_draw


def _by_kernel(ranks: int) -> Any:
    _use_the_kernel()
    cases = itertools.product(VOCABULARIES, POLICIES, DTYPES if ranks == 1 else ["float32"])
    drawn = {case: draws(*case, dist.get_rank(), ranks) for case in cases}
    return drawn if ranks > 1 else (drawn, _completions(), _ties(), _nothing(), _moved_bytes())


@cache
def by_kernel(ranks: int) -> Any:
    """Return what each rank drew; one rank also returns the results of the other tests."""
    return run_interpreted(ranks, _by_kernel, ranks)


@needs_triton
@pytest.mark.parametrize(("ranks", "dtype"), [(1, "float32"), (1, "bfloat16"), (2, "float32")])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_kernel_draws_the_tokens_of_tensor_operations(vocabulary, policy, dtype, ranks):
    """Also on two shards of the vocabulary. Log-probs and entropies are equal up to rounding."""
    case = vocabulary, policy, dtype
    expected = draws(*case)
    results = by_kernel(2) if ranks == 2 else [by_kernel(1)[0][0]]
    for result in results:
        got = result[case]
        assert torch.equal(got.tokens, expected.tokens) and got.support_ids is None
        for name in ("logprobs", "entropies", "spreads", "confidences"):
            ours, theirs = getattr(got, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype == torch.float32
            assert torch.allclose(ours, theirs, rtol=NEAR, atol=NEAR), name


SAMPLED = (
    "random, one token a step",
    "low_confidence, threshold",
    "entropy, remainder",
    "low_confidence, greedy",
)


def _completions() -> Any:
    return {name: _sample(SAMPLINGS[name]) for name in SAMPLED}


def _sample(sampling: SamplingSettings) -> Any:
    context = HashedModel().context()
    return sample(prompts_of(3), torch.arange(3), context=context, sampling=sampling)


@needs_triton
def test_completions_are_those_without_the_kernel():
    for name, got in by_kernel(1)[0][1].items():
        expected = _sample(SAMPLINGS[name])
        for field in ("tokens", "unmask_step", "num_steps"):
            assert torch.equal(getattr(got, field), getattr(expected, field)), (name, field)
        assert torch.allclose(got.logprobs, expected.logprobs, rtol=NEAR, atol=NEAR), name


def _ties() -> Any:
    """Draw greedily from logits that are equal within a block, across blocks, and all of them."""
    logits = torch.zeros(3, 4100)
    logits[0, [7, 30]] = logits[1, [2050, 4090]] = 1.0
    sampling = SamplingSettings(temperature=0.0)
    return draw_tokens(logits, torch.zeros(3).long(), vocab=Vocabulary(4100), sampling=sampling)


@needs_triton
def test_the_lowest_id_wins_a_tie():
    draw = by_kernel(1)[0][2]
    assert draw.tokens.tolist() == [7, 2050, 0]


def _nothing() -> Any:
    sampling, keys = SamplingSettings(), torch.zeros(0, dtype=torch.int64)
    return draw_tokens(torch.zeros(0, 40), keys, vocab=Vocabulary(40), sampling=sampling)


@needs_triton
def test_no_scored_rows_give_no_draws():
    draw = by_kernel(1)[0][3]
    assert draw.tokens.shape == draw.logprobs.shape == (0,)


def _moved_bytes() -> tuple[float, float]:
    """Return the bytes that the kernel reads and writes, for each of its logits."""
    from triton.runtime import interpreter

    fused_draw = _use_the_kernel()
    builder, moved = interpreter.interpreter_builder, {"load": 0, "store": 0}
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(kind: str, pointers: Any, mask: Any) -> None:
        moved[kind] += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(ptrs, mask, *rest):
        count("load", ptrs, mask)
        return load(ptrs, mask, *rest)

    def counted_store(ptrs, value, mask, *rest):
        count("store", ptrs, mask)
        return store(ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    rows, width = 3, 4 * fused_draw.BLOCK
    keys = noise.noise_key(0, noise.TOKENS, torch.arange(rows))
    logits = torch.randn(rows, width, dtype=torch.bfloat16)
    fused_draw.draw_whole(logits, keys, vocab=Vocabulary(width), temperature=0.7)
    return moved["load"] / logits.numel(), moved["store"] / logits.numel()


@needs_triton
def test_a_logit_is_read_once():
    """2 bytes of a bfloat16 logit, 1 of whether its id is possible (the same for all rows,
    so it stays in the cache), and 80 for each block of 2048."""
    read, written = by_kernel(1)[0][4]
    assert read == pytest.approx(3 + 8 / 2048, abs=1e-6)
    assert written == pytest.approx(80 / 2048, abs=1e-6)


class Passes(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the bytes of tensors with an element for each logit that operations read and write."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.bytes, self.operations = numel, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func._schema.name in ("aten::detach", "aten::_unsafe_view")
        of = [t for t in (*args, result) if isinstance(t, torch.Tensor) and t.numel() == self.numel]
        if of and not is_view:
            self.operations += 1
            self.bytes += sum(t.element_size() for t in of)
        return result


def test_tensor_operations_read_and_write_some_seven_hundred_bytes_for_each_logit():
    """What the kernel saves; operations on whole logits, each of which is a pass over memory."""
    logits = logits_of("three blocks", "bfloat16")
    keys = noise.noise_key(3, noise.TOKENS, torch.arange(ROWS))
    with Passes(logits.numel()) as passes:
        draw_tokens(logits, keys, vocab=Vocabulary(4104), sampling=SamplingSettings())
    assert 600 < passes.bytes < 800 and passes.operations > 40


# One H200: bytes a second, and instructions a second of its 132 multiprocessors, which start up to
# 4 a cycle for 32 lanes each. Instructions on 64-bit numbers take two cycles.
BANDWIDTH, LANES = 4.8e12, 132 * 128 * 1.7e9
SCORED, COLUMNS = 4096, 126_464  # a whole block of 64 rows at LLaDA's vocabulary
FORWARD = 2 * 7.5e9 * 8192 / 450e12  # seconds: 8192 tokens through 8B, at 45 % of the peak


def _built() -> dict[str, str] | None:
    """Return the kernel's PTX for Hopper, or None where Triton has no assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from agrpo_megatron.diffusion import fused_draw

    pointers = {"logits": "*bf16", "impossible": "*u8", "keys": "*i64", "parts": "*fp64"}
    numbers = {"ids": "*i64", "scale": "fp32", "start": "i32", "width": "i32", "count": "i32"}
    constants = {"HAS_NOISE": True, "BLOCK": fused_draw.BLOCK}
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=fused_draw._kernel, signature=signature, constexprs=constants)
    try:
        built = compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused_draw.WARPS}
        )
    except RuntimeError as error:
        if "ptxas" in str(error):
            return None
        raise
    return {"ptx": built.asm["ptx"], "cubin": str(len(built.asm["cubin"]))}


@needs_triton
def test_the_kernel_is_built_for_hopper_and_costs_less_than_a_tenth_of_a_forward():
    """Counted in the assembly: every instruction, as if all took as long as those on 64 bits."""
    (built,) = run_ranks(1, _built, timeout=300.0)
    if built is None:
        pytest.skip("Triton has no assembler here")
    ptx = built["ptx"]
    assert int(built["cubin"]) > 0 and ".local" not in ptx, "registers suffice"
    lines = re.findall(r"^\s+(?:@%?!?\w+ )?[a-z][\w.]*\s.*;$", ptx, re.M)
    instructions = [line for line in lines if not line.strip().startswith((".", "//"))]
    each = len(instructions) / (2048 / (8 * 32))  # a thread has 8 logits
    elements = SCORED * COLUMNS
    seconds = max(elements * 3.1 / BANDWIDTH, 2 * each * elements / LANES)
    assert 100 < each < 1000
    assert seconds < FORWARD / 10, (each, seconds, FORWARD)


def test_the_kernel_is_for_gpus_alone():
    assert drawing.kernel_for(torch.zeros(1, 4)) is None


@needs_triton
def test_without_a_compiler_tokens_are_drawn_by_tensor_operations(monkeypatch):
    """A GPU machine without a C compiler: Triton cannot start kernels, and the user is warned."""
    import triton.runtime

    class Failing:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime, "driver", Failing())
    drawing._gpu_kernel.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler; Triton needs a C compiler"):
        assert drawing._gpu_kernel() is None
    drawing._gpu_kernel.cache_clear()


def test_a_gpu_takes_the_kernel_if_the_numbers_are_not_float64(monkeypatch):
    kernel = object()
    monkeypatch.setattr(drawing, "_gpu_kernel", lambda: kernel)

    class Logits:
        is_cuda = True
        dtype = torch.float32

    assert drawing.kernel_for(Logits()) is kernel  # type: ignore[arg-type]
    Logits.dtype = torch.float64
    assert drawing.kernel_for(Logits()) is None  # type: ignore[arg-type]
