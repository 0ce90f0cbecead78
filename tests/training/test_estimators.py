"""Every estimator: the loss and gradient of one rank under each layout and micro-batch budget."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.config.rules.algorithm import OF_LOSSES, validate_algorithm
from agrpo_megatron.config.rules.blocks import ACROSS
from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.config.settings.estimators import ENTRIES
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.test_layouts import BLOCK_MODEL
from tests.training.tiny import open_session

# Without a baseline a loss is no difference of equal numbers; a large epsilon keeps Adam from
# dividing rounding by rounding.
COMMON = [
    "model.num_layers=4",
    "sampling.block_length=1",
    "sampling.denoising_steps=8",
    "model.eos_token_id=39",
    "algorithm.mc_samples=null",
    "train.token_budget=400",
    "algorithm.group_size=3",
    "algorithm.prompts_per_iteration=2",
    "optimizer.megatron.adam_eps=1e-2",
]
LAYOUTS = {
    "other micro-batches": (1, ["train.token_budget=40"]),
    "tp2": (2, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2"]),
    "cp2": (2, ["parallel=cp2"]),
    "dp2": (2, []),
}
BLOCKS = [*BLOCK_MODEL, "sampling.block_length=4", "sampling.block_origin=row"]
OF_BLOCKS = ("tp2", "pp2")  # tests/training/test_blocks.py has other micro-batches
OWN = Path(__file__).parents[2] / "examples" / "my_estimator.py"
# Of the first gradient, relative; tensor parallelism sums other parts in float32.
BOUNDS = dict.fromkeys(LAYOUTS, 1e-6) | {"tp2": 3e-6}
FEW = {"mc_samples": 3}
OF_TURNS = {"unmasking": "entropy", "block_length": 4, "position_temperature": 0.5}
ALL_DRAWN = {"unmasking": "low_confidence", "block_length": 4, "record_drawn": True}
VARIANTS: dict = {name: {"name": name} for name in ENTRIES} | {
    "agrpo": {"name": "agrpo", **FEW},
    "just_grpo": {"name": "just_grpo", "sampling": {"unmasking": "leftmost"}},
    "bgpo": {"name": "bgpo", **FEW},
    "vrpo": {"name": "vrpo", **FEW},
    "step_merge": {"name": "step_merge", **FEW},
    "agrpo by sequence": {"name": "agrpo", **FEW, "level": "sequence", "length_scale": True},
    "agrpo by step, with a bonus": {"name": "agrpo", **FEW, "level": "row", "entropy_bonus": 0.1},
    "agrpo, corrected": {"name": "agrpo", **FEW, "rollout_correction": 2.0, "clip": "dual"},
    "coupled_grpo with the full mask": {"name": "coupled_grpo", "states": "coupled_and_full"},
    "unigrpo to the old policy": {"name": "unigrpo", "kl_target": "old", "kl_sum": True},
    "espo, k2": {"name": "espo", "kl": "k2"},
    "egspo, KL over the vocabulary": {"name": "egspo", "kl": "exact"},
    "agrpo, KL over the vocabulary": {"name": "agrpo", "kl": "exact"},
    "vrpo without tails": {"name": "vrpo", "tail": "first", "cut_tail": True},
    "all drawn tokens of drawn steps": {
        "name": "agrpo",
        "mc_samples": 2,
        "scoring": "augmented",
        "normaliser": "tokens",
        "sampling": ALL_DRAWN | {"threshold": 0.2},
    },
    "all drawn tokens by step": {"name": "cj_grpo", "scoring": "augmented", "sampling": ALL_DRAWN},
    "drawn positions of drawn steps": {
        "name": "agrpo",
        "mc_samples": 2,
        "scoring": "positions",
        "kl_sum": True,
        "entropy_bonus": 0.1,
        "sampling": OF_TURNS | {"denoising_steps": 4},
    },
    "of the user": {"name": f"{OWN}:suffixes", "loss": f"{OWN}:soft_clip"},
}


def _norm(tensors):
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())


def _settings(base, changed):
    """Return the settings of a variant: its algorithm, and its sampler."""
    sampling = replace(base.sampling, **changed.get("sampling", {}))
    settings = replace(base, algorithm=_algorithm(base.algorithm, changed), sampling=sampling)
    validate_algorithm(settings.algorithm, sampling)
    return settings


def _algorithm(base, changed):
    changed = {name: value for name, value in changed.items() if name != "sampling"}
    algorithm = replace(base, **{"updates_per_iteration": 2, "baseline": "none", **changed})
    loss = str(algorithm.filled.loss)
    algorithm = replace(algorithm, kl_coefficient=0.1 if loss in OF_LOSSES["kl"] else 0.0)
    return replace(algorithm, baseline="mean") if loss == "preference" else algorithm


def _rollout(session, engine, sampled):
    """Return the rollouts of a variant, sampled once for all variants of a sampler.

    Variants differ in advantages only. Called with the start weights.
    """
    settings = session.run.settings
    if settings.sampling not in sampled:
        sampled[settings.sampling], _ = collect_rollout(session, engine, 0)
    rollout = sampled[settings.sampling]
    return replace(rollout, advantages=advantages(rollout.rewards, settings.algorithm))


def _update(session, engine, changed, sampled):
    """Return loss and gradients of two updates, from the same weights each time."""
    run = session.run
    engine.init_main_weights(load_start_weights(engine.network, run.settings) or {})
    for group in engine.optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            engine.optimizer.optimizer.state.pop(parameter, None)
    settings = _settings(run.settings, changed)
    session = replace(session, run=replace(run, settings=settings))
    rollout = _rollout(session, engine, sampled)
    reference = None
    if settings.algorithm.needs_reference:
        reference = build_network(settings, run.ranks)
        load_start_weights(reference, settings)
        for _, parameter in reference.named_parameters():
            parameter.data.mul_(0.9)
    found, own = [], engine.optimizer.step

    def step():
        grads = {n: p.main_grad.clone() for n, p in engine.network.named_parameters()}
        found.append(export_hf(grads, settings.model, run.ranks))
        return own()

    engine.optimizer.step = step
    metrics, _ = update_policy(session, engine, rollout, reference)
    del engine.optimizer.step
    return found, metrics


def _nothing(overrides):
    """Return what updates on rollouts of equal rewards report, by variant."""
    session, engine = open_session(*COMMON, *overrides, world_size=dist.get_world_size())
    results, sampled = {}, {}
    for name, changed in VARIANTS.items():
        settings = _settings(session.run.settings, changed)
        algorithm = replace(settings.algorithm, kl_coefficient=0.0, entropy_bonus=0.0)
        settings = replace(settings, algorithm=algorithm)
        of_variant = replace(session, run=replace(session.run, settings=settings))
        rollout = _rollout(of_variant, engine, sampled)
        equal = torch.zeros_like(rollout.rewards)
        rollout = replace(rollout, rewards=equal, advantages=equal)
        results[name], _ = update_policy(of_variant, engine, rollout, engine.network)
    return results


def _all(overrides, but=()):
    """Return gradients and metrics of two updates, by variant, except for some."""
    session, engine = open_session(*COMMON, *overrides, world_size=dist.get_world_size())
    sampled = {}
    return {
        name: _update(session, engine, changed, sampled)
        for name, changed in VARIANTS.items()
        if name not in but
    }


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _all, [])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(alone, layout):
    size, overrides = LAYOUTS[layout]
    _compare(run_ranks(size, _all, overrides), alone, BOUNDS[layout])


@pytest.fixture(scope="module")
def blocks_alone():
    return run_ranks(1, _all, BLOCKS, ACROSS)[0]


@pytest.mark.parametrize("layout", OF_BLOCKS)
def test_the_layout_changes_nothing_of_a_block_model(blocks_alone, layout):
    size, overrides = LAYOUTS[layout]
    _compare(run_ranks(size, _all, [*BLOCKS, *overrides], ACROSS), blocks_alone, BOUNDS[layout])


def _compare(ranks, alone, bound):
    for results in ranks:
        assert results.keys() == alone.keys()
        for name, (grads, metrics) in results.items():
            expected, whole = alone[name]
            for number, (ours, theirs) in enumerate(zip(grads, expected, strict=True)):
                error = _norm({n: ours[n] - theirs[n] for n in theirs}) / _norm(theirs)
                assert error < (1e-5 if number else bound), (name, number, error)
            for key in ("loss", "rows", "scoring_rows", "kl", "clip_fraction", "ratio/mean"):
                assert metrics[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6), (name, key)


def test_each_estimator_moves_the_policy_and_counts_its_passes(alone):
    """Passes without gradient: of the old policy before a second update, and of the reference."""
    for name, (grads, metrics) in alone.items():
        assert all(
            float(torch.stack([g.norm() for g in part.values()]).sum()) > 0 for part in grads
        )
        algorithm = _algorithm(AlgorithmSettings(), VARIANTS[name])
        assert metrics["scoring_rows"] >= algorithm.needs_reference * metrics["rows"], name
        assert metrics["ratio/mean"] != 1.0, name
        if "sampling" in VARIANTS[name]:  # the sampler recorded all that is scored
            assert metrics["ratio/max_error"] < 1e-5, name


def test_rollouts_of_equal_rewards_give_no_gradient_and_no_error():
    for name, metrics in run_ranks(2, _nothing, [])[0].items():
        assert metrics["grad_norm"] == 0 and metrics["loss"] == 0, name
