"""Layouts agree: tensor, sequence and data parallelism change no number beyond rounding."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.training.sft import run_sft
from tests.ranks import run_ranks
from tests.training.tiny import open_session

# Adam divides by the root of its second moment: where a gradient is only rounding, an epsilon
# far above that keeps the step from being only rounding, too.
SFT = [
    "sft.iterations=3",
    "sft.batch_size=7",
    "sft.optimizer.learning_rate=1e-2",
    "sft.optimizer.weight_decay=0.1",
    "sft.optimizer.megatron.adam_eps=1e-4",
    "sft.optimizer.clip_grad=0.5",
    "train.token_budget=45",  # three rows of 14 or 15 tokens: an odd number now and then
    "model.qk_norm=true",
    "model.qkv_bias=true",
]
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2 with sequence parallelism": ["parallel.tensor=2", "parallel.sequence=true"],
    "dp2": [],
    "dp2 with the distributed optimizer": ["sft.optimizer.distributed=true"],
}


def _train(overrides):
    """Return packed sizes, the logits of the first forward, records, and the trained weights."""
    world = dist.get_world_size()
    session, engine = open_session(*SFT, *overrides, world_size=world, phase="sft")
    ranks, seen = session.ranks, []

    def remember(_module, args, output):
        shards = [torch.empty_like(output) for _ in range(ranks.tensor_size)]
        dist.all_gather(shards, output.detach(), group=ranks.tensor_group)
        logits = torch.cat(shards, -1)[:, : session.settings.model.vocab_size]
        seen.append((len(args[0].tokens), logits))

    start = [parameter.detach().clone() for parameter in engine.network.parameters()]
    hook = engine.network.register_forward_hook(remember)
    run_sft(session, engine, start=0, after=lambda _: None)
    hook.remove()
    weights = {name: p.detach() for name, p in engine.network.named_parameters()}
    return {
        "sizes": [size for size, _ in seen],
        "logits": seen[0][1],
        "records": session.log.records,
        "moved": max(
            float((p - q).detach().abs().max())
            for p, q in zip(engine.network.parameters(), start, strict=True)
        ),
        "weights": export_hf(weights, session.settings.model, ranks),
    }


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _train, [])[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_optimizer_steps_equal_those_of_one_rank(alone, name):
    """Worst differences seen: see the bounds; losses and norms relative, weights absolute."""
    for result in run_ranks(2, _train, LAYOUTS[name]):
        for ours, theirs in zip(result["records"], alone["records"], strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
            assert ours["scored_tokens"] == theirs["scored_tokens"]
        for key, tensor in alone["weights"].items():
            assert float((result["weights"][key] - tensor).abs().max()) < 1e-5, key
        if "dp" not in name:
            assert result["sizes"] == alone["sizes"]
            assert any(size % 2 for size in result["sizes"])
            assert float((result["logits"] - alone["logits"]).abs().max()) < 1e-5


def test_the_steps_that_layouts_are_compared_by_are_clipped_and_move_the_weights(alone):
    assert all(record["grad_norm"] > 0.5 for record in alone["records"])
    assert alone["moved"] > 1e-2
