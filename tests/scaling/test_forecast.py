"""A forecast's FLOPs are those that a run counts, if every step runs and has an advantage."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.blocks import doubled_row
from agrpo_megatron.diffusion.patterns import ahead
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.scaling.flops import completion_flops, pattern_work, scored_work, update_cost
from agrpo_megatron.scaling.forecast.disk import disk, evaluations_of, parameters
from agrpo_megatron.scaling.forecast.rollouts import whole_rollout
from agrpo_megatron.scaling.forecast.work import count_flops, evenly
from agrpo_megatron.training.update import update_policy
from agrpo_megatron.types import Rollout
from tests.cli.test_main import ROOT
from tests.ranks import run_ranks
from tests.test_recipes import NO_WEIGHTS
from tests.training.tiny import open_session, tiny

NULL = "algorithm.mc_samples=null"
BLOCKS = ["model.attention=block_causal", "model.block_length=4"]
# No text ends early: the end-of-text token is one that is hardly ever drawn, and then not alone.
VARIANTS = {
    "agrpo": [],
    "agrpo, two updates": ["algorithm.updates_per_iteration=2"],
    "full_trajectory": ["algorithm.name=full_trajectory", NULL, "sampling.top_k=20"],
    "augmented": [
        "algorithm.scoring=augmented",
        "sampling.record_drawn=true",
        "sampling.unmasking=low_confidence",
    ],
    "diffu_grpo": ["algorithm.name=diffu_grpo", NULL],
    "espo": ["algorithm.name=espo", NULL, "algorithm.updates_per_iteration=2"],
    "adapters": ["lora.rank=3", "algorithm.rollout_correction=2.0"],
    "blocks": BLOCKS,
    "cached": ["sampling.policy=cached", "algorithm.name=full_trajectory", NULL],
    "approximate": ["sampling.policy=approximate", "algorithm.rollout_correction=2.0"],
    "blocks of the row": [*BLOCKS, "sampling.block_origin=row"],
    "blocks, uncached": [*BLOCKS, "rollout.cached=false"],
}
DRAWN = ("augmented", "espo")  # how many tokens are scored depends on the draws
PROMPTS = (5, 6, 9)


def _pairs(variants):
    """Return by variant the FLOPs that a run counts, and those of the forecast."""
    found = {}
    for name, overrides in variants.items():
        session, engine = open_session("sampling.early_end=false", *overrides)
        run = session.run
        settings, size = run.settings, run.settings.algorithm.group_size
        texts = [torch.arange(3 + n, 3 + n + length) for n, length in enumerate(PROMPTS)]
        prompts = [text for text in texts for _ in range(size)]
        ids = torch.arange(len(prompts))
        sampled, _ = sample_prompts(run, engine.network, prompts, ids, sampling=settings.sampling)
        assumed = whole_rollout(PROMPTS, settings.model, settings.sampling, group_size=size)
        trajectory = assumed.trajectory
        assert sampled.num_steps.tolist() == trajectory.num_steps.tolist(), name
        counts = [
            [torch.bincount(row).tolist() for row in t.unmask_step] for t in (sampled, trajectory)
        ]
        assert counts[0] == counts[1]
        rollout = Rollout(sampled, assumed.rewards, assumed.correct, assumed.advantages)
        metrics, _ = update_policy(session, engine, rollout, None)
        flops = count_flops(settings, PROMPTS, PROMPTS)
        sampling = sum(completion_flops(sampled, settings))
        counted = sampling, metrics["flops"], metrics["rows"]
        found[name] = counted, (flops.rollout, flops.update, flops.scored_rows)
    return found


@pytest.fixture(scope="module")
def pairs():
    return run_ranks(1, _pairs, VARIANTS)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_forecast_is_what_a_run_counts(pairs, name):
    (rollout, update, rows), assumed = pairs[name]
    assert rollout == assumed[0] > 0
    error = 0.02 if name in DRAWN else 0.0
    assert (update, rows) == pytest.approx(assumed[1:], rel=error)
    assert rows >= len(PROMPTS)


def test_completions_stand_for_all():
    """32 completions are laid out; eight times as many take eight times as much."""
    settings = tiny(
        "algorithm.prompts_per_iteration=8", "model.mask_token_id=1", "model.eos_token_id=2"
    )
    eight = replace(settings.algorithm, prompts_per_iteration=64)
    few = count_flops(settings, PROMPTS[:1], PROMPTS)
    many = count_flops(replace(settings, algorithm=eight), PROMPTS[:1], PROMPTS * 100)
    assert (many.rollout, many.update) == (8 * few.rollout, 8 * few.update)
    assert many.rollout_bytes == 8 * few.rollout_bytes
    assert many.evaluation == pytest.approx(100 * few.evaluation, rel=0.02)
    huge = replace(settings.algorithm, group_size=2**31 - 1, updates_per_iteration=2**31 - 1)
    large = replace(settings.algorithm, group_size=256)
    one, most = (
        count_flops(replace(settings, algorithm=algorithm), PROMPTS[:1], [])
        for algorithm in (large, huge)
    )
    assert most.rollout == pytest.approx(one.rollout * (2**31 - 1) / 256)
    assert most.update == pytest.approx(one.update * (2**31 - 1) ** 2 / 256, rel=0.05)
    assert one.evaluation == 0  # without a held-out problem
    assert evenly([4, 1, 3, 2], 2) == [2, 4] and evenly([7], 5) == [7]


def test_an_iteration_of_llada_8b():
    """128 rollouts of 200 + 384 tokens in 128 steps; 24 steps of each, all weights trained."""
    file = ROOT / "examples" / "llada_8b" / "gsm8k_full.yaml"
    settings = load(Settings, file, [NO_WEIGHTS])
    flops = count_flops(settings, [200], [200] * 1209)
    end = 2 * 4096**2 + 3 * 4096 * 12288  # of the last layer, for scored tokens only
    row = 584 * 2 * (6_979_321_856 - end) + 584**2 * 31 * 4 * 4096
    head = 3 * (2 * (4096 * 126464 + end) + 584 * 4 * 4096)  # three tokens a step
    assert flops.rollout == 128 * 128 * (row + head)
    assert flops.update / flops.scored_rows == pytest.approx(3 * (row + head), rel=1e-9)
    assert 0.9 * 128 * 24 < flops.scored_rows <= 128 * 24  # some draws of a rollout are equal
    # At 40 % of 989 TFLOP/s on 8 GPUs: 42 s, 23 s, and 10 minutes.
    rate = 8 * 0.4 * 989e12
    assert flops.rollout / rate == pytest.approx(42, abs=1)
    assert flops.update / rate == pytest.approx(23, abs=1)
    assert flops.evaluation / rate == pytest.approx(598, abs=5)
    whole, trained = parameters(settings)
    assert whole == trained == 8_015_581_184
    stored = disk(settings, rollout_bytes=flops.rollout_bytes)
    assert stored.checkpoint == 14 * whole
    assert stored.checkpoints == 4  # two, the best, and the one that is being written
    assert stored.rollouts == 60 * 128 * (384 * (8 + 8 + 3 * 4 + 4 * 150) + 16)


def test_evaluations_and_checkpoints_of_a_run():
    def made(iterations, every, **kept):
        words = [f"checkpoint.{name}={value}" for name, value in kept.items()]
        settings = tiny(f"train.iterations={iterations}", f"evaluation.interval={every}", *words)
        return evaluations_of(settings), disk(settings, rollout_bytes=10)

    assert [made(n, every)[0] for n, every in ((0, 5), (1, 5), (5, 5), (6, 5), (11, 0))] == [
        1, 2, 2, 3, 2
    ]  # fmt: skip
    assert made(100, 10, interval=10, keep=2)[1].checkpoints == 4
    assert made(100, 10, interval=10, keep=2, best="null")[1].checkpoints == 3
    assert made(100, 10, interval=10, keep_rollouts="true")[1].rollouts == 1000
    assert made(100, 10, interval=10)[1].rollouts == 100
    assert made(100, 10, interval=10, rollouts="false")[1].rollouts == 0
    assert made(0, 10)[1].checkpoints == made(0, 10)[1].rollouts == 0
    assert made(10, 10, interval=10)[1].checkpoints == 1  # one save ends the run, and is the best
    assert made(10, 5, interval=4, keep=9)[1].checkpoints == 4  # after 4, 5, 8 and 10
    assert made(10, 5, interval=0, keep=9, best="null")[1].checkpoints == 1  # only the last one


def test_checkpoints_of_the_supervised_phase_stay_during_reinforcement_learning():
    def at_one_time(supervised, iterations):
        words = [f"sft.iterations={supervised}", f"train.iterations={iterations}"]
        kept = ["checkpoint.interval=10", "checkpoint.keep=2", "evaluation.interval=0"]
        return disk(tiny(*words, *kept), rollout_bytes=0).checkpoints

    assert [at_one_time(n, 0) for n in (0, 1, 10, 25, 100)] == [0, 1, 1, 3, 3]
    assert [at_one_time(n, 10) for n in (0, 1, 10, 25, 100)] == [1, 2, 2, 3, 3]
    assert at_one_time(100, 100) == 2 + 3


def _supervised_flops(*overrides):
    return count_flops(tiny("sft.data=rows.jsonl", *overrides), [10], [10], [(20, 12), (3, 4)]).sft


def test_a_schedule_of_attention_is_counted_by_its_iterations():
    own = ["model.block_length=4", "sampling.block_length=4", "sampling.block_origin=row"]
    own += ["model.attention=block_causal", "sft.iterations=10"]
    settings, works = tiny(*own), [scored_work([32, 7], [6, 2])]
    for block in (1, 4):
        model = replace(settings.model, block_length=block)
        sampling = replace(settings.sampling, block_length=block)
        rows = [doubled_row(prompt, whole, model, sampling) for prompt, whole in ((20, 32), (3, 7))]
        works.append(pattern_work(rows, 6 + 2))
    update, batch = update_cost(settings.model, settings.lora), settings.sft.batch_size
    full, single, fours = (update.of(work) * batch / 2 for work in works)
    assert _supervised_flops(*own) == pytest.approx(fours, rel=1e-6)
    found = _supervised_flops("sft.block_schedule=[1x2,fullx3]", *own)
    assert found == pytest.approx((2 * single + 3 * full + 5 * fours) / 10, rel=1e-6)
    assert len({full, single, fours}) == 3


def test_annealing_counts_the_pairs_that_see_each_other():
    """Rows of 32 and 7 tokens; all layers take all queries, as in all rows of patterns."""
    settings = tiny("sft.iterations=5", "sft.anneal_iterations=4", "sft.data=rows.jsonl")
    update, batch = update_cost(settings.model, settings.lora), settings.sft.batch_size
    works = [
        pattern_work([ahead(32, share), ahead(7, share)], 6 + 2) for share in (0, 0.25, 0.5, 0.75)
    ]
    flops = [update.of(work) for work in (*works, scored_work([32, 7], [6, 2]))]
    found = _supervised_flops("sft.iterations=5", "sft.anneal_iterations=4")
    assert found == pytest.approx(sum(flops) / 5 * batch / 2, rel=1e-6)
    many = [
        _supervised_flops(f"sft.iterations={2 * n}", f"sft.anneal_iterations={n}") for n in (8, 800)
    ]
    assert many[1] == pytest.approx(many[0], rel=0.05)


def test_ids_of_raw_texts_count_as_disk():
    plain, texts = (disk(tiny(), rollout_bytes=1, text_tokens=n) for n in (0, 10**6))
    assert texts.texts == 4 * 10**6 and texts.total - plain.total == 4 * 10**6


def test_a_pair_takes_both_texts_under_each_mask_and_two_passes_without_gradient():
    """With three masks six rows for one, of 3 + 1 + 1 forward passes for 3: ten times as much."""
    single = ["sft.iterations=1", "sft.data=rows.jsonl"]
    pairs = [*single, "sft.loss=vrpo", "sft.preferences.masks=3"]
    flops = [
        count_flops(tiny(*overrides), [10], [10], [(20, 12)]).sft for overrides in (single, pairs)
    ]
    assert flops[1] == pytest.approx(10 * flops[0], rel=1e-3)
