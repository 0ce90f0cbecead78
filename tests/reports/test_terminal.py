"""The terminal views: compact logs, nothing from other ranks, traces in the right order."""

import io
import random

import pytest
from rich.console import Console

from agrpo_megatron.config.schema import describe
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.reports.reference import settings_reference
from agrpo_megatron.reports.tables import overview_table
from agrpo_megatron.reports.terminal import LiveView, sparkline
from agrpo_megatron.reports.trace import Edit, trace
from tests.reports.synthetic import eval_row, rl_row, sft_row


def train(*, sft=500, rl=1000, **options):
    rng = random.Random(0)
    with LiveView(sft_iterations=sft, rl_iterations=rl, **options) as view:
        for i in range(1, sft + 1):
            view.sft(sft_row(rng, i, sft))
        for i in range(1, rl + 1):
            view.rl(rl_row(rng, i, rl))
        view.evaluation(eval_row(rng, rl, "after", rl))
        view.warn("the policy ratio is off")
        view.note("done")
    return view


def output(console):
    return console.file.getvalue()


def plain_console(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def test_log_file_gets_about_25_lines_a_phase_and_every_event(capsys):
    train(live=True, is_main=True)
    lines = capsys.readouterr().out.splitlines()
    counts = {name: sum(line.startswith(name) for line in lines) for name in ("sft", "rl", "eval")}
    assert counts == {"sft": 26, "rl": 26, "eval": 1}
    assert lines[-2:] == ["warning: the policy ratio is off", "done"]
    assert all(line.isascii() and len(line) < 180 for line in lines)
    assert "1000/1000" in lines[-4] and "eta 0.0 s" in lines[-4]


def test_short_runs_show_every_iteration_and_rows_may_lack_metrics(capsys):
    with LiveView(sft_iterations=0, rl_iterations=3, live=False, is_main=True) as view:
        for i in (1, 2, 3):
            view.rl({"iteration": i, "accuracy": None})
        view.evaluation({"iteration": 3})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_other_ranks_are_silent(capsys):
    train(sft=5, rl=5, live=True, is_main=False)
    assert capsys.readouterr() == ("", "")


def test_time_left_counts_from_the_resume(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with LiveView(
        sft_iterations=5, rl_iterations=100, live=False, is_main=True, start=(5, 90)
    ) as view:
        view.rl({"iteration": 91})
        view.rl({"iteration": 92})
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta 1 min 20 s")  # 8 at 10 s each


def test_live_panel_shows_the_newest_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=110)
    monkeypatch.setattr("agrpo_megatron.reports.terminal.Console", lambda: console)
    train(sft=2, rl=30, live=True, is_main=True)
    shown = stream.getvalue()
    assert "reinforcement learning" in shown and "30/30" in shown and "held-out" in shown
    assert "warning: the policy ratio is off" in shown


def test_sparkline_spans_its_range():
    assert sparkline([0, 1]) == "\u2581\u2588"
    assert sparkline([5.0] * 3) == "\u2581" * 3
    assert len(sparkline(list(range(1000)))) == 40


def test_trace_shows_each_step_in_order():
    console = plain_console()
    trace(["ab", "[b]", "c\n", "d"], [2, 0, 2, 1], console, num_steps=3)
    lines = output(console).splitlines()
    states = [line.split()[:3] for line in lines if line.strip()[:1].isdigit()]
    dots = "\u00b7\u00b7"
    assert states == [
        ["0", "+1", f"{dots}[b]{dots}\u00b7"],
        ["1", "+1", f"{dots}[b]{dots}d"],
        ["2", "+2", "ab[b]c\u23ced"],
    ]


def test_trace_shows_edits_at_their_steps():
    """The second token is fixed as x, becomes y, and then z; the last step only edits."""
    console = plain_console()
    edits = [Edit(1, 1, "x", "y"), Edit(2, 1, "y", "z"), Edit(2, 0, "\n", "a")]
    trace(["a", "z"], [1, 0], console, num_steps=4, edits=edits)
    lines = [line.split() for line in output(console).splitlines()]
    assert ["step", "new", "after", "it", "edited"] in lines
    assert [line for line in lines if line and line[0].isdigit()] == [
        ["0", "+1", "\u00b7x"],
        ["1", "+1", "\u23cey", "x", "->", "y"],
        ["2", "+0", "az", "y", "->", "z,", "\u23ce", "->", "a"],
    ]


def test_trace_marks_filled_tokens_and_thins_long_runs(monkeypatch):
    monkeypatch.setattr("agrpo_megatron.reports.trace.MAX_LINES", 3)
    console = plain_console()
    trace([*"abcdefgh", *["<e>"] * 5], [*range(8), *[8] * 5], console, num_steps=8)
    text = output(console)
    steps = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert steps == ["0", "4", "7"]
    assert "end" in text and "+5" in text and "\u25a1 is <e> (5 at the end)" in text


def test_trace_sends_no_escape_codes_of_the_model():
    console = plain_console()
    trace(["\x1b[2J", "x"], [0, 1], console, num_steps=2)
    assert "\x1b" not in output(console)


def test_settings_reference_holds_every_setting_and_filters():
    console = plain_console(width=160)
    settings_reference(describe(Settings), console)
    text = output(console)
    assert all(setting.key in text for setting in describe(Settings))
    console = plain_console(width=160)
    settings_reference(describe(Settings), console, prefix="sampling")
    text = output(console)
    assert "random | low_confidence | entropy" in text and "train.iterations" not in text
    with pytest.raises(ValueError, match="did you mean sampling"):
        settings_reference(describe(Settings), console, prefix="samplng")


def test_overview_table_takes_rows_with_different_keys():
    console = plain_console()
    console.print(overview_table([{"run": "a[b]", "accuracy": 0.5}, {"run": "c", "rows": 20000}]))
    text = output(console)
    assert "a[b]" in text and "0.5" in text and "20k" in text
