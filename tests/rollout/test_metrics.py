"""Metrics of completions, updates and devices, with their values written out."""

import resource
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.estimators.losses import errors_by_part, policy
from agrpo_megatron.estimators.weights import effective_share
from agrpo_megatron.hardware.rates import Rate
from agrpo_megatron.rollout.data_order import epochs
from agrpo_megatron.rollout.metrics import entropy_by_step, pass_at_group, text_lengths
from agrpo_megatron.training.measures.devices import forget_peak, memory_peaks, utilisation
from agrpo_megatron.training.measures.totals import Totals
from agrpo_megatron.training.measures.updates import combined
from agrpo_megatron.trajectories import parts_of_steps, step_parts
from agrpo_megatron.types import LossInputs, Reward, ScoredRows, Trajectory
from tests.ranks import run_ranks
from tests.training.tiny import open_session

# Two completions of 10 steps, a token each, and one that ended after its 5 tokens: the rest is
# filled in, at no step. Its prompt is the same.
STEPS = torch.tensor([[*range(10)], [*range(9, -1, -1)], [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]])


def _trajectory(entropies=None, steps=STEPS, most=10):
    shape = steps.shape
    zeros = torch.zeros(shape)
    return Trajectory(
        prompts=(torch.zeros(2, dtype=torch.int64),) * shape[0],
        tokens=torch.zeros(shape, dtype=torch.int64),
        unmask_step=steps,
        logprobs=zeros,
        entropies=zeros if entropies is None else entropies,
        spreads=zeros,
        support_ids=None,
        num_steps=torch.tensor([10, 10, 5])[: shape[0]],
        rollout_ids=torch.arange(shape[0]),
        sampling=SamplingSettings(completion_length=10, block_length=10, denoising_steps=most),
    )


def test_the_parts_of_a_denoising_are_eighths_of_each_completion_s_own_steps():
    trajectory = _trajectory()
    assert step_parts(trajectory) == 8
    parts = parts_of_steps(trajectory)
    assert parts[0].tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert parts[1].tolist() == parts[0].tolist()[::-1]
    assert parts[2].tolist() == [0, 1, 3, 4, 6, 7, 7, 7, 7, 7]
    few = _trajectory(steps=STEPS[:2].clamp(max=3), most=4)
    few = replace(few, num_steps=torch.tensor([4, 4]), sampling=replace(few.sampling))
    assert step_parts(few) == 4 and parts_of_steps(few)[0].tolist() == [0, 1, 2, *[3] * 7]


def test_a_row_belongs_to_the_step_that_saw_its_state_or_a_token_to_its_own():
    rows = ScoredRows(
        rollout=torch.tensor([2, 0]),
        hidden=torch.zeros(2, 10, dtype=torch.bool),
        scored=torch.ones(2, 10, dtype=torch.bool),
        weight=torch.ones(2, 10),
        is_sampled=True,
        step=torch.tensor([4, 4]),
    )
    assert parts_of_steps(_trajectory(), rows).tolist() == [[6] * 10, [3] * 10]
    own = parts_of_steps(_trajectory(), replace(rows, step=None))
    assert own.tolist() == parts_of_steps(_trajectory())[[2, 0]].tolist()


def test_entropy_by_step_is_the_mean_of_the_tokens_that_a_part_drew():
    entropies = torch.zeros(3, 10)
    entropies[0] = torch.arange(10)
    entropies[1] = torch.arange(9, -1, -1)
    entropies[2] = torch.tensor([8.0, 8, 8, 8, 8, 100, 100, 100, 100, 100])  # filled: not drawn
    # Part 0 has steps 0 and 1 of two completions, and step 0 of the third.
    assert entropy_by_step(_trajectory(entropies)) == pytest.approx(
        [(0 + 1 + 0 + 1 + 8) / 5, (2 + 2 + 8) / 3, 3.0, (4 + 4 + 8) / 3, (5 + 6 + 5 + 6 + 8) / 5]
        + [7.0, (8 + 8 + 8) / 3, 9.0]
    )
    early = replace(_trajectory(entropies[2:], STEPS[2:]), num_steps=torch.tensor([5]))
    assert [m is None for m in entropy_by_step(early)] == [False, False, True] * 2 + [False, True]


def test_lengths_end_at_any_stop_token_and_a_completion_without_one_fills_its_whole_length():
    tokens = torch.tensor([[5, 5, 1, 5], [5, 5, 5, 5], [2, 5, 5, 5], [5, 5, 5, 1]])
    assert text_lengths(tokens, {1, 2}).tolist() == [2, 4, 0, 3]


def test_a_group_passes_by_one_correct_completion():
    right = [Reward(0.0, correct) for correct in (False, True, False, False, True, True)]
    assert pass_at_group(right, 2) == pytest.approx(2 / 3)
    assert pass_at_group(right, 3) == 1.0


