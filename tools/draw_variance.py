"""Print the noise of drawn denoising steps on rollouts of a run, against the published sampler.

AGRPO scores a few drawn steps of each rollout in place of all of them. This tool samples a batch
from a checkpoint, computes the gradient of every step of every rollout, and from them, exactly
and without drawing, the variance of the gradient over the draws: for the published sampler
(stratified over a group, entropy proposal), for the defaults with equal draws of each rollout, and
for the defaults, which split as many draws by advantage. Intervals are of 95 %: percentiles over
2,000 resamples of the groups. Then it prints with how many draws each way is as precise as the
published sampler, and how many fewer states an update scores: the published code scores all draws
of all rollouts.

    python tools/draw_variance.py runs/tiny --checkpoint sft-000400 --output draws.png
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

from agrpo_megatron.cli.common import add_overrides, add_target, open_target
from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import draw_counts, live_of, proposal_of, rows_at
from agrpo_megatron.reports.plots import style
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.step import accumulate_gradients
from agrpo_megatron.training.update import packed_part, with_loss
from agrpo_megatron.training.variance.command import opened
from agrpo_megatron.training.variance.sketch import SIZE, gradient_sketch
from agrpo_megatron.types import StepDraws

sys.path.insert(0, str(Path(__file__).parent))
from estimator_variance import estimator_variance  # noqa: E402 - in this folder
from variance_cases import Case  # noqa: E402

RESAMPLES = 2000
EQUAL = {"allocation": "equal"}
PUBLISHED = EQUAL | {"step_sampler": "batch", "proposal": "entropy", "uniform_mix": 0.0}
WAYS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED | {"enumerate_short": False},
    "equal draws": EQUAL,
    "by advantage": {},
}


class Ratio(NamedTuple):
    """A variance over the published sampler's, and its bootstrap interval."""

    value: float
    low: float
    high: float


class Match(NamedTuple):
    """The fewest draws of a way that are as precise as the published sampler's."""

    draws: int  # of each rollout, on average
    states: float  # that the published update scores, over those that this way scores


def run_case(resolved: Resolved, checkpoint: Path | None) -> Case:
    """Sample a batch from a run's checkpoint, and sketch the gradient of every step.

    Inner products of sketches estimate those of gradients: a squared length within 1 %.
    """
    settings = resolved.settings
    with opened(resolved, checkpoint) as (session, engine, _):
        rollout, _ = collect_rollout(session, engine, settings.train.iterations)
        eos_id, trajectory = session.run.eos_id, rollout.trajectory
        live, most = live_of(trajectory, DrawContext(settings.algorithm, eos_id, 0))
        sketches = torch.zeros(len(live), most, SIZE, dtype=torch.float64)
        wanted = (torch.arange(most) < live[:, None]) & (rollout.advantages != 0)[:, None]
        for r, t in track(wanted.nonzero().tolist(), "gradients of steps"):
            one = StepDraws(torch.tensor([r]), torch.tensor([t]), torch.ones(1).double())
            part = packed_part(settings, engine.ranks, rollout, rows_at(trajectory, one))
            part, loss = with_loss(engine, part, rollout, settings, is_first=True)
            accumulate_gradients(engine, part.batches, loss=loss, examples=1)
            sketches[r, t] = gradient_sketch(engine)
    name = f"{len(live)} rollouts of up to {most} denoising steps"
    return Case(name, sketches, rollout, eos_id, settings.algorithm.group_size)


def group_variances(case: Case, algorithm: AlgorithmSettings) -> Tensor:
    """Return the variance by drawn steps that each group adds to the batch's gradient, [G]."""
    context = DrawContext(algorithm, case.eos_id, 0)
    trajectory, size = case.rollout.trajectory, case.group_size
    (live, _), proposal = live_of(trajectory, context), proposal_of(trajectory, context)
    counts = draw_counts(case.rollout, context)
    groups = [slice(first, first + size) for first in range(0, len(live), size)]
    return torch.stack(
        [
            estimator_variance(
                case.contributions[group],
                proposal[group],
                live=live[group],
                counts=counts[group],
                sampler=algorithm.step_sampler,
                group_size=size,
                enumerate_short=algorithm.enumerate_short,
            )
            for group in groups
        ]
    )


