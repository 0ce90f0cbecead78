"""The report states what the data says, stands alone, and survives hostile text."""

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib import image

from agrpo_megatron.evaluation.statistics import wilson
from agrpo_megatron.reports import summary
from agrpo_megatron.reports.page.html import write_report
from tests.reports.synthetic import END, HOSTILE, write_lines, write_run

FIGURES = ("learning", "policy", "sampler", "time")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "a<b>", iterations=10, sft=3)
    rows = [
        {"phase": "eval", "iteration": 0, "stage": "before", "accuracy": 0.125, "problems": 256},
        {
            "phase": "rl",
            "iteration": 10,
            "perf/tokens_per_second": 12345.0,
            "timing/iteration": 90.0,
        }
        | {"new/<metric>": 7, "parameters": 8_016_000_000},
        {"phase": "eval", "iteration": 10, "stage": "after", "accuracy": 0.625, "problems": 256},
    ]
    write_lines(run_dir / "metrics.jsonl", rows)
    return report(run_dir, "learning")


def report(run_dir, *names):
    """Write a report with these figures, each with ink of its own; return its page."""
    *figures, page = write_report(run_dir)
    assert [path.stem for path in figures] == list(names)
    pictures = [image.imread(path) for path in figures]
    assert len({picture.tobytes() for picture in pictures}) == len(names)
    assert all((picture[..., :3] < 0.5).mean() > 0.001 for picture in pictures)
    shown = page.read_text(encoding="utf-8")
    assert [path.parent for path in figures] == [run_dir / "figures"] * len(figures)
    assert all(base64.b64encode(path.read_bytes()).decode() in shown for path in figures)
    return shown


def test_headline_numbers_come_from_the_metrics(page):
    low, high = wilson(0.625, 256)
    for shown in (
        "12.5% &#8594; 62.5%",
        "+50.0 points",
        f"95% interval {100 * low:.1f}% to {100 * high:.1f}%",
        "of 10 planned",
        "1 min 30 s",
        "12.3k",
        "8.02B",
    ):
        assert shown in page


def test_model_text_is_escaped_everywhere(page):
    assert HOSTILE not in page
    assert "<script" not in page
    assert "<b>a" not in page and "a&lt;b&gt;" in page
    assert "new/&lt;metric&gt;" in page
    assert "default-src 'none'" in page


def test_page_needs_nothing_else_and_is_well_formed(page):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page and "prefers-color-scheme: dark" in page
    opened = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "input", "br", "source"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balance().feed(page)
    assert opened == []


def test_cells_carry_their_denoising_step(page):
    cells = re.findall(r"--s:(\d+)\"><b>([^<]*)</b><i>([^<]*)</i>", page)
    assert cells and all(label.split(" to ")[0] == step for step, _, label in cells)
    assert any(text.endswith("&#215; 12") for _, text, _ in cells)  # folded end of text
    assert page.count(END.replace("<", "&lt;").replace(">", "&gt;")) == 4  # one per completion
    assert "Before RL" in page and "Iteration 10" in page


def test_only_changed_settings_are_marked(page):
    marked = re.findall(r"<tr class=set><td><code>([^<]*)<", page)
    assert marked == ["train.iterations"]


def test_the_iterations_of_an_alarm_and_updates_left_out_are_shown(tmp_path):
    run_dir = write_run(tmp_path / "run", iterations=12, sft=1)
    on = {3: 1.0, 7: 1.0, 8: 1.0, 9: 1.0}
    rows = [
        {"phase": "rl", "iteration": number, "accuracy": 0.5, "alarm/ratio": 0.0}
        | {"alarm/zero_variance": on.get(number, 0.0), "skipped_updates": int(number == 5)}
        for number in range(1, 13)
    ]
    write_lines(run_dir / "metrics.jsonl", rows)
    shown = report(run_dir, "learning")
    assert "iterations of zero variance: 3, 7-9<" in shown
    assert re.search(r'Updates left out</div><div class="value">1<', shown)


def test_a_replay_names_the_run_that_sampled_and_counts_no_ratio_past_the_alarm(tmp_path):
    run_dir = write_run(tmp_path / "run", iterations=12, sft=1)
    config = run_dir / "config.yaml"
    assert "iterations past 0.001" in report(run_dir, *FIGURES)
    config.write_text(config.read_text().replace("from_rollouts: null", "from_rollouts: runs/one"))
    shown = report(run_dir, *FIGURES)
    assert re.search(r'Rollouts replayed</div><div class="value">runs/one<', shown)
    assert "iterations past" not in shown


def test_ctrl_c_in_the_report_of_a_finished_run_says_that_it_is_finished(monkeypatch, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "write_report", interrupt)
    with pytest.raises(KeyboardInterrupt, match="is finished and saved; `agrpo report"):
        summary.conclude(tmp_path)
