"""Why the first layout is the first, and what would put another one there."""

from dataclasses import astuple, dataclass, replace

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.passes import for_model
from agrpo_megatron.planning.ranking import Candidate, Ranking, candidate, ordered
from agrpo_megatron.planning.seconds import Times
from agrpo_megatron.reports.text import duration
from agrpo_megatron.scaling.flops import Work
from agrpo_megatron.scaling.forecast.work import Flops

# Parts of an iteration that a reason adds up.
PARTS = {
    "products and reads": ("rollout", "update"),
    "communication within the model": ("rollout_exchange", "update_exchange"),
    "pipeline bubbles": ("rollout_bubble", "update_bubble"),
    "exchange of gradients and weights": ("gradients", "reshard"),
    "optimizer and the rest": ("optimizer", "rest"),
}
LEAST = 0.005  # of an iteration: smaller differences are no reason
TIMES = 4  # by which a scenario changes a figure


@dataclass(frozen=True)
class Scenario:
    """An assumption that is changed, and the first layout under it."""

    text: str
    first: Candidate
    earlier: Candidate  # the first layout of the plan, under the same assumption


def differences(first: Candidate, other: Candidate) -> dict[str, float]:
    """Return the seconds by which another layout is slower, by part; parts that matter, sorted."""
    found = {
        name: _sum(other.iteration.times, parts) - _sum(first.iteration.times, parts)
        for name, parts in PARTS.items()
    }
    matter = {name: gain for name, gain in found.items() if abs(gain) > LEAST * first.seconds}
    return dict(sorted(matter.items(), key=lambda pair: -abs(pair[1])))


def comparison(first: Candidate, other: Candidate) -> str:
    """Return why a layout is before another one, as a line of text."""
    slower = other.seconds - first.seconds
    said = f"{100 * slower / first.seconds:.1f} % faster than {other.name}"
    if abs(slower) < LEAST * first.seconds:
        said = f"as fast as {other.name}"
        parts = "" if first.memory.total > other.memory.total else ", with less memory"
        return said + parts
    parts = [
        f"{duration(abs(gain))} {'less' if gain > 0 else 'more'} in {name}"
        for name, gain in differences(first, other).items()
    ]
    return f"{said}: {', '.join(parts)}" if parts else said


def scenarios(ranking: Ranking) -> list[Scenario]:
    """Return the changed assumptions under which another layout is first."""
    if not ranking.fitting:
        return []
    best, found = ranking.fitting[0], list[Scenario]()
    for text, cluster, share in _changes(ranking.cluster):
        every = changed(ranking, cluster, completions=share)
        first = next(iter(ordered(one for one in every if one.fits)), None)
        earlier = next((one for one in every if one.name == best.name and one.fits), None)
        if first is None or earlier is None or first.name == best.name:
            continue
        if earlier.seconds - first.seconds > LEAST * earlier.seconds:
            found.append(Scenario(text, first, earlier))
    return found


def changed(ranking: Ranking, cluster: Cluster, *, completions: float = 1.0) -> list[Candidate]:
    """Return the legal layouts of a ranking under changed assumptions, in no order.

    Args:
        completions: of an iteration, as a multiple of those of the ranking.
    """
    flops, prompts = _scaled(ranking.flops, completions), ranking.model.prompts
    of = for_model(cluster, ranking.model.settings.model)
    return [
        candidate(_with_prompts(one.settings, completions), flops, of, one.memory, prompts=prompts)
        for one in [*ranking.fitting, *ranking.too_large]
    ]


def _changes(cluster: Cluster) -> list[tuple[str, Cluster, float]]:
    """Return changed assumptions: text, cluster, completions as a multiple."""
    device = cluster.device
    network = [
        (
            f"a network of {device.network * by / 1e9:g} GB/s a GPU",
            replace(cluster, device=replace(device, network=device.network * by)),
            1.0,
        )
        for by in (1 / TIMES, TIMES)
        if cluster.nodes > 1
    ]
    batch = [
        ("a quarter as many completions", cluster, 1 / TIMES),
        ("four times as many completions", cluster, float(TIMES)),
    ]
    more = replace(cluster, device=replace(device, memory=2 * device.memory))
    memory = (f"{more.device.memory:g} GiB on each GPU", more, 1.0)
    hidden = ("exchange of gradients hidden (--overlap 1)", replace(cluster, overlap=1.0), 1.0)
    return [*network, *batch, memory, hidden]


def _with_prompts(settings: Settings, by: float) -> Settings:
    count = max(1, round(settings.algorithm.prompts_per_iteration * by))
    return replace(settings, algorithm=replace(settings.algorithm, prompts_per_iteration=count))


def _scaled(flops: Flops, by: float) -> Flops:
    """Return the FLOPs of so many times the completions."""

    def times(work: Work) -> Work:
        return Work(*(round(by * number) for number in astuple(work)))

    names = ("rollout", "update", "scored_rows", "rollout_bytes")
    names += ("update_rows", "update_batches", "update_extra")
    changes = {name: round(by * getattr(flops, name)) for name in names}
    works = {name: times(getattr(flops, name)) for name in ("rollout_work", "update_work")}
    return replace(flops, **changes, **works)


def _sum(times: Times, parts: tuple[str, ...]) -> float:
    return sum(getattr(times, part) for part in parts)
