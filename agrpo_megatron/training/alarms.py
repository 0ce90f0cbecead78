"""Alarms: states of a run that seldom end well, each a metric, a warning and a wandb alert."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agrpo_megatron.rollout.session import Session


@dataclass(frozen=True)
class Alarm:
    """One alarm; it is on where the metric is past its level."""

    name: str
    metric: str
    key: str  # of the setting that holds the level
    is_past: Callable[[float, float], bool]  # of value and level
    text: str  # takes `value`


ALARMS = (
    Alarm(
        "ratio",
        "ratio/max_error",
        "train.ratio_alarm",
        lambda value, level: value > level,
        "a first update's policy ratio is {value:.2e} from 1; rollout and training disagree",
    ),
    Alarm(
        "empty",
        "empty_completions",
        "resilience.empty_alarm",
        lambda value, level: value >= level > 0,
        "{value:.0%} of completions have no text, only end-of-text",
    ),
    Alarm(
        "entropy",
        "entropy",
        "resilience.entropy_alarm",
        lambda value, level: value < level,
        "the mean entropy of a rollout is {value:.3g} nats; the policy hardly varies any more",
    ),
    Alarm(
        "zero_variance",
        "zero_advantage_fraction",
        "resilience.zero_variance_alarm",
        lambda value, level: value >= level > 0,
        "{value:.0%} of rollouts have no advantage, as their groups have equal rewards; "
        "they teach nothing",
    ),
)


class Alarms:
    """The alarms of a run; they speak as they begin, and again only after they had ended."""

    def __init__(self, session: Session):
        self._session, self._on = session, set[str]()

    def check(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return `alarm/NAME` of each alarm: 1 where it is on, else 0; called by every rank.

        A metric that is missing sets off no alarm.
        """
        return {f"alarm/{a.name}": float(self._is_on(a, iteration, metrics)) for a in ALARMS}

    def _is_on(self, alarm: Alarm, iteration: int, metrics: Mapping[str, float]) -> bool:
        value, level = metrics.get(alarm.metric), _level(self._session, alarm)
        is_on = value is not None and alarm.is_past(value, level)
        if is_on and alarm.name not in self._on:
            said = alarm.text.format(value=value)
            text = f"iteration {iteration}: {said} ({alarm.key}={level})"
            self._session.view.warn(text)
            self._session.log.alert(f"{alarm.name} alarm", text)
        (self._on.add if is_on else self._on.discard)(alarm.name)
        return is_on


def _level(session: Session, alarm: Alarm) -> float:
    section, _, key = alarm.key.partition(".")
    return getattr(getattr(session.settings, section), key)
