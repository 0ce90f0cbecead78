"""Training progress: a live panel on a terminal, else compact lines."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
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
Form = Callable[[float], str]
Cell = tuple[str, str, Form]  # name, metric, form

FIXED: Form = "{:.3f}".format
ACCURACY: Cell = ("accuracy", "accuracy", percent)
HEADLINES: dict[str, tuple[Cell, ...]] = {  # by phase; the panel draws them as curves
    "sft": (("loss", "loss", FIXED),),
    "rl": (("reward", "reward/mean", FIXED), ACCURACY),
}
DETAILS: tuple[Cell, ...] = (
    ("ratio error", "ratio/max_error", "{:.1e}".format),
    ("ratio p99", "ratio/p99_error", "{:.1e}".format),
    ("entropy", "entropy", FIXED),
    ("live steps", "live_steps/mean", "{:.1f}".format),
    ("truncated", "completions/truncated_fraction", percent),
    ("drawn", "mc_samples", "{:.0f}".format),
    ("grad norm", "grad_norm", FIXED),
    ("tokens/s", "perf/tokens_per_second", compact),
    ("update MFU", "perf/mfu_update", percent),
    ("GiB", "memory/allocated_peak", "{:.1f}".format),
    ("iteration", "timing/iteration", duration),
)
EVALUATION: tuple[Cell, ...] = (
    ACCURACY,
    ("reward", "reward/mean", FIXED),
    ("", "problems", lambda count: f"{compact(count)} problems"),
    ("", "timing/evaluation", duration),
)
CURVES: tuple[tuple[str, Form, str], ...] = (  # name, form, colour
    ("loss", FIXED, "magenta"),
    ("reward", FIXED, "green"),
    ("accuracy", percent, "blue"),
    ("held-out", percent, "yellow"),
)


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
        self._history: dict[str, list[float]] = {name: [] for name, *_ in CURVES}
        self._is_main = is_main
        self._console = Console()
        self._wants_live = live and is_main and self._console.is_terminal
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._entered = self._phase_began = self._last_call = time.monotonic()
        if self._wants_live:
            panel, console = self._panel, self._console
            self._live = Live(get_renderable=panel, console=console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def sft(self, metrics: Metrics) -> None:
        """Show one supervised iteration."""
        self._iteration("sft", metrics)

    def rl(self, metrics: Metrics) -> None:
        """Show one iteration of reinforcement learning."""
        self._iteration("rl", metrics)

    def evaluation(self, metrics: Metrics) -> None:
        """Show one held-out evaluation."""
        self._remember(metrics, {"held-out": "accuracy"})
        cells = [metrics.get("stage", ""), *_cells(metrics, EVALUATION)]
        self.note(_line("eval", str(metrics.get("iteration", "")), cells))

    def note(self, text: str, *, style: str = "") -> None:
        """Show a line of text, on the main rank only."""
        if not self._is_main:
            return
        if self._live is not None:
            self._console.print(Text(text, style=style))
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Show a warning; it stays visible above the panel."""
        self.note(f"warning: {text}", style="bold yellow")

    def _iteration(self, phase: str, metrics: Metrics) -> None:
        if phase != self._phase or self._done[phase] == self._start[phase]:
            self._phase, self._phase_began = phase, self._last_call
        self._metrics = metrics
        self._done[phase] = metrics.get("iteration", self._done[phase] + 1)
        self._remember(metrics, {name: key for name, key, _ in HEADLINES[phase]})
        if self._live is None and self._is_due(phase):
            remaining = self._remaining()
            eta = "" if remaining is None else f"eta {duration(remaining)}"
            cells = [*_cells(metrics, (*HEADLINES[phase], *DETAILS)), eta]
            self.note(_line(phase, f"{self._done[phase]}/{self._total[phase]}", cells))

    def _remember(self, metrics: Metrics, histories: dict[str, str]) -> None:
        for name, key in histories.items():
            value = number(metrics, key)
            self._history[name] += [] if value is None else [value]
        self._last_call = time.monotonic()

    def _is_due(self, phase: str) -> bool:
        done, total = self._done[phase], self._total[phase]
        every = max(1, round(total / LINES_PER_PHASE))
        return done % every == 0 or done in (self._start[phase] + 1, total)

    def _remaining(self) -> float | None:
        """Return seconds left in the phase at its pace so far, or None before it has one."""
        done = self._done[self._phase] - self._start[self._phase]
        if done <= 0:
            return None
        pace = (self._last_call - self._phase_began) / done
        return pace * max(0, self._total[self._phase] - self._done[self._phase])

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
        details = [cell for cell in _cells(self._metrics, DETAILS) if cell]
        numbers = Text("   ".join(details), style="dim", overflow="fold")
        return Panel(
            Group(head, Text(""), self._curves(), Text(""), numbers),
            title=Text(TITLES[self._phase], style="bold"),
            title_align="left",
            border_style="bright_black",
            padding=(1, 2),
        )

    def _curves(self) -> Table:
        """Return one row per history: newest value, sparkline, range."""
        table = Table.grid(padding=(0, 2))
        for name, form, colour in CURVES:
            values = self._history[name]
            if values and (name != "loss" or self._phase == "sft"):
                span = f"{form(min(values))} to {form(max(values))}"
                line = Text(sparkline(values), style=colour)
                newest = Text(form(values[-1]), style=f"bold {colour}")
                table.add_row(Text(name), newest, line, Text(span, style="dim"))
        return table


def sparkline(values: Sequence[float]) -> str:
    """Return values as block characters, lowest to highest; averaged down to 40 of them."""
    count = min(40, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(chr(0x2581 + math.floor((mean - low) * scale + 0.5)) for mean in means)


def _cells(metrics: Metrics, cells: Iterable[Cell]) -> list[str]:
    """Return metrics as `name value`; the text of a missing metric is empty."""
    values = [(name, form, number(metrics, key)) for name, key, form in cells]
    return ["" if v is None else f"{name} {form(v)}".strip() for name, form, v in values]


def _line(phase: str, progress: str, cells: Sequence[Any]) -> str:
    shown = [visible(str(cell)) for cell in cells if cell]
    return f"{phase:<4} {progress:>11}  " + "  ".join(shown)
