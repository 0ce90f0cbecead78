"""The GPU memory that cuDNN's deterministic attention reserves on Hopper; arithmetic only.

Its backward pass keeps a bfloat16 number for each pair of tokens of a micro-batch. Packed rows are
no exception: Transformer Engine describes them to cuDNN as a batch of rows that are each as long
as all rows together, both sizes rounded up so that few plans are built.

Sources: `get_max_batch_size` and `get_max_tokens` of Transformer Engine's fused_attn/utils.cu, and
the dP workspace of cudnn-frontend's CompositeSDPABackwardNode. From cuDNN 9.25 on, another
algorithm needs much less; whether it is used depends on the cudnn-frontend that Transformer Engine
was compiled with. No version number shows that, so the arithmetic leaves it out.
"""

import bisect

from agrpo_megatron.config.settings import Settings

BFLOAT16 = 2  # bytes
# A tenth of the smallest Hopper's 80 GB; layouts are planned without it.
LIMIT = 8 << 30


def workspace_bytes(*, rows: int, heads: int, queries: int, keys: int) -> int:
    """Return the bytes reserved for a micro-batch of packed rows on one rank.

    Args:
        heads: query heads of the rank.
        queries, keys: tokens of all rows together.
    """
    return BFLOAT16 * _row_bucket(rows) * heads * _token_bucket(queries) * _token_bucket(keys)


def training_workspace(settings: Settings, budget: int) -> int:
    """Return the most bytes reserved for a micro-batch of at most `budget` tokens.

    A row is a completion and at least one token of a prompt; one more row may be padding. Under
    context parallelism a rank's keys may come from all others. A row longer than the budget, which
    has a micro-batch of its own, is not considered.
    """
    parallel, row = settings.parallel, settings.sampling.completion_length + 1
    return workspace_bytes(
        rows=budget // row + 1,
        heads=settings.model.num_attention_heads // parallel.tensor,
        queries=-(-budget // parallel.context),
        keys=budget,
    )


def largest_budget(settings: Settings) -> int:
    """Return the largest `train.token_budget` up to the set one within the limit; 0 if none is."""
    budgets = range(1, settings.train.token_budget + 1)
    return bisect.bisect_right(budgets, LIMIT, key=lambda most: training_workspace(settings, most))


def _row_bucket(rows: int) -> int:
    """Round up to a power of two from 32 to 512; more rows stay as they are."""
    return max(32, _power_of_two(rows)) if rows <= 512 else rows


def _token_bucket(tokens: int) -> int:
    """Round up to a power of two from 1024 to 32768, then to a multiple of 32768."""
    return max(1024, _power_of_two(tokens)) if tokens <= 32768 else -(-tokens // 32768) * 32768


def _power_of_two(count: int) -> int:
    """Round up to a power of two."""
    return 1 << (count - 1).bit_length()
