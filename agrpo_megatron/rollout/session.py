"""The records that the loops share: the run, its output, and its fault tolerance."""

from dataclasses import dataclass, field
from typing import Protocol

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import NoStop, Stop
from agrpo_megatron.rollout.cache import NoCache, RolloutCache
from agrpo_megatron.rollout.replay import Replay
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.tasks.supervised.examples import Supervised
from agrpo_megatron.text.tokenizer import Tokenizer


class View(Protocol):
    """Shows the progress of a run, for example on the terminal."""

    def sft(self, metrics: dict) -> None:
        """Show one supervised iteration."""

    def rl(self, metrics: dict) -> None:
        """Show one reinforcement-learning iteration."""

    def evaluation(self, metrics: dict) -> None:
        """Show one evaluation."""

    def note(self, text: str) -> None:
        """Show a line of information."""

    def warn(self, text: str) -> None:
        """Show a warning."""


class NoView:
    """A view that shows nothing."""

    def sft(self, metrics: dict) -> None:
        """Show nothing."""

    rl = evaluation = sft

    def note(self, text: str) -> None:
        """Show nothing."""

    warn = note


@dataclass(frozen=True)
class Run:
    """The run on this rank."""

    settings: Settings
    ranks: Ranks
    task: Task
    tokenizer: Tokenizer
    grader: Grader
    replay: Replay | None = None  # None: rollouts are sampled
    supervised: Supervised | None = None  # None: the supervised phase learns from solutions

    @property
    def mask_id(self) -> int:
        """Return the mask token's id."""
        assert self.settings.model.mask_token_id is not None
        return self.settings.model.mask_token_id

    @property
    def eos_id(self) -> int:
        """Return the end-of-text id."""
        assert self.settings.model.eos_token_id is not None
        return self.settings.model.eos_token_id


@dataclass(frozen=True)
class Output:
    """The output of a run: its log files, and the view."""

    log: RunLog
    view: View = field(default_factory=NoView)


@dataclass(frozen=True)
class Safety:
    """Fault tolerance of a run: monitored sections, the stop request, the cache."""

    sections: Sections = field(default_factory=Sections)
    stop: Stop | NoStop = field(default_factory=NoStop)
    cache: RolloutCache | NoCache = field(default_factory=NoCache)


@dataclass(frozen=True)
class Session:
    """The three records, as the loops pass them; inner functions take only one of them."""

    run: Run
    output: Output
    safety: Safety = field(default_factory=Safety)
