"""The held-out loss between iterations: with the latest weights, and in a time of its own."""

import time
from dataclasses import replace

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.tasks.supervised.examples import Supervised
from agrpo_megatron.training import sft
from agrpo_megatron.training.supervised import learning
from agrpo_megatron.training.supervised.learning import Learning
from tests.ranks import run_ranks
from tests.training.tiny import open_session

SLOW = 0.2  # seconds of a held-out loss


def _opened():
    session, engine = open_session("sft.iterations=4", phase="sft")
    run = session.run
    settings = replace(run.settings, sft=replace(run.settings.sft, eval_interval=2))
    rows = Supervised([], [(1, 1.0)], 1.0, ["held out"], [])
    return replace(session, run=replace(run, settings=settings, supervised=rows)), engine


def _records():
    """Return the records of iterations whose held-out loss is slow."""
    session, engine = _opened()

    def held_out():
        time.sleep(SLOW)
        return {"held_out_loss": 1.0}

    sft.denoising = lambda *_: Learning(1.0, lambda *_: ({"loss": 2.0}, 10), held_out)
    sft.run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    return session.output.log.records


def test_an_iteration_is_timed_without_the_held_out_loss():
    (records,) = run_ranks(1, _records)
    assert ["held_out_loss" in r for r in records] == [False, True, False, True]
    assert ["timing/evaluation" in r for r in records] == [False, True, False, True]
    for record in records:
        assert record["timing/iteration"] < SLOW <= record.get("timing/evaluation", SLOW)
        assert record["perf/tokens_per_second"] == 10 / record["timing/iteration"]


def _order():
    """Return what measures the held-out loss, in its order."""
    session, engine = _opened()
    called = []
    Engine.finish_parameters = lambda _: called.append("weights are complete")
    learning.held_out_loss = lambda *_: called.append("loss") or 1.5
    found = learning.denoising(session, engine).held_out()
    return called, found


def test_the_held_out_loss_is_of_complete_weights():
    """With `ddp.overlap_param_gather` an update leaves their all-gather to the next pass."""
    ((called, found),) = run_ranks(1, _order)
    assert called == ["weights are complete", "loss"] and found == {"held_out_loss": 1.5}
