"""One settings file without code: a file of chats, then RL on rows; used from any folder after."""

import json
import os

import yaml

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.plan import plan_evaluation
from agrpo_megatron.evaluation.target import find_target
from agrpo_megatron.runs.directory import data_digests, progress, resolve_run, run_digest
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import TINY, silent_view

OWN = [name for name in TINY if not name.startswith(("task.", "logging.wandb"))]
OWN += ["logging.wandb=disabled", "sft.optimizer.learning_rate=1e-2", "train.token_budget=512"]
OWN += ["algorithm.prompts_per_iteration=2", "evaluation.interval=0"]
OWN += ["sft.optimizer.decay=linear"]  # the last steps are small: none of them unlearns
REWARD = {"name": "regex", "pattern": "=([0-9]+)"}
FILE = {
    "run": {"dir": "run"},
    "task": {"name": "jsonl", "options": {"train": "rows.jsonl", "chat": True, "reward": REWARD}},
    "sft": {"iterations": 250, "batch_size": 6, "data": "chats.jsonl", "padding": "completion"},
    "train": {"iterations": 1},
}


def _write(folder):
    """Write 2,000 chats whose answer is =7, and 40 problems of which 4 are held out."""
    chats = [[("user", f"a{n}"), ("assistant", "=7")] for n in range(2000)]
    rows = [{"question": f"a{n}", "answer": "7"} for n in range(1980, 2020)]
    talks = [{"messages": [{"role": r, "content": t} for r, t in chat]} for chat in chats]
    for name, content in (("chats", talks), ("rows", rows)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "run.yaml").write_text(yaml.safe_dump(FILE))


def _trained(folder, other):
    """Train by relative names in a folder; plan and resume in another one."""
    os.chdir(folder)
    given = load(Settings, "run.yaml", OWN)
    resolved, view, notes = resolve_run(given, world_size=1), silent_view(), list[str]()
    train(resolved, view)
    notes = list(resolved.task.notes)
    here = run_digest(resolved.settings, data_digests(resolved.task))
    os.chdir(other)
    target = find_target(folder / "run")
    plan = plan_evaluation(
        target.settings, checkpoint=target.checkpoint, label="moved", world_size=1
    )
    asked = [problem.key for problem in plan.problems["jsonl"]]
    again = resolve_run(
        load(Settings, folder / "run/config.yaml", [f"run.dir={folder}/run"]), world_size=1
    )
    done = progress(again.settings)
    there = run_digest(again.settings, data_digests(again.task))
    return notes, asked, done.name, here == there


def test_chats_then_rows_without_code_and_then_from_another_folder(tmp_path):
    folder, other = tmp_path / "here", tmp_path / "there"
    for path in (folder, other):
        path.mkdir()
    _write(folder)
    ((notes, asked, done, is_same),) = run_ranks(1, _trained, folder, other)
    assert "chats.jsonl: 2,000 rows read as messages" in notes
    leaked = [key for key in asked if int(key[1:]) < 2000]
    said = f"sft.data=chats.jsonl: {len(leaked)} of 2,000 rows ask held-out problems of jsonl"
    assert len(asked) == 4 and leaked and f"{said}; left out" in notes
    assert any(
        note.startswith(f"supervised rows: {2000 - len(leaked):,} to train") for note in notes
    )
    records = read(folder / "run" / "metrics.jsonl")
    assert [record["phase"] for record in records] == ["sft"] * 250 + ["eval", "rl", "eval"]
    tokens = [record["totals/tokens"] for record in records[:250]]
    assert tokens == sorted(set(tokens)) and tokens[0] >= 6 * 9  # a prompt and 8 tokens
    # Random weights never write =7: RL starts from what the chats have taught.
    assert records[250]["accuracy"] >= 0.5 and records[251]["reward/mean"] > 0.5
    options = yaml.safe_load((folder / "run" / "config.yaml").read_text())["task"]["options"]
    assert options["train"] == str(folder / "rows.jsonl")
    assert done == "rl-000001" and is_same