def _inputs(ratio, gains, weights):
    return LossInputs(
        logprobs=torch.tensor(ratio).log(),
        old_logprobs=torch.zeros(len(ratio)),
        reference_logprobs=None,
        advantages=torch.tensor(gains),
        weights=torch.tensor(weights),
        kl_weights=torch.tensor(weights),
        rollout=torch.arange(len(ratio)),
        row=torch.arange(len(ratio)),
        position=torch.zeros(len(ratio), dtype=torch.int64),
    )


def test_clipped_tokens_are_counted_below_and_above():
    """A ratio of 2 at a gain and one of 0.5 at a loss are clipped; the rest, or weight 0, not."""
    inputs = _inputs([2.0, 2.0, 0.5, 0.5, 2.0, 0.5], [1.0, -1, 1, -1, 1, -1], [1.0, 1, 1, 1, 0, 1])
    found = policy(inputs, AlgorithmSettings()).metrics
    update = {name: float(value) for name, value in found.items() if value.dim() == 0}
    update |= {"ratio_p99_error": 0.0, "loss": 0.0, "grad_norm": 0.0}
    update |= {"skipped_updates": 0, "learning_rate": 0.1, "rows": 1, "scoring_rows": 0}
    update |= {"flops": 1, "micro_batches": 1, "filled": 1, "slots": 1}
    found = combined([update])
    assert found["clip_fraction/high"] == pytest.approx(1 / 5)
    assert found["clip_fraction/low"] == pytest.approx(2 / 5)
    assert found["clip_fraction"] == pytest.approx(3 / 5)
    assert "by_step/ratio_error" not in found  # a loss of units has no steps
    parts = {"ratio_max_error_part0": 0.25, "ratio_max_error_part1": -1.0}
    assert combined([{**update, **parts}])["by_step/ratio_error"] == [0.25, None]


def test_ratio_errors_by_part_are_the_largest_of_tokens_with_a_weight():
    inputs = _inputs([1.5, 1.25, 1.0, 3.0, 0.5], [1.0] * 5, [1.0, 1, 1, 0, 1])
    found = errors_by_part(inputs, torch.tensor([0, 0, 1, 2, 3]), 4)
    assert [float(v) for v in found.values()] == pytest.approx([0.5, 0.0, -1.0, 0.5])
    none = errors_by_part(_inputs([], [], []), torch.zeros(0, dtype=torch.int64), 2)
    assert [float(v) for v in none.values()] == [-1, -1]


def test_the_effective_share_is_that_of_equal_weights():
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    rows = ScoredRows(torch.tensor([0, 1]), weight > 0, weight > 0, weight, is_sampled=True)
    assert effective_share(rows) == pytest.approx(4**2 / (2 * 10))
    assert effective_share(replace(rows, weight=torch.ones(2, 2))) == 1.0
    empty = ScoredRows(torch.zeros(0), weight[:0] > 0, weight[:0] > 0, weight[:0], is_sampled=True)
    assert effective_share(empty) == 1.0


def test_an_epoch_visits_the_problems_that_have_a_weight():
    assert epochs([(24, 1.0)], 36) == 1.5
    assert epochs([(24, 1.0), (1000, 0.0), (8, 3.0)], 64) == 2.0


def test_totals_go_on_from_the_last_record():
    totals = Totals({})
    first, second = ({"totals/tokens": n, "totals/flops": 10 * n} for n in (3, 4))
    assert totals.add(first) == first
    last = {"phase": "rl", "iteration": 1, "loss": 0.5, "totals/seconds": 9.0, **first}
    assert (
        Totals(last).add(second) == totals.add(second) == {"totals/tokens": 7, "totals/flops": 70}
    )
    of_an_older_version = {"phase": "rl", "iteration": 7, "loss": 0.5}
    assert Totals(of_an_older_version).add(first) == {}


def _peaks():
    """Return this rank's own peak of resident memory in GiB, and the metrics of both ranks."""
    session, _ = open_session(world_size=2)
    ranks = session.run.ranks
    forget_peak(ranks)
    kept = torch.ones(2**26) if not ranks.is_main else None  # 0.25 GiB of float32
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = memory_peaks(ranks)
    del kept
    record = {"flops": 75.0, "update_flops": 30, "measuring_flops": 5.0}
    record |= {"timing/rollout": 2.0, "timing/update": 0.0}
    return own, found, utilisation(record, ranks, Rate(100.0, "")), utilisation(record, ranks, None)


def test_peaks_are_of_the_rank_that_used_most_and_use_is_of_all_devices():
    (less, *first), (most, *second) = run_ranks(2, _peaks)
    assert most > less + 0.2
    assert first[0] == second[0] == {"memory/host_peak": pytest.approx(most, abs=0.05)}
    assert first[1] == {"perf/mfu_rollout": 40 / (2.0 * 100 * 2)}  # no update, no time
    assert first[2] == {}
