"""Print the bias of every estimator, on a policy so small that its rollouts can be listed.

The policy is a table of logits for each partially masked state (tests/diffusion/toy.py): three
tokens, three ids, one token per denoising step in random order. All its rollouts are listed with
their probabilities, so the gradient of the expected reward is exact. An estimator's expected
gradient is the sum over all rollouts of probability times its gradient; the masks that it draws are
averaged over many seeds.

Columns, each on two parameterisations: `table` has logits of its own for every state, `shared` has
12 numbers from which all states' logits follow, as a network's do.

  angle   between expected and exact gradient, in degrees: 0 is right, 90 has nothing to do with it
  noise   the same angle between two halves of the seeds: an angle below it is not measured
  rows    forward passes with gradient, per completion

    python tools/estimator_bias.py
    python tools/estimator_bias.py --seeds 2000 --markdown
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.config.settings.estimators import ENTRIES
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.objective import Tables, joint_loss
from agrpo_megatron.estimators.table import scored_rows
from agrpo_megatron.types import Rollout, ScoredRows, Trajectory
from tests.diffusion.toy import Toy, enumerate_trajectories, take

FEATURES = 12
# Its loss takes pairs: of a group's completions, or of softmaxes over them.
OF_PAIRS = ("vrpo", "wd1")
VARIANTS: dict[str, dict[str, Any]] = {name: {"name": name} for name in ENTRIES} | {
    "step_merge": {"name": "step_merge", "mc_samples": 2},
    "tracerl": {"name": "tracerl", "merge_steps": 2},
    "egspo": {"name": "egspo", "mc_samples": 2},
    "rldf": {"name": "rldf", "mc_samples": 2},
    "agrpo": {"name": "agrpo", "mc_samples": 2, "enumerate_short": False},
}


@dataclass(frozen=True)
class Case:
    """The toy, its exact gradient, and the rollouts that an estimator sees."""

    toy: Toy
    table: Tensor  # [states, length, ids] logits
    sampling: SamplingSettings
    features: Tensor  # [states * length * ids, FEATURES]: of `shared`
    exact: Tensor  # gradient of the expected reward by the table


def make_case(unmasking: str = "random", seed: int = 0) -> Case:
    """Return the toy with a random policy and a random reward."""
    toy = Toy()
    table = toy.table(seed).requires_grad_()
    sampling = SamplingSettings(
        completion_length=toy.length,
        block_length=toy.length,
        denoising_steps=toy.length,
        unmasking=unmasking,
    )
    listed = enumerate_trajectories(table, toy, sampling)
    expected = (listed.probability * toy.rewards(listed.trajectory.tokens)).sum()
    (exact,) = torch.autograd.grad(expected, table)
    generator = torch.Generator().manual_seed(seed + 1)
    features = torch.randn(table.numel(), FEATURES, generator=generator, dtype=table.dtype)
    return Case(toy, table.detach(), sampling, features, exact)


def expected_gradient(
    case: Case, changed: dict[str, Any], *, seeds: int, seed: int = 0
) -> tuple[Tensor, float]:
    """Return an estimator's expected ascent direction by the table, and its rows per rollout."""
    listed = enumerate_trajectories(case.table, case.toy, case.sampling)
    probability = listed.probability
    is_paired = changed["name"] in OF_PAIRS
    algorithm = AlgorithmSettings(group_size=2, baseline="mean" if is_paired else "none")
    algorithm = replace(algorithm, **changed)
    number = torch.arange(len(probability))
    if is_paired:
        number = torch.cartesian_prod(number, number).flatten()
        probability = probability[number].view(-1, 2).prod(1).repeat_interleave(2)
    count = len(number)
    rows = number.repeat(seeds)
    trajectory = take(listed.trajectory, rows)
    chance = probability.repeat(seeds) * count
    rewards = case.toy.rewards(trajectory.tokens)
    mean = (listed.probability * case.toy.rewards(listed.trajectory.tokens)).sum()
    gains = advantages(rewards, algorithm) if is_paired else rewards - mean
    if algorithm.name != "vrpo":
        gains = gains * chance
    rollout = Rollout(trajectory, rewards, gains > 0, gains)
    scored = scored_rows(rollout, DrawContext(algorithm, case.toy.eos_id, seed))
    if algorithm.name == "vrpo":  # of a pair, not of an advantage
        scored = replace(scored, weight=scored.weight * chance[scored.rollout, None])
    return gradient(case, scored, trajectory, rollout, algorithm), len(scored.rollout) / len(rows)


def gradient(
    case: Case,
    scored: ScoredRows,
    trajectory: Trajectory,
    rollout: Rollout,
    algorithm: AlgorithmSettings,
) -> Tensor:
    """Return the ascent direction of the mean loss over rollouts, on the sampler's own weights."""
    toy, table = case.toy, case.table.clone().requires_grad_()
    tokens = trajectory.tokens[scored.rollout]
    state = toy.state_index(tokens.masked_fill(scored.hidden, toy.mask_id))
    logprobs = table[..., : toy.tokens].log_softmax(-1)[state]
    values = logprobs.gather(2, tokens[:, :, None]).squeeze(2)
    known = values.detach()
    _, slopes = joint_loss(scored, Tables(known, known, known), rollout, algorithm)
    (result,) = torch.autograd.grad(-(values * slopes.logprobs).sum(), table)
    return result / len(rollout.rewards)


def angle(one: Tensor, other: Tensor) -> float:
    """Return the angle between two gradients, in degrees."""
    norms = one.norm() * other.norm()
    cosine = float((one * other).sum() / norms) if norms > 0 else 0.0
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def measured(case: Case, changed: dict[str, Any], *, seeds: int) -> list[float]:
    """Return angle and noise on the table, the same on shared parameters, and rows."""
    halves = [
        expected_gradient(case, changed, seeds=max(1, seeds // 2), seed=seed) for seed in (0, 1)
    ]
    (first, rows), (second, _) = halves
    cells: list[float] = []
    views: list[Callable[[Tensor], Tensor]] = [
        lambda g: g.flatten(),
        lambda g: g.flatten() @ case.features,
    ]
    for view in views:
        cells.append(angle(view(first + second), view(case.exact)))
        cells.append(angle(view(first), view(second)) / 2)
    return [*cells, rows]


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=200, metavar="N", help="draws per rollout (default 200)")
    add("--markdown", action="store_true", help="print a table for a document")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: make_case(name) for name in ("random", "leftmost")}
    columns = ["estimator", "angle, table", "noise", "angle, shared", "noise", "rows"]
    table = Table(*columns, box=SIMPLE_HEAD)
    if arguments.markdown:
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, changed in VARIANTS.items():
        case = cases["leftmost" if name.endswith("just_grpo") else "random"]
        seeds = max(2, arguments.seeds // (50 if name in OF_PAIRS else 1))
        *angles, rows = measured(case, changed, seeds=seeds)
        cells = [name, *(f"{value:.1f}" for value in angles), f"{rows:.2g}"]
        table.add_row(*cells)
        if arguments.markdown:
            print("| `" + cells[0] + "` | " + " | ".join(cells[1:]) + " |")
    if not arguments.markdown:
        Console().print(table)


if __name__ == "__main__":
    main()
