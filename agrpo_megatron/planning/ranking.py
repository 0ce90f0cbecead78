"""All layouts of a model on a cluster: those that fit, fastest first, and why others do not."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agrpo_megatron.config.parallel import layout_name
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.passes import for_model
from agrpo_megatron.planning.presets import Model
from agrpo_megatron.planning.seconds import Iteration, iteration
from agrpo_megatron.scaling.forecast.work import Flops, count_flops
from agrpo_megatron.scaling.layouts import layouts
from agrpo_megatron.scaling.memory import SPARE, Memory, worst_rank

GIB = 2**30
VIRTUAL = 4  # most virtual stages that are tried
SOME = 3  # decimal digits in which two times are equal


@dataclass(frozen=True)
class Candidate:
    """A legal layout."""

    name: str
    settings: Settings
    memory: Memory  # of the fullest rank
    iteration: Iteration
    fits: bool

    @property
    def seconds(self) -> float:
        """Return the seconds of an iteration."""
        return self.iteration.times.total


@dataclass(frozen=True)
class Ranking:
    """All layouts of a model on a cluster."""

    model: Model
    cluster: Cluster
    flops: Flops
    fitting: list[Candidate]  # fastest first
    too_large: list[Candidate]  # least memory first
    illegal: Counter[str]  # layouts by the rule that refuses them


def rank_layouts(
    model: Model, cluster: Cluster, *, only: ParallelSettings | None = None
) -> Ranking:
    """Return all layouts of a model on a cluster.

    Args:
        only: rank this layout alone.

    Raises:
        ValueError: `only` is refused by a rule.
    """
    flops, of = (
        count_flops(model.settings, model.prompts, ()),
        for_model(cluster, model.settings.model),
    )
    every = [only] if only is not None else _tried(model.settings, cluster.ranks)
    found, illegal = list[Candidate](), Counter[str]()
    for parallel in every:
        settings = with_layout(model, parallel)
        try:
            validate(settings, cluster.ranks)
        except ValueError as error:
            if only is not None:
                raise
            illegal[_rule(str(error))] += 1
            continue
        memory = worst_rank(settings, cluster.ranks)
        found.append(candidate(settings, flops, of, memory, prompts=model.prompts))
    return Ranking(
        model,
        cluster,
        flops,
        fitting=ordered(one for one in found if one.fits),
        too_large=sorted((c for c in found if not c.fits), key=lambda c: c.memory.total),
        illegal=illegal,
    )


def candidate(
    settings: Settings, flops: Flops, cluster: Cluster, memory: Memory, *, prompts: Sequence[int]
) -> Candidate:
    """Return a layout with its times.

    Args:
        memory: of its fullest rank.
        prompts: tokens of some prompts; they stand for all.
    """
    ran = iteration(settings, flops, cluster, memory, prompts=prompts)
    fits = memory.total < SPARE * cluster.device.memory * GIB
    return Candidate(layout_name(settings.parallel, cluster.ranks), settings, memory, ran, fits)


def with_layout(model: Model, parallel: ParallelSettings) -> Settings:
    """Return the settings of a model with a layout, and the source's layout of the rollouts."""
    rollout = replace(model.settings.rollout, parallel=model.rollout_layout)
    return replace(model.settings, parallel=parallel, rollout=rollout)


def ordered(found: Iterable[Candidate]) -> list[Candidate]:
    """Return layouts fastest first; of equally fast ones, that with the least memory first."""
    return sorted(found, key=lambda c: (float(f"{c.seconds:.{SOME}g}"), c.memory.total))


def _tried(settings: Settings, ranks: int) -> list[ParallelSettings]:
    return list(layouts(settings.model, ranks=ranks, most_virtual=VIRTUAL, plain_too=True))


def _rule(error: str) -> str:
    """Return the rule of an error, without the value that differs from layout to layout."""
    key, _, rest = error.partition("=")
    value, _, why = rest.partition(" ")
    return f"{key} {why.partition(';')[0]}" if value else error
