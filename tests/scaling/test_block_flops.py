"""FLOPs of block models: those of torch's counter, but that attention counts visible pairs only."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agrpo_megatron.diffusion.blocks import block_numbers, open_block
from agrpo_megatron.diffusion.patterns import block_causal, places_of, row_length, visible
from agrpo_megatron.megatron.layers import scored as scored_module
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.scaling.flops import completion_flops
from tests.ranks import run_ranks
from tests.training.tiny import open_session

BLOCKS = ["model.attention=block_causal", "model.block_length=4", "sampling.threshold=0.3"]
FROM_ROW, UNCACHED = "sampling.block_origin=row", "rollout.cached=false"
LENGTHS = (3, 6, 6, 4, 9)


def _count(overrides):
    """Return our count, torch's by operator, and visible pairs of all steps."""
    scored_module.LEAST_ROWS, scored_module.QUERY_MULTIPLE = 0, 1  # no row is filled up
    session, engine = open_session(*BLOCKS, *overrides)
    settings = session.run.settings
    prompts = [torch.arange(3, 3 + length) for length in LENGTHS]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trajectory, _ = sample_prompts(
            session.run,
            engine.network,
            prompts,
            torch.arange(len(prompts)),
            sampling=settings.sampling,
        )
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    ours = sum(completion_flops(trajectory, settings))
    pairs = _pairs(trajectory, settings)
    return ours, counted["aten.mm"], counted["aten.bmm"], 4 * pairs * 16 * 2


def _pairs(trajectory, settings):
    """Return how many pairs of tokens see each other, over all steps, by the definition."""
    is_cached, total, known = settings.rollout.cached is not False, 0, set()
    for number, prompt in enumerate(trajectory.prompts):
        when, blocks = trajectory.unmask_step[number], block_numbers(trajectory)[0][number]
        ran = sorted({int(blocks[when == step][0]) for step in range(trajectory.num_steps[number])})
        origin = 0 if trajectory.sampling.block_origin == "row" else len(prompt)
        for block in ran:
            start, end = open_block(len(prompt), block, trajectory.sampling)
            steps = len(
                set(when[(blocks == block) & (when < trajectory.num_steps[number])].tolist())
            )
            row = _visible(end, origin)
            if not is_cached:
                total += steps * int(row.sum())
                continue
            total += (steps + (block < ran[-1])) * int(row[start:].sum())
        context = open_block(len(prompt), 0, trajectory.sampling)[0]
        if is_cached and tuple(prompt.tolist()) not in known and context:
            known.add(tuple(prompt.tolist()))
            total += int(_visible(context, origin).sum())
    return total


def _visible(length, origin):
    row = block_causal(length, 4, origin=origin % 4)
    tokens = torch.arange(row_length(row))
    return visible(places_of([row], torch.device("cpu")), tokens[:, None], tokens[None])


@pytest.mark.parametrize("overrides", [[FROM_ROW], [], [FROM_ROW, UNCACHED], [UNCACHED]], ids=str)
def test_matrices_are_torchs_and_attention_is_of_visible_pairs(overrides):
    """Two layers, 16 wide. Torch counts the pairs that masks hide, too."""
    ours, products, attention, pairs = run_ranks(1, _count, overrides)[0]
    assert ours == products + pairs
    assert 0 < pairs <= attention
