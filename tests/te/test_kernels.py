"""The stand-ins: correct against other code, and as strict as the kernels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

from tests.ranks import run_ranks
from tests.te import attention, dense, kernels, multi_tensor
from tests.te.attention import PACKED

HALF_STEP = 2.0**-4  # of FP8 with 3 bits of mantissa, relative
LEAST = 2.0**-10  # half of the smallest step, next to a largest value of 448
WHOLE, TALL, WIDE = "whole", 2, 1


def _quantizer(kind):
    if kind == WHOLE:
        return Float8CurrentScalingQuantizer(
            DType.kFloat8E4M3, "cpu", rowwise=True, columnwise=True
        )
    return Float8BlockQuantizer(
        DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=kind
    )


def _random(*shape, seed=0):
    """Return values whose rows and columns differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (
        x * torch.logspace(-2, 2, shape[-1]) * torch.logspace(2, -1, shape[0])[:, None]
    ).bfloat16()


def _one_direction(x, quantizer, *, rowwise):
    quantizer = quantizer.copy()
    quantizer.set_usage(rowwise=rowwise, columnwise=not rowwise)
    return quantizer(x)


def _casts():
    """Return every cast, and its dequantisation by Transformer Engine's own code."""
    kernels.install()
    results = []
    for kind, shape in itertools.product((WHOLE, TALL, WIDE), ((48, 160), (256, 128), (16, 8))):
        x = _random(*shape)
        for rowwise in (True, False):
            cast = _one_direction(x, _quantizer(kind), rowwise=rowwise)
            results.append((kind, rowwise, x, cast.dequantize(dtype=torch.float32)))
    return results


def _largest_of_blocks(x, kind, rowwise):
    """Return the largest value of the block of each value."""
    wide = x.float().abs() if rowwise else x.float().abs().t()
    rows, columns = wide.shape
    tall = {WHOLE: rows, TALL: 128, WIDE: 1}[kind]
    across = columns if kind == WHOLE else 128
    result = torch.empty_like(wide)
    for top, left in itertools.product(range(0, rows, tall), range(0, columns, across)):
        block = slice(top, top + tall), slice(left, left + across)
        result[block] = wide[block].amax()
    return result if rowwise else result.t()


def test_a_cast_comes_back_within_half_a_step_of_its_block():
    [results] = run_ranks(1, _casts)
    assert len(results) == 18
    for kind, rowwise, x, again in results:
        largest = _largest_of_blocks(x, kind, rowwise)
        scale = 1 if kind == WHOLE else 2  # a power of 2 leaves the upper half unused
        bound = (HALF_STEP * x.float().abs()).maximum(scale * largest / 448 * LEAST)
        error = (again - x.float()).abs()
        assert bool((error <= 1.001 * bound).all()), (kind, rowwise, x.shape)
        assert float(error.max()) > 0


def _products():
    """Return products of casts by the kernel, and of the dequantised casts."""
    kernels.install()
    results = []
    kinds = ((WHOLE, WHOLE), (TALL, WIDE), (WIDE, WIDE), (None, None))
    for (kind_a, kind_b), layout in itertools.product(kinds, ("TN", "NN", "NT")):
        # Of every operand the product sums over the last dimension, or over the first.
        shape_a = (64, 160) if layout[0] == "T" else (160, 64)
        shape_b = (160, 48) if layout[1] == "T" else (48, 160)
        a, b = _random(*shape_a), _random(*shape_b, seed=1)
        cast_a = a if kind_a is None else _quantizer(kind_a)(a)
        cast_b = b if kind_b is None else _quantizer(kind_b)(b)
        product, *_ = general_gemm(cast_a, cast_b, out_dtype=torch.float32, layout=layout)
        wide = []
        for x, kind, rowwise in ((a, kind_a, layout[0] == "T"), (b, kind_b, layout[1] == "N")):
            cast = x if kind is None else _one_direction(x, _quantizer(kind), rowwise=rowwise)
            wide.append(cast.double() if kind is None else cast.dequantize(dtype=torch.float32))
        left = wide[1].double().t() if layout[1] == "T" else wide[1].double()
        right = wide[0].double().t() if layout[0] == "T" else wide[0].double()
        results.append((layout, kind_a, product, left @ right))
    return results


