"""The counted work of the reference: every row whole, with a head at every position.

FLOPs are 2 per multiply-add of matrices, attention and head; `tests/benchmark` compares them with
torch's own counter.
"""

from agrpo_megatron.benchmark.reference.rollout import Rollouts
from agrpo_megatron.benchmark.work import Counted
from agrpo_megatron.config.settings import ModelSettings


def forward_flops(model: ModelSettings, *, rows: int, length: int) -> int:
    """Return the FLOPs of a forward pass over rows of `length` tokens."""
    assert model.vocab_size is not None
    hidden, tokens = model.hidden_size, rows * length
    projections = 2 * hidden * (2 * model.query_width + 2 * model.key_width)
    feed_forward = 2 * hidden * 3 * model.ffn_hidden_size
    attention = 4 * length * model.query_width  # scores, and weighted values
    head = 2 * hidden * model.vocab_size
    return tokens * (model.num_layers * (projections + feed_forward + attention) + head)


def rollout_work(model: ModelSettings, found: Rollouts) -> Counted:
    """Return the work of a rollout."""
    length = found.prompts.shape[1] + found.tokens.shape[1]
    flops = forward_flops(model, rows=found.rows, length=length)
    return Counted(found.forwards, found.rows * length, found.rows * length, flops)


def update_work(model: ModelSettings, found: Rollouts, *, passes: int) -> Counted:
    """Return the work of an update; a backward pass costs two forwards."""
    length = found.prompts.shape[1] + found.tokens.shape[1]
    rows = passes * len(found.tokens)
    flops = 3 * forward_flops(model, rows=rows, length=length)
    return Counted(passes, rows * length, rows * length, flops)
