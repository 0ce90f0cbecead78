"""Print how noisy the drawn denoising steps are, under every step sampler and proposal.

AGRPO scores a few drawn steps of each rollout in place of all of them. Draws can be spread in
several ways (`algorithm.step_sampler`), aimed by a proposal (`algorithm.proposal`) and split over
the rollouts (`algorithm.allocation`). All are unbiased; they differ in variance, and that is what
this tool computes, exactly and without drawing anything: the variance of the whole gradient, summed
over all weights, over the draws of one batch of stored rollouts. 1.00 is `independent` draws from
the `uniform` proposal, with as many draws; 0.50 is worth twice the draws. Lower is better.

Columns are numbers of draws (`algorithm.mc_samples`); * also scores short rollouts once in full
(`algorithm.enumerate_short`), which `distinct` always does. `entropy, mix 0` is the published
proposal, `batch` with it the published sampler; `entropy` and `gradient` mix in
`algorithm.uniform_mix` of uniform. The last rows split as many draws by advantage. The default is
green.

    python tools/variance.py --trajectories tests/fixtures/llada_tiny/golden.safetensors
    python tools/variance.py --draws 4 8 --steps 32 --unmasking low_confidence --seed 3
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agrpo_megatron.config.settings import STEP_SAMPLERS, UNMASKING, AlgorithmSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import draw_counts, live_of, proposal_of

sys.path.insert(0, str(Path(__file__).parent))
from estimator_variance import estimator_variance  # noqa: E402 - in this folder
from variance_cases import Case, sampled_case, stored_cases  # noqa: E402

DEFAULT = AlgorithmSettings()
# name: (proposal, share of uniform; None is the default of the settings)
PROPOSALS = {
    "uniform": ("uniform", 0.0),
    "entropy": ("entropy", None),
    "entropy, mix 0": ("entropy", 0.0),
    "gradient": ("gradient", None),
}


def variance_of(case: Case, proposal: str, *, mix: float, **drawing: Any) -> float:
    """Return the variance of one way to draw; `mix` stands where a proposal names none.

    Args:
        drawing: settings such as step_sampler, mc_samples, enumerate_short and allocation; equal
            draws of all rollouts unless it names another.
    """
    drawing = {"allocation": "equal", **drawing}
    kind, share = PROPOSALS[proposal]
    algorithm = AlgorithmSettings(
        proposal=kind,
        uniform_mix=mix if share is None else share,
        group_size=case.group_size,
        **drawing,
    )
    context = DrawContext(algorithm, case.eos_id, 0)
    live, _ = live_of(case.rollout.trajectory, context)
    variance = estimator_variance(
        case.contributions,
        proposal_of(case.rollout.trajectory, context),
        live=live,
        counts=draw_counts(case.rollout, context),
        sampler=algorithm.step_sampler,
        group_size=case.group_size,
        enumerate_short=algorithm.enumerate_short,
    )
    return float(variance)


def print_table(case: Case, *, draws: list[int], mix: float, console: Console) -> None:
    """Print one case: a row per sampler and proposal, a column per number of draws."""
    table = Table(title=case.name, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("step sampler", no_wrap=True)
    table.add_column("proposal", no_wrap=True)
    columns = [(count, short) for short in (False, True) for count in draws]
    for count, short in columns:
        table.add_column(f"k={count}{'*' if short else ''}", justify="right", no_wrap=True)
    plain = {"step_sampler": "independent", "enumerate_short": False}
    units = {
        count: variance_of(case, "uniform", mix=mix, mc_samples=count, **plain) for count in draws
    }
    ways = [*itertools.product(reversed(STEP_SAMPLERS), ["equal"]), ("distinct", "advantage")]
    for (sampler, allocation), proposal in itertools.product(ways, PROPOSALS):
        cells = []
        for count, short in columns:
            drawing = {"step_sampler": sampler, "mc_samples": count, "allocation": allocation}
            value = variance_of(case, proposal, mix=mix, enumerate_short=short, **drawing)
            cells.append(f"{value / units[count]:.2f}" if units[count] > 0 else "-")
        is_default = (sampler, allocation, proposal) == (
            DEFAULT.step_sampler,
            DEFAULT.allocation,
            DEFAULT.proposal,
        )
        name = sampler if allocation == "equal" else "by advantage"
        last, style = proposal == list(PROPOSALS)[-1], "bold green" if is_default else None
        table.add_row(name, proposal, *cells, style=style, end_section=last)
    console.print(table)


def main() -> None:
    """Read the arguments and print one table for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trajectories",
        type=Path,
        metavar="FILE.safetensors",
        help="stored rollouts `agrpo.N.*`, with golden.json and hf/ next to it; without a file, "
        "rollouts are sampled from a random model (seconds)",
    )
    add = parser.add_argument
    add("--draws", type=int, nargs="+", default=[2, 4, 6, 8], metavar="K", help="draws per rollout")
    add("--steps", type=int, default=16, metavar="T", help="denoising steps of sampled rollouts")
    add("--unmasking", choices=UNMASKING, default="random", help="rule of the sampled rollouts")
    mix = DEFAULT.uniform_mix
    add("--uniform-mix", type=float, default=mix, metavar="SHARE", help=f"default {mix}")
    add("--seed", type=int, default=0, help="seed of the sampled rollouts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.trajectories
    if path is not None and not path.is_file():
        sys.exit(f"--trajectories {path}: no such file; give a .safetensors file of rollouts")
    cases = (
        stored_cases(path)
        if path
        else [sampled_case(arguments.unmasking, arguments.seed, steps=arguments.steps)]
    )
    for case in cases:
        print_table(case, draws=arguments.draws, mix=arguments.uniform_mix, console=Console())


if __name__ == "__main__":
    main()
