"""Supervised training in FP8 follows the loss of bf16 on a task that is learned in seconds."""

import pytest

from agrpo_megatron.training.sft import run_sft
from tests.gpu.common import REHEARSES, local, prepare, skip_unless_possible, te
from tests.training.tiny import open_session, tiny

pytestmark = pytest.mark.gpu

ITERATIONS = 20 if REHEARSES else 60
LATE = 5  # last iterations, over which the loss is averaged
# A tiny model that learns Countdown with two numbers, with widths that FP8 supports.
LEARNED = [
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "model.num_attention_heads=2",
    "model.init_std=0.08",
    "task.options.high=40",
    "task.train_problems=500",
    "train.token_budget=2048",
    "train.iterations=0",
    f"sft.iterations={ITERATIONS}",
    "sft.batch_size=64",
    "sft.optimizer.learning_rate=3e-3",
    "sft.optimizer.warmup_iterations=5",
]


def _losses(*overrides):
    prepare()
    skip_unless_possible(tiny(*LEARNED, *overrides))
    session, engine = open_session(*LEARNED, *overrides, phase="sft")
    run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    losses = [record["loss"] for record in session.output.log.records]  # type: ignore[attr-defined]
    assert len(losses) == ITERATIONS
    return losses


def _late(losses):
    return sum(losses[-LATE:]) / LATE


@pytest.fixture(scope="module")
def bf16():
    """Return the losses of the local layers in bf16, which do learn."""
    losses = _losses(*local("bf16"))
    assert _late(losses) < 0.7 * losses[0]
    return losses


@pytest.mark.parametrize("precision", ["bf16", "fp8 blockwise", "fp8 tensorwise", "fp8 delayed"])
def test_the_loss_follows_that_of_bf16(precision, bf16, record_property):
    losses = _losses(*te(precision))
    record_property(f"loss/{precision}", _late(losses))
    record_property("loss/local bf16", _late(bf16))
    assert losses[0] == pytest.approx(bf16[0], rel=0.03)
    assert _late(losses) == pytest.approx(_late(bf16), rel=0.1)