def test_a_product_reads_the_bytes_of_its_layout():
    [results] = run_ranks(1, _products)
    assert len(results) == 12
    for layout, kind, product, expected in results:
        assert product.shape == (48, 64), (layout, kind)
        assert torch.allclose(product.double(), expected, rtol=1e-6, atol=0), (layout, kind)


def test_the_norm_is_torchs():
    x, weight = _random(6, 40).requires_grad_(), _random(1, 40)[0].requires_grad_()
    normed, _, scale = dense.rmsnorm_fwd(
        x.detach(), weight.detach(), 1e-5, None, None, BF16, 0, False
    )
    expected = F.rms_norm(x.double(), (40,), weight.double(), 1e-5)
    assert torch.equal(normed, expected.bfloat16())
    grad = _random(6, 40, seed=1)
    into_x, into_weight = dense.rmsnorm_bwd(grad, x.detach(), scale, weight.detach(), 0, False)
    expected.backward(grad.double())
    assert torch.allclose(into_x.float(), x.grad.float(), rtol=0.01, atol=1e-5)
    assert torch.allclose(into_weight.float(), weight.grad.float(), rtol=0.01, atol=1e-5)


BF16 = DType.kBFloat16


def _attention_arguments(heads, cu_seqlens, **changes):
    """Return the arguments of the forward kernel, some of them changed."""
    tex = attention.tex
    arguments = {
        "longest_q": 9,
        "longest_k": 9,
        "is_training": True,
        "scale": 0.25,
        "dropout": 0.0,
        "fast_zero_fill": True,
        "layout": PACKED,
        "out_format": tex.NVTE_QKV_Format.NVTE_THD,
        "scale_format": None,
        "bias_type": tex.NVTE_Bias_Type.NVTE_NO_BIAS,
        "mask_type": tex.NVTE_Mask_Type.NVTE_PADDING_MASK,
        "softmax_type": tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX,
        "window": (-1, -1),
        "bottom_right": False,
        "cu_q": cu_seqlens,
        "cu_k": cu_seqlens,
        **dict(zip("qkv", heads, strict=True)),
        "dtype": torch.bfloat16,
        "cu_q_padded": None,
        "cu_k_padded": None,
    }
    return list((arguments | changes).values())


def _heads(*heads):
    parts = (
        torch.randn(14, count, 8, generator=torch.Generator().manual_seed(count)) for count in heads
    )
    return [part.bfloat16() for part in parts]


def test_attention_is_torchs_row_by_row():
    heads = _heads(4, 2, 2)
    bounds = [0, 5, 5, 14]  # one row is empty here: its queries are on another rank
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, *saved = attention.fused_attn_fwd(*_attention_arguments(heads, cu_seqlens))
    wide = [x.double().requires_grad_() for x in heads]
    rows = []
    for start, end in ((0, 5), (5, 14)):
        parts = [x[start:end].transpose(0, 1)[None] for x in wide]
        row = F.scaled_dot_product_attention(*parts, scale=0.25, enable_gqa=True)
        rows.append(row[0].transpose(0, 1))
    expected = torch.cat(rows)
    assert torch.equal(out, expected.bfloat16()) and len(saved) == 2


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"mask_type": attention.tex.NVTE_Mask_Type.NVTE_NO_MASK}, "padding mask"),
        ({"layout": attention.tex.NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD}, "packed"),
        ({"longest_q": 8}, "longest"),
        ({"cu_q": torch.tensor([0, 5, 14])}, "int32"),
        ({"cu_q": torch.tensor([0, 5, 13], dtype=torch.int32)}, "last token"),
        ({"cu_k": torch.tensor([0, 9, 5, 14], dtype=torch.int32)}, "ascend"),
        ({"q": torch.zeros(14, 4, 8)}, "bfloat16"),
        ({"q": torch.zeros(14, 8, 4).bfloat16().transpose(1, 2)}, "contiguous"),
        ({"q": torch.zeros(14, 3, 8).bfloat16()}, "equal heads"),
    ],
)
def test_attention_refuses_what_the_kernel_would(changes, rule):
    cu_seqlens = torch.tensor([0, 5, 14], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rule):
        attention.fused_attn_fwd(*_attention_arguments(_heads(4, 2, 2), cu_seqlens, **changes))


