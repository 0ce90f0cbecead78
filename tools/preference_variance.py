"""Print the noise of preference margins by the masks that estimate them, on a run with pairs.

VRPO estimates the log-likelihoods of a pair under the policy and the reference from a few masks.
This tool scores held-out pairs of a run many times, each time with other masks, and prints for
each way to draw them: the variance of a margin over the draws, and the mean loss less the loss at
the mean margin, which is the bias that this variance gives the log-sigmoid.

    python tools/preference_variance.py runs/preferences --pairs 16 --draws 40
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from agrpo_megatron.checkpoint.start import load_reference
from agrpo_megatron.cli.common import add_overrides, add_target, open_target
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.settings.preferences import PreferenceSettings
from agrpo_megatron.runs.progress import RUN_SETTINGS
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.training.preferences.loss import row_elbos
from agrpo_megatron.training.preferences.update import score_pairs
from agrpo_megatron.training.supervised.drawn import held_out_rows
from agrpo_megatron.training.variance.command import opened


class Line(NamedTuple):
    """A way to draw masks, and the noise of the margins of each pair that it gives."""

    way: PreferenceSettings
    margins: Tensor  # [draws, pairs]

    @property
    def variance(self) -> float:
        """Return the variance of a margin, mean over pairs."""
        return float(self.margins.var(0).mean())

    def bias(self, exact: Tensor) -> float:
        """Return the mean loss of pairs less the loss at their margins `exact`."""
        return float((F.softplus(-self.margins).mean(0) - F.softplus(-exact)).mean())


def measure(
    resolved: Resolved,
    checkpoint: Path | None,
    start: Settings,
    *,
    pairs: int,
    draws: int,
    masks: Sequence[int],
) -> list[Line]:
    """Score held-out pairs of a run `draws` times in each way, on one rank.

    Args:
        start: settings with which the run started: its start weights are the reference.

    Raises:
        ValueError: the run has no held-out pairs.
    """
    if resolved.supervised is None or not resolved.supervised.held_out:
        raise ValueError("the run has no held-out pairs; give it sft.eval_data and sft.loss=vrpo")
    ways = [
        PreferenceSettings(masks=count, states=states, shared_masks=is_shared)
        for is_shared, states, count in itertools.product(
            (False, True), ("random_count", "counts"), masks
        )
    ]
    with opened(resolved, checkpoint) as (session, engine, _):
        settings = session.run.settings
        own = replace(settings, model=start.model)
        reference = load_reference(own, engine.network, None)
        drawn = held_out_rows(session.run, resolved.supervised.held_out[:pairs])
        lines = []
        for way in track(ways, console=Console(stderr=True), transient=True):
            chosen = with_way(settings, way)
            rows = [
                score_pairs(engine.network, reference, drawn, chosen, first=0, seed=1 + number)
                for number in range(draws)
            ]
            gaps = [
                (row_elbos(found.logprobs, found.part.scored) - found.reference).sum(0)
                for found in rows
            ]
            margins = torch.stack([gap[:, 0] - gap[:, 1] for gap in gaps])
            lines.append(Line(way, settings.sft.preferences.beta * margins))
    return lines


def with_way(settings: Settings, way: PreferenceSettings) -> Settings:
    """Return settings that draw masks in a way."""
    return replace(settings, sft=replace(settings.sft, preferences=way))


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown; the last one's margins count as exact."""
    exact = lines[-1].margins.mean(0)
    rows = [
        "| masks | hidden tokens | shared | variance | bias of the loss |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        way = line.way
        shared = "yes" if way.shared_masks else "no"
        numbers = f"{line.variance:.3f} | {line.bias(exact):.4f}"
        rows.append(f"| {way.masks} | {way.states} | {shared} | {numbers} |")
    return "\n".join(rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_target(parser)
    parser.add_argument("--pairs", type=int, default=16, help="held-out pairs (16)")
    parser.add_argument("--draws", type=int, default=40, help="times that each is scored (40)")
    parser.add_argument("--masks", default="1,8", metavar="N,...", help="masks of a text (1,8)")
    add_overrides(parser)
    arguments = parser.parse_args()
    target = open_target(arguments)
    resolved = resolve(target.settings, world_size=1, phases=("sft",))
    masks = [int(word) for word in arguments.masks.split(",")]
    print(
        table(
            measure(
                resolved,
                target.checkpoint,
                load(Settings, Path(arguments.target) / RUN_SETTINGS),
                pairs=arguments.pairs,
                draws=arguments.draws,
                masks=masks,
            )
        )
    )


if __name__ == "__main__":
    main()
