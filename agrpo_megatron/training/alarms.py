"""Alarms: signs of a failing run; each is a metric, a warning and a wandb alert."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.rollout.session import Output

FIRST = 10  # iterations whose mean entropy a rise is measured against
# Of the largest possible entropy. A policy below it is sharp, however small its first entropy was.
SHARE = 0.1
RISE, RATIO = "entropy_rise", "ratio"


@dataclass(frozen=True)
class Alarm:
    """One alarm; it is on while the metric is past its level."""

    name: str
    metric: str
    key: str  # of the setting that holds the level
    is_past: Callable[[float, float], bool]  # of value and level
    text: str  # takes `value`


ALARMS = (
    Alarm(
        RATIO,
        "ratio/max_error",
        "train.ratio_alarm",
        lambda value, level: value > level,
        "a first update's policy ratio is {value:.2e} from 1; rollout and training disagree",
    ),
    Alarm(
        "mismatch",
        "mismatch/mean",
        "train.mismatch_alarm",
        lambda value, level: value > level,
        "probabilities of the sampler and of the policy that is trained differ {value:.3g} times "
        "on average; importance weights correct less and less of it",
    ),
    Alarm(
        "mismatch_tail",
        "mismatch/p99",
        "train.mismatch_tail_alarm",
        lambda value, level: value > level,
        "one token in 100 has a probability that sampler and trained policy see {value:.3g} times "
        "apart, or more",
    ),
    Alarm(
        "empty",
        "completions/empty_fraction",
        "resilience.empty_alarm",
        lambda value, level: value >= level > 0,
        "{value:.0%} of completions have no text, only end-of-text",
    ),
    Alarm(
        "entropy",
        "entropy",
        "resilience.entropy_alarm",
        lambda value, level: value < level,
        "the mean entropy of a rollout is {value:.3g} nats; the policy has nearly collapsed",
    ),
    Alarm(
        RISE,
        RISE,
        "resilience.entropy_rise_alarm",
        lambda value, level: value >= level > 0,
        f"a rollout's mean entropy is {{value:.3g}} times that of the first {FIRST} iterations; "
        "the policy is turning into noise",
    ),
    Alarm(
        "failed_rewards",
        "failed_rewards_fraction",
        "resilience.failed_rewards_alarm",
        lambda value, level: value >= level > 0,
        "{value:.0%} of rewards failed; they teach nothing",
    ),
    Alarm(
        "zero_variance",
        "zero_advantage_fraction",
        "resilience.zero_variance_alarm",
        lambda value, level: value >= level > 0,
        "{value:.0%} of rollouts have no advantage, as the rewards of their groups are equal",
    ),
)


class Alarms:
    """The alarms of a run; each warns only when it turns on.

    That of the ratio watches only the first iteration of a replay.

    Args:
        entropies: `entropy` by iteration, of an earlier attempt's first `FIRST` iterations.
    """

    def __init__(
        self, settings: Settings, output: Output, *, entropies: Mapping[int, float] | None = None
    ):
        self._levels = {alarm.name: attrgetter(alarm.key)(settings) for alarm in ALARMS}
        self._output, self._on = output, set[str]()
        # Later iterations of a replay update other weights than those that sampled.
        self._ratio_until = math.inf if settings.train.from_rollouts is None else 1
        self._first, self._least = dict(entropies or {}), SHARE * _largest_entropy(settings)

    def check(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return `alarm/NAME` of each alarm: 1 where it is on, else 0; called by every rank.

        A missing metric triggers no alarm.
        """
        rise = self._rise(iteration, metrics.get("entropy"))
        seen = metrics if rise is None else {**metrics, RISE: rise}
        return {f"alarm/{a.name}": float(self._is_on(a, iteration, seen)) for a in ALARMS}

    def _rise(self, iteration: int, entropy: float | None) -> float | None:
        """Return the entropy over its mean in the first iterations; None for a sharp policy."""
        if entropy is None:
            return None
        if iteration <= FIRST:
            self._first[iteration] = entropy
        if len(self._first) < FIRST or entropy < self._least:
            return None
        mean = sum(self._first.values()) / FIRST
        return entropy / mean if mean > 0 else math.inf

    def _is_on(self, alarm: Alarm, iteration: int, metrics: Mapping[str, float]) -> bool:
        value, level = metrics.get(alarm.metric), self._levels[alarm.name]
        is_due = alarm.name != RATIO or iteration <= self._ratio_until
        is_on = value is not None and is_due and alarm.is_past(value, level)
        if is_on and alarm.name not in self._on:
            said = alarm.text.format(value=value)
            text = f"iteration {iteration}: {said} ({alarm.key}={level})"
            self._output.view.warn(text)
            self._output.log.alert(f"{alarm.name} alarm", text)
        (self._on.add if is_on else self._on.discard)(alarm.name)
        return is_on


def _largest_entropy(settings: Settings) -> float:
    """Return the entropy of a uniform policy, in nats."""
    vocab, top_k = settings.model.vocab_size, settings.sampling.top_k
    assert vocab is not None
    return math.log(min(vocab, top_k or vocab))