def _refused():
    """Return the messages for products that a GPU would refuse."""
    kernels.install()
    refusals = []
    for kind, shape_a, shape_b, layout in (
        (WIDE, (64, 24), (48, 24), "TN"),  # 24 values are summed
        (WIDE, (64, 32), (12, 32), "TN"),  # 12 rows
        (WHOLE, (12, 32), (48, 32), "TN"),  # 12 columns
        (TALL, (64, 32), (48, 32), "TN"),  # of two operands with square blocks
        (WIDE, (24, 64), (24, 48), "NT"),  # 24 tokens of a weight's gradient
    ):
        a, b = (_quantizer(kind)(_random(*shape)) for shape in (shape_a, shape_b))
        with pytest.raises(RuntimeError) as error:
            general_gemm(a, b, out_dtype=torch.bfloat16, layout=layout)
        refusals.append(str(error.value))
    cast = _quantizer(WIDE)(_random(64, 32))
    cast.update_usage(rowwise_usage=False)
    with pytest.raises(RuntimeError) as error:
        general_gemm(cast, _quantizer(WIDE)(_random(48, 32)), out_dtype=torch.bfloat16)
    return [*refusals, str(error.value)]


def test_products_are_refused_as_cublas_would():
    [said] = run_ranks(1, _refused)
    wanted = ("24 summed", "12 rows", "12 columns", "128 x 128", "24 summed", "has the bytes")
    assert all(text in message for text, message in zip(wanted, said, strict=True)), said


def _weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("form", ["plain", "main weights", "remainders"])
def test_adam_is_torchs(form):
    start, *gradients = _weights()
    start = start.bfloat16().float()
    expected = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.2, betas=(0.9, 0.95))
    weight = start.clone() if form == "plain" else start.bfloat16()
    first, second = torch.zeros(5, 3), torch.zeros(5, 3)
    main = {"main weights": start.clone(), "remainders": torch.zeros(5, 3, dtype=torch.int16)}
    for step, gradient in enumerate(gradients, 1):
        expected.grad = gradient
        optimizer.step()
        lists = [[gradient], [weight], [first], [second]]
        lists += [[main[form]]] if form in main else []
        kernel = multi_tensor.multi_tensor_adam
        if form == "remainders":
            kernel = multi_tensor.multi_tensor_adam_param_remainder
        kernel(0, torch.zeros(1), lists, 0.1, 0.9, 0.95, 1e-8, step, 1, 1, 0.2)
    if form == "remainders":
        high = weight.view(torch.int16).int() - (main[form] < 0).int()
        kept = ((high << 16) | (main[form].int() & 0xFFFF)).view(torch.float32)
    else:
        kept = main.get(form, weight)
    assert torch.allclose(kept, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(weight.float(), expected, rtol=0.01)


def test_norm_and_scale_of_lists():
    parts, noop = _weights(), torch.zeros(1)
    norm, _ = multi_tensor.multi_tensor_l2norm(0, noop, [parts], False)
    assert float(norm) == pytest.approx(float(torch.cat(parts).norm()), rel=1e-6)
    scaled = [torch.empty_like(part) for part in parts]
    multi_tensor.multi_tensor_scale(0, noop, [parts, scaled], 0.5)
    assert all(torch.equal(a * 0.5, b) for a, b in zip(parts, scaled, strict=True))
    assert not noop.item()
    parts[1][0, 0] = float("inf")
    multi_tensor.multi_tensor_scale(0, noop, [parts, scaled], 0.5)
    assert noop.item() == 1


def test_nothing_is_installed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="a GPU is here"):
        kernels.install()
