"""A run with experts that resumes at other layouts, after a kill at each of them."""

import pytest
import torch.distributed as dist

from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line, kill_in_save
from tests.training.test_expert_layouts import EXPERTS
from tests.training.test_run import read
from tests.training.tiny import resolved_run, silent_view

RUN = [
    *EXPERTS,
    "model.num_layers=2",
    "sft.iterations=1",
    "train.iterations=4",
    "algorithm.baseline=none",  # else the loss is a difference of equal numbers
    "optimizer.decay=linear",
    "optimizer.megatron.adam_eps=1e-4",
    "evaluation.interval=0",
    "checkpoint.interval=1",
]
DISTRIBUTED = ["optimizer.distributed=true", "sft.optimizer.distributed=true"]
STAGES = [
    (2, ["parallel=ep2", *DISTRIBUTED]),
    (4, ["parallel=ep4", *DISTRIBUTED]),
    (4, ["parallel=tp2-sp-ep2-etp2"]),
    (2, ["parallel=tp2-sp"]),
]


def _train(run_dir, overrides, line=None, save=None):
    if line is not None:
        kill_after_line(line)
    if save is not None:
        kill_in_save(*save)
    train(resolved_run(run_dir, *overrides, world_size=dist.get_world_size()), silent_view())


def test_a_run_goes_on_at_another_expert_parallelism(tmp_path):
    """One rank, ep2, ep4 killed in a save, both with tensor parallelism, and tp2."""
    run_ranks(1, _train, tmp_path / "whole", RUN)
    expected = read(tmp_path / "whole" / "metrics.jsonl")
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", RUN, 3)
    kills = [(1, None), (None, (2, "point")), (1, None)]  # after a line, or in the second save
    for (size, overrides), kill in zip(STAGES[:-1], kills, strict=True):
        with pytest.raises(AssertionError, match="killed by signal 9"):
            run_ranks(size, _train, tmp_path / "run", [*RUN, *overrides], *kill)
    size, overrides = STAGES[-1]
    run_ranks(size, _train, tmp_path / "run", [*RUN, *overrides])
    found = read(tmp_path / "run" / "metrics.jsonl")
    assert [r["phase"] for r in found] == [r["phase"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "reward/mean"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-5), key
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "whole")]
    assert samples[0] == samples[1]
