"""The memory of cuDNN's deterministic attention, by its published formula."""

import pytest

from agrpo_megatron.hardware.workspace import (
    LIMIT,
    largest_budget,
    training_workspace,
    workspace_bytes,
)
from tests.gpu.common import MIDDLE
from tools.gpu_model import LLADA_8B, scale_settings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("rows", "heads", "tokens", "gib"),
    [
        (16, 32, 8192, 128),
        (32, 32, 8192, 128),
        (33, 32, 8192, 256),  # the batch's bucket doubles
        (64, 32, 8192, 256),
        (65, 32, 8192, 512),
        (600, 32, 8192, 2400),  # from 513 rows on there are no buckets
        (16, 16, 8192, 64),  # of two tensor-parallel ranks
        (16, 32, 4097, 128),  # as 8192
        (16, 32, 4096, 32),
        (16, 32, 2048, 8),
        (1, 32, 1, 2),  # as 1024
        (16, 32, 32769, 8192),  # from 32768 on, multiples of it
        (16, 32, 65537, 18432),
    ],
)
def test_bytes_of_a_micro_batch(rows, heads, tokens, gib):
    found = workspace_bytes(rows=rows, heads=heads, queries=tokens, keys=tokens)
    assert found == gib * GIB


def test_a_doubled_batch_takes_what_transformer_engine_observed():
    """Its remark: 128 bytes times rows x heads x length^2 for 2 rows, 4 times that for 4 rows."""
    for length in (1024, 2048):
        two, four = (
            workspace_bytes(rows=rows, heads=32, queries=rows * length, keys=rows * length)
            for rows in (2, 4)
        )
        assert two == 128 * 2 * 32 * length**2 and four == 4 * two


def test_the_largest_budget_is_the_last_within_the_limit():
    settings = scale_settings(LLADA_8B)
    assert training_workspace(settings, 8192) == 128 * GIB
    most = largest_budget(settings)
    assert most == 2048
    assert training_workspace(settings, most) <= LIMIT < training_workspace(settings, most + 1)
    assert largest_budget(scale_settings(LLADA_8B, "train.token_budget=1500")) == 1500
    wide = scale_settings(LLADA_8B, "model.num_attention_heads=512")
    assert largest_budget(wide) == 0


def test_short_rows_count():
    short = scale_settings(LLADA_8B, "sampling.completion_length=32", "sampling.block_length=32")
    assert training_workspace(short, 2048) == 2 * training_workspace(scale_settings(LLADA_8B), 2048)


def test_the_gpu_tests_are_within_the_limit():
    settings = scale_settings(MIDDLE)
    assert training_workspace(settings, settings.train.token_budget) == 8 * GIB <= LIMIT
