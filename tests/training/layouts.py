"""Trainings that tests of layouts compare: from the same weights, at any layout."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from agrpo_megatron.estimators.losses import OF_TOKENS
from agrpo_megatron.families import FAMILIES
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.text.tokenizer import CHARACTERS
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.sft import run_sft
from tests.megatron.lora.whole import whole_adapters
from tests.ranks import run_ranks
from tests.training.tiny import open_session

FOUR_LAYERS = "model.num_layers=4"
# Without a baseline the loss is no difference of equal numbers. Adam divides by the root of its
# second moment: where a gradient is only rounding, an epsilon far above that keeps the step from
# being only rounding, too.
COMMON = [
    FOUR_LAYERS,
    f"tokenizer.path={CHARACTERS}",
    "sft.iterations=1",
    "algorithm.baseline=none",
    "optimizer.megatron.adam_eps=1e-4",
    "optimizer.clip_grad=0.5",
    "algorithm.prompts_per_iteration=2",
    "train.token_budget=45",  # three rows of 14 or 15 tokens: an odd number now and then
]
DISTRIBUTED = "optimizer.distributed=true"
RECOMPUTE = "model.megatron={recompute_granularity: full, recompute_method: uniform, %s}"


def make_start(tmp_path_factory, overrides):
    """Return a folder of random weights, drawn on one rank."""
    folder = tmp_path_factory.mktemp("start")
    run_ranks(1, write_start, folder, overrides)
    return folder


def write_start(folder, overrides):
    """Write random weights as a Hugging Face directory."""
    session, engine = open_session(FOUR_LAYERS, *overrides)
    model = session.run.settings.model
    named = {n: p.detach() for n, p in engine.network.named_weights()}
    save_file(export_hf(named, model, session.run.ranks), Path(folder) / "model.safetensors")
    config = FAMILIES[model.family].config(model)
    (Path(folder) / "config.json").write_text(json.dumps(config))


def train(folder, overrides):
    """Return completions, losses, gradient norms and trained weights.

    The second iteration samples with weights of the first, and its update has Adam's moments.
    """
    world_size = dist.get_world_size()
    load = f"model.load={folder}"
    session, engine = open_session(*COMMON, load, *overrides, world_size=world_size)
    run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    tokens, numbers = [], [session.output.log.records[0]]
    for iteration in range(2):
        rollout, _ = collect_rollout(session, engine, iteration)
        metrics, _ = update_policy(session, engine, rollout, None)
        tokens.append(rollout.trajectory.tokens)
        numbers.append(metrics)
    return outcome(session, engine, tokens, numbers)


def outcome(session, engine, tokens, numbers):
    """Return what `compare` reads, from the rollouts' tokens and the records of all phases."""
    engine.finish_parameters()
    weights = {name: p.detach() for name, p in engine.network.named_weights()}
    adapters = {} if engine.network.adapters is None else whole_adapters(engine.network)
    ratio = "ratio/max_error"
    # A token has a denoising step, at any layout; other units of a loss have none.
    algorithm = session.run.settings.algorithm.filled
    has_steps = algorithm.level == "token" and algorithm.loss in OF_TOKENS
    for record in numbers:
        assert ("by_step/ratio_error" in record) == (ratio in record and has_steps)
        if ratio in record and has_steps:
            parts = [error for error in record["by_step/ratio_error"] if error is not None]
            assert max(parts) == record[ratio]
    return {
        "tokens": tokens,
        "loss": [record["loss"] for record in numbers],
        "grad_norm": [record["grad_norm"] for record in numbers],
        "ratio error": max(record[ratio] for record in numbers if ratio in record),
        "weights": export_hf(weights, session.run.settings.model, session.run.ranks) | adapters,
    }


def run_at(layouts, name, function, folder, own, *more):
    """Return what each rank's `function` does at a layout, whose name begins with `parallel`.

    Args:
        layouts: number of ranks and overrides, by name.
        own: overrides at every layout.
    """
    size, overrides = layouts[name]
    layout = name.partition(" ")[0]
    return run_ranks(size, function, folder, [*own, f"parallel={layout}", *overrides], *more)


def compare(results, alone):
    for result in results:
        for ours, theirs in zip(result["tokens"], alone["tokens"], strict=True):
            assert torch.equal(ours, theirs)
        for key in ("loss", "grad_norm"):
            assert result[key] == pytest.approx(alone[key], rel=1e-5)
        assert result["ratio error"] < 1e-5
        for key, tensor in alone["weights"].items():
            assert float((result["weights"][key] - tensor).abs().max()) < 1e-5, key
