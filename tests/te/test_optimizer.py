"""Transformer Engine's Adam: its states, and checkpoints of every kind of optimizer."""

import pytest

from tests.checkpoint import test_sharded as plain
from tests.ranks import run_ranks

BF16 = ["precision=bf16", "kernels.layer_spec=local"]
DISTRIBUTED = ["sft.optimizer.distributed=true"]


def _train(root, overrides):
    from tests.te.kernels import install

    install()
    return plain._train_and_save_halfway(root, overrides)


def _continue(source, overrides):
    from tests.te.kernels import install

    install()
    return plain._continue(source, overrides)


KINDS = {
    "float32": [],
    "plain": BF16,
    "distributed": [*BF16, *DISTRIBUTED],
    "moments": [*BF16, *DISTRIBUTED, "sft.optimizer.moments=bf16"],
    "gradients": [*BF16, *DISTRIBUTED, "sft.optimizer.main_gradients=bf16"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_continues_bit_for_bit(tmp_path, kind):
    whole = run_ranks(2, _train, tmp_path, KINDS[kind])
    again = run_ranks(2, _continue, tmp_path / "sft-000002", KINDS[kind])
    assert all(plain._same(a, b) for a, b in zip(again, whole, strict=True))
