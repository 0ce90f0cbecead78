"""docs/tutorial.md: its commands run, in their order, on the files of examples/tutorial."""

import io
import json
import os
import runpy
import shutil
import sys

import pytest

from tests.cli.test_main import call
from tests.ranks import run_ranks
from tests.test_docs import ROOT, commands

SHORT = [
    *("run.threads=1", "logging.live=false", "logging.wandb=disabled", "evaluation.interval=0"),
    *("task.train_problems=32", "task.eval_problems=8", "train.iterations=1"),
    *("algorithm.prompts_per_iteration=2", "algorithm.group_size=2"),
]


def _follow(folder):
    """Make the data, and the calls of the page; return each with its status and output."""
    os.chdir(folder)
    runpy.run_path("make_data.py", run_name="__main__")
    found = []
    for words in commands(ROOT / "docs/tutorial.md")[0]:
        if words[0] != "serve":  # it runs until it is stopped; tests/serving has it
            sys.stdin = io.StringIO("sort 50213\n")  # of chat
            more = SHORT if words[0] == "train" else []
            more = [*more, "sft.iterations=2"] if words[1:] == ["my.yaml"] and more else more
            found.append((words, *call([*words, *more], folder)))
    return found


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    folder = tmp_path / "sorting"
    shutil.copytree(ROOT / "examples/tutorial", folder)
    done = run_ranks(1, _follow, folder)[0]
    assert [words[0] for words, *_ in done] == [
        *("config", "train", "sample", "evaluate", "config", "train", "convert", "train", "chat")
    ]
    for words, status, printed in done:
        assert status == 0, f"{words}: {printed}"
    assert "# run " in done[0][2], "the forecast"
    assert "task jsonl, problem sort " in done[3][2], "the prompt"
    rows = (folder / "runs/mine/metrics.jsonl").read_text().splitlines()
    assert {"loss", "reward/format"} <= {name for row in rows for name in json.loads(row)}


def test_the_page_shows_the_files_as_they_are():
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    assert (ROOT / "examples/tutorial/my_reward.py").read_text() in page
