"""Measure the bubble of rollouts under a pipeline: lockstep against ring.

    torchrun --standalone --nproc-per-node 4 tools/bubble.py
    torchrun --standalone --nproc-per-node 2 tools/bubble.py --groups 4,16 --parallel pp2-vpp2

A random model samples the same rows with both schedules. A slot is the forward pass of one group
of rows on one stage; the bubble is the share of slots in which a stage is idle. Seconds are of the
whole rollout and mean little if ranks share processor cores. Exit status 1 when the tokens of
the two schedules differ, 2 for wrong input.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import torch

from agrpo_megatron.config.parallel import layout_name
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import RolloutSettings, Settings
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks, world_size
from agrpo_megatron.megatron.pipeline import make_forward
from agrpo_megatron.megatron.weights import initialise

MODEL = [
    "model.num_layers=8",
    "model.hidden_size=128",
    "model.ffn_hidden_size=384",
    "model.vocab_size=1000",
    "model.mask_token_id=999",
    "model.eos_token_id=998",
    "model.init_std=0.1",
    "sampling.completion_length=64",
    "sampling.block_length=32",
    "sampling.early_end=false",
    "run.threads=1",
]
PROMPT = 32  # tokens
SCHEDULES = ("lockstep", "ring")


@dataclass(frozen=True)
class Measured:
    """One rollout of all rows."""

    tokens: torch.Tensor
    bubble: float
    seconds: float


def main() -> int:
    """Measure each number of groups with both schedules; returns the exit status."""
    arguments = _arguments()
    parallel = arguments.parallel or f"pp{world_size()}"
    overrides = [*MODEL, f"parallel={parallel}", f"sampling.denoising_steps={arguments.steps}"]
    try:
        counts = [int(text) for text in arguments.groups.split(",")]
        settings = load(Settings, None, overrides)
        validate(settings, world_size())
        if settings.parallel.pipeline == 1 or min(counts) < 1:
            raise ValueError(
                f"--parallel {parallel} --groups {arguments.groups}: needs pp2 or more"
            )
    except ValueError as error:
        print(f"bubble: error: {error}", file=sys.stderr)
        return 2
    ranks = start_ranks(settings)
    network = build_network(settings, ranks)
    initialise(network, settings.model, 0)
    is_same = True
    if ranks.is_main:
        name = layout_name(settings.parallel, world_size())
        print(f"{name}, {arguments.rows} rows, {arguments.steps} denoising steps")
        print(f"{'groups':>6}  " + "  ".join(f"{s + ' bubble':>15} {'s':>6}" for s in SCHEDULES))
    for groups in counts:
        found = [_measure(network, settings, groups, s, arguments.rows) for s in SCHEDULES]
        is_same = is_same and torch.equal(found[0].tokens, found[1].tokens)
        if ranks.is_main:
            parts = [f"{m.bubble:>15.1%} {m.seconds:>6.2f}" for m in found]
            print(f"{groups:>6}  " + "  ".join(parts))
    if ranks.is_main:
        print(f"tokens {'identical' if is_same else 'DIFFER'} under both schedules")
    stop_ranks()
    return 0 if is_same else 1


def _measure(
    network: Network, settings: Settings, groups: int, schedule: str, rows: int
) -> Measured:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 900, (rows, PROMPT), generator=generator).to(network.ranks.device)
    model = settings.model
    assert model.mask_token_id is not None
    rollout = RolloutSettings(schedule=schedule, groups=groups)
    forward = make_forward(network, rollout, sampling=settings.sampling)
    context = SamplerContext(
        forward=forward,
        vocab=network.vocab,
        mask_id=model.mask_token_id,
        eos_id=model.eos_token_id,
        seed=0,
        token_budget=1 << 20,
    )
    started = time.perf_counter()
    ids = torch.arange(rows, device=prompts.device)
    trajectory = sample(list(prompts), ids, context=context, sampling=settings.sampling)
    seconds = time.perf_counter() - started
    return Measured(trajectory.tokens, forward.slots.bubble, seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="4,16", metavar="N,N", help="in flight (4,16)")
    parser.add_argument("--rows", type=int, default=32, help="completions to sample (32)")
    parser.add_argument("--steps", type=int, default=32, help="denoising steps (32)")
    parser.add_argument("--parallel", metavar="LAYOUT", help="such as pp2-vpp2; all ranks: ppN")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