def ratio_of(ours: Tensor, published: Tensor) -> Ratio:
    """Return the ratio of summed variances [G], with an interval by resampling the groups."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ours), (RESAMPLES, len(ours)), generator=generator)
    drawn = ours[picks].sum(1) / published[picks].sum(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Ratio(float(ours.sum() / published.sum()), low, high)


def ratios(case: Case, draws: Sequence[int]) -> dict[str, dict[int, Ratio]]:
    """Return the ratio of each way to draw, by the number of draws."""
    found: dict[str, dict[int, Ratio]] = {way: {} for way in WAYS}
    for count in draws:
        variances = {
            way: group_variances(
                case, AlgorithmSettings(mc_samples=count, group_size=case.group_size, **changed)
            )
            for way, changed in WAYS.items()
        }
        for way, ours in variances.items():
            found[way][count] = ratio_of(ours, variances["published"])
    return found


def match(case: Case, way: str, published_draws: int) -> Match | None:
    """Return the fewest draws with at most the published variance; None: more than it draws."""
    size, rollouts = case.group_size, len(case.rollout.advantages)
    theirs = AlgorithmSettings(mc_samples=published_draws, group_size=size, **WAYS["published"])
    limit = float(group_variances(case, theirs).sum())
    for draws in range(1, published_draws + 1):
        algorithm = AlgorithmSettings(mc_samples=draws, group_size=size, **WAYS[way])
        if float(group_variances(case, algorithm).sum()) <= limit:
            context = DrawContext(algorithm, case.eos_id, 0)
            live, _ = live_of(case.rollout.trajectory, context)
            counts = draw_counts(case.rollout, context).minimum(live)
            states = int(counts[case.rollout.advantages != 0].sum())
            return Match(draws, rollouts * published_draws / states)
    return None


def write_figure(found: dict[str, dict[int, Ratio]], title: str, path: Path) -> Path:
    """Write the ratios and their intervals as a PNG at `path`; return the path."""
    return style.write_png(path, lambda theme: _figure(found, title, theme))


def _figure(found: dict[str, dict[int, Ratio]], title: str, theme: style.Theme) -> Figure:
    figure = style.new_figure(6.5, 3.6)
    axes = figure.subplots()
    style.dress(axes, title)
    colours = (theme.grey, theme.blue, theme.orange)
    for number, ((way, by_count), colour) in enumerate(zip(found.items(), colours, strict=True)):
        places = [place + 0.25 * (number - 1) for place in range(len(by_count))]
        values = [ratio.value for ratio in by_count.values()]
        axes.bar(places, values, width=0.22, color=colour, label=way)
        errors = [[r.value - r.low for r in by_count.values()]]
        errors.append([r.high - r.value for r in by_count.values()])
        axes.errorbar(places, values, errors, fmt="none", ecolor=theme.ink, capsize=3)
    axes.set_xticks(range(len(found["published"])), [f"k = {k}" for k in found["published"]])
    axes.set_ylabel("variance, of the published sampler's")
    axes.grid(visible=False, axis="x")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(found))
    return figure


def main() -> None:
    """Read the arguments, print a line for each way to draw, and write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_target(parser)
    parser.add_argument("--draws", type=int, nargs="+", default=[4, 8], metavar="K")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="also draw a figure")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if min(arguments.draws) < 1:
        sys.exit(
            f"draw_variance: error: --draws={min(arguments.draws)} must be at least 1; use 4 8"
        )
    try:
        target = open_target(arguments)
        resolved = resolve(target.settings, world_size=1)
    except ValueError as error:
        sys.exit(f"draw_variance: error: {error}")
    case = run_case(resolved, target.checkpoint)
    found = ratios(case, arguments.draws)
    console = Console()
    console.print(f"{case.name}: variance over the published sampler's")
    for way, by_count in found.items():
        cells = (f"k {k}: {r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for k, r in by_count.items())
        console.print(f"  {way:14}" + "   ".join(cells))
    for way, count in itertools.product(list(WAYS)[1:], arguments.draws):
        found_match = match(case, way, int(count))
        said = "more" if found_match is None else f"{found_match.draws}"
        fewer = "" if found_match is None else f", {found_match.states:.2f} times fewer states"
        console.print(f"as precise as {count} published draws, {way}: {said}{fewer}")
    if arguments.output is not None:
        console.print(str(write_figure(found, case.name, arguments.output)))


if __name__ == "__main__":
    main()
