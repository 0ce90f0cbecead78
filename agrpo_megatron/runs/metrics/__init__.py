"""Every metric of `metrics.jsonl`: phases, unit, meaning, healthy value; docs/metrics.md."""

import difflib
import re

from agrpo_megatron.runs.metrics.learning import REWARDS, SAMPLER
from agrpo_megatron.runs.metrics.policy import POLICY, PREFERENCES
from agrpo_megatron.runs.metrics.position import POSITION
from agrpo_megatron.runs.metrics.record import Metric
from agrpo_megatron.runs.metrics.work import ALARMS, DRAWS, MEMORY, RANKS, SPEED, TIME, WORK

PART = re.compile(r"<\w+>")  # of a name: it stands for any text

METRICS: dict[str, tuple[Metric, ...]] = {
    "Place in the run": POSITION,
    "Rewards and accuracy": REWARDS,
    "Completions and sampling": SAMPLER,
    "Loss and policy": POLICY,
    "Preference pairs": PREFERENCES,
    "Work": WORK,
    "Number of draws": DRAWS,
    "Time": TIME,
    "Speed": SPEED,
    "Memory": MEMORY,
    "Ranks": RANKS,
    "Alarms": ALARMS,
}


def find_metric(name: str, *, phase: str | None = None) -> Metric | None:
    """Return the metric that a logged name belongs to: itself, or the closest pattern.

    Of several patterns that fit, the closest has the most letters outside its <PARTS>.

    Args:
        phase: only metrics that this phase logs; None: of any.
    """
    every = [metric for members in METRICS.values() for metric in members]
    every = [metric for metric in every if phase is None or phase in metric.phases]
    exact = (metric for metric in every if metric.name == name)
    fitting = (metric for metric in every if re.fullmatch(_pattern(metric.name), name))
    closest = max(fitting, key=lambda metric: len(PART.sub("", metric.name)), default=None)
    return next(exact, closest)


def chosen_metrics(prefix: str = "") -> dict[str, list[Metric]]:
    """Return the metrics by group whose names begin with `prefix`, or that it belongs to.

    Raises:
        ValueError: there is none; names the nearest.
    """
    found = {
        group: [metric for metric in members if metric.name.startswith(prefix)]
        for group, members in METRICS.items()
    }
    found = {group: members for group, members in found.items() if members}
    if found:
        return found
    if metric := find_metric(prefix):
        group = next(group for group, members in METRICS.items() if metric in members)
        return {group: [metric]}
    names = [metric.name for members in METRICS.values() for metric in members]
    nearest = difflib.get_close_matches(prefix, names, n=1, cutoff=0.3)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"no metric begins with {prefix}{hint}")


def _pattern(name: str) -> str:
    """Return a regular expression of a name in which <PART> stands for any text."""
    return ".+".join(map(re.escape, PART.split(name)))
