"""Training progress: a live panel on a terminal, else compact lines."""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agrpo_megatron.reports.text import compact, duration, number, percent, visible

LINES_PER_PHASE = 25
TITLES = {"sft": "supervised fine-tuning", "rl": "reinforcement learning"}
Metrics = dict[str, Any]


class LiveView:
    """Show training as it happens; every rank may have one, only the main rank prints.

    Without a terminal (a log file, a scheduler) it prints about 25 lines a phase, every evaluation
    and every warning. Enter it before the first iteration: the clock starts there.
    """

    def __init__(
        self,
        *,
        sft_iterations: int,
        rl_iterations: int,
        live: bool,
        is_main: bool,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        """Set the planned iterations, and in `start` those before a resume, as (sft, rl)."""
        self._total: dict[str, int] = {"sft": sft_iterations, "rl": rl_iterations}
        self._done: dict[str, int] = {"sft": start[0], "rl": start[1]}
        self._start = dict(self._done)
        self._phase = "sft" if start[0] < sft_iterations else "rl"
        self._metrics: Metrics = {}
        self._history: dict[str, list[float]] = {"loss": [], "reward": [], "accuracy": []}
        self._evaluations: list[Metrics] = []
        self._is_main = is_main
        self._console = Console()
        self._wants_live = live and is_main and self._console.is_terminal
        self._live: Live | None = None
        self._entered = self._phase_began = self._last_call = time.monotonic()

    def __enter__(self) -> Self:
        self._entered = self._phase_began = self._last_call = time.monotonic()
        if self._wants_live:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def sft(self, metrics: Metrics) -> None:
        """Show one supervised iteration."""
        self._iteration("sft", metrics, {"loss": "loss"})

    def rl(self, metrics: Metrics) -> None:
        """Show one iteration of reinforcement learning."""
        self._iteration("rl", metrics, {"reward": "reward/mean", "accuracy": "accuracy"})

    def evaluation(self, metrics: Metrics) -> None:
        """Show one held-out evaluation."""
        self._evaluations.append(metrics)
        cells = [metrics.get("stage"), _named("accuracy", number(metrics, "accuracy"), percent)]
        cells.append(_named("reward", number(metrics, "reward/mean"), _fixed))
        cells.append(_named("", number(metrics, "problems"), compact, " problems"))
        cells.append(_named("", number(metrics, "timing/evaluation"), duration))
        self._say(_line("eval", str(metrics.get("iteration", "")), cells))
        self._last_call = time.monotonic()

    def note(self, text: str) -> None:
        """Show a line of text."""
        self._say(text)

    def warn(self, text: str) -> None:
        """Show a warning; it stays visible above the panel."""
        self._say(f"warning: {text}", style="bold yellow")

    def _iteration(self, phase: str, metrics: Metrics, histories: dict[str, str]) -> None:
        if phase != self._phase or self._done[phase] == self._start[phase]:
            self._phase, self._phase_began = phase, self._last_call
        self._metrics = metrics
        self._done[phase] = metrics.get("iteration", self._done[phase] + 1)
        for name, key in histories.items():
            value = number(metrics, key)
            self._history[name] += [] if value is None else [value]
        self._last_call = time.monotonic()
        if self._live is None and self._is_due(phase):
            cells = self._cells()
            cells += [_named("eta", self._remaining(), duration)]
            self._say(_line(phase, f"{self._done[phase]}/{self._total[phase]}", cells))

    def _is_due(self, phase: str) -> bool:
        done, total = self._done[phase], self._total[phase]
        every = max(1, round(total / LINES_PER_PHASE))
        return done % every == 0 or done in (self._start[phase] + 1, total)

    def _cells(self) -> list[str]:
        """Return the newest metrics of the phase as `name value`, without missing ones."""
        first = ("loss", "loss") if self._phase == "sft" else ("reward", "reward/mean")
        shown = (
            (*first, _fixed),
            ("accuracy", "accuracy", percent),
            ("ratio error", "ratio/max_error", "{:.1e}".format),
            ("entropy", "entropy", _fixed),
            ("live steps", "live_steps/mean", "{:.1f}".format),
            ("grad norm", "grad_norm", _fixed),
            ("tokens/s", "perf/tokens_per_second", compact),
            ("iteration", "timing/iteration", duration),
        )
        return [_named(name, number(self._metrics, key), form) for name, key, form in shown]

    def _remaining(self) -> float | None:
        """Return seconds left in the phase at its pace so far, or None before it has one."""
        done = self._done[self._phase] - self._start[self._phase]
        if done <= 0:
            return None
        pace = (self._last_call - self._phase_began) / done
        return pace * max(0, self._total[self._phase] - self._done[self._phase])

    def _say(self, text: str, style: str = "") -> None:
        if not self._is_main:
            return
        if self._live is not None:
            self._console.print(Text(text, style=style))
        else:
            print(text, flush=True)

    def _panel(self) -> RenderableType:
        done, total = self._done[self._phase], self._total[self._phase]
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        clock = [duration(time.monotonic() - self._entered)]
        remaining = self._remaining()
        clock += [] if remaining is None else [f"{duration(remaining)} left"]
        bar = ProgressBar(total=max(1, total), completed=done, complete_style="blue")
        head.add_row(Text(f"{done}/{total}", style="bold"), bar, Text(", ".join(clock)))
        return Panel(
            Group(head, Text(""), self._curves(), Text(""), self._numbers()),
            title=Text(TITLES[self._phase], style="bold"),
            title_align="left",
            border_style="bright_black",
            padding=(1, 2),
        )

    def _curves(self) -> Table:
        """Return one row per history: newest value, sparkline, range."""
        held_out = [v for e in self._evaluations if (v := number(e, "accuracy")) is not None]
        rows = (
            ("loss", self._history["loss"] if self._phase == "sft" else [], _fixed, "magenta"),
            ("reward", self._history["reward"], _fixed, "green"),
            ("accuracy", self._history["accuracy"], percent, "blue"),
            ("held-out", held_out, percent, "yellow"),
        )
        table = Table.grid(padding=(0, 2))
        for name, values, form, colour in rows:
            if values:
                span = f"{form(min(values))} to {form(max(values))}"
                line = Text(sparkline(values), style=colour)
                newest = Text(form(values[-1]), style=f"bold {colour}")
                table.add_row(Text(name), newest, line, Text(span, style="dim"))
        return table

    def _numbers(self) -> Text:
        skipped = ("loss ", "reward ", "accuracy ")
        cells = [cell for cell in self._cells() if cell and not cell.startswith(skipped)]
        return Text("   ".join(cells), style="dim", overflow="fold")


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return values as block characters, lowest to highest; averaged down to `width` of them."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(chr(0x2581 + math.floor((mean - low) * scale + 0.5)) for mean in means)


def _fixed(value: float) -> str:
    return f"{value:.3f}"


def _named(name: str, value: float | None, form: Any, suffix: str = "") -> str:
    return "" if value is None else f"{name} {form(value)}{suffix}".strip()


def _line(phase: str, progress: str, cells: Sequence[Any]) -> str:
    shown = [visible(str(cell)) for cell in cells if cell]
    return f"{phase:<4} {progress:>11}  " + "  ".join(shown)
