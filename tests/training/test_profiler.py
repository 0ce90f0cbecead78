"""A profile holds the operators of its iterations, by section; one that cannot be is refused."""

import gzip
import json
import os
from collections import Counter

import pytest
import torch.distributed as dist

from agrpo_megatron.config.rules.profile import validate_profile
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.runs.log import TIMELINE
from agrpo_megatron.training.measures.profiler import FOLDER, Profiler, profilers
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import resolved_run, silent_view, tiny


def _train(run_dir):
    os.environ["RANK"] = str(dist.get_rank())  # as a launcher does
    wanted = ["profile.start=2", "profile.ranks=[1]", "profile.memory=true"]
    resolved = resolved_run(run_dir, "train.iterations=3", *wanted, world_size=2)
    train(resolved, silent_view())


def test_a_window_of_a_run_on_one_of_two_ranks(tmp_path):
    run_ranks(2, _train, tmp_path / "run")
    name = "rl-000002.rank1"
    folder = tmp_path / "run" / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.operators.txt",
        f"{name}.trace.json.gz",
    ]
    with gzip.open(folder / f"{name}.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    sections = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    # One iteration: each section once, in which operators ran.
    assert sections["rollout"] == sections["reward"] == sections["update"] == 1
    assert {"aten::mm", "[memory]"} <= names
    assert "aten::mm" in (folder / f"{name}.operators.txt").read_text()
    assert len(read(tmp_path / "run" / "metrics.jsonl")) >= 3
    timeline = read(tmp_path / "run" / TIMELINE)
    assert [line["iteration"] for line in timeline] == [1, 2, 3]
    for line in timeline:
        assert list(line["ranks"]) == ["0", "1"]
        parts = {part for part, *_ in line["ranks"]["1"]}
        assert parts >= {"rollout", "reward", "update"}
        assert ("evaluation" in parts) == ("checkpoint" in parts) == (line["iteration"] == 3)


def test_a_window_that_the_end_cuts_short_is_written(tmp_path):
    settings = tiny(f"run.dir={tmp_path}", "profile.start=2", "profile.iterations=5")
    sections = Sections([Profiler(settings, rank=0)])
    for iteration in (1, 2, 3):
        sections.at("rl", iteration)
        with sections("update"):
            pass
    assert not (tmp_path / FOLDER).exists()
    sections.close()
    sections.close()
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["profile.start=5"], r"profile\.start=5 is after .* train\.iterations=3; use an earlier"),
        (["profile.start=1", "profile.phase=sft", "sft.iterations=0"], r"sft\.iterations=0"),
        (["profile.start=1", "profile.ranks=[0, 2]"], r"names rank 2, .* use 0 to 1"),
        (["profile.start=1", "profile.ranks=[]"], r"profile\.ranks=\[\] profiles no rank"),
        (["profile.start=2", "profile.iterations=3"], r"past train\.iterations=3; use at most 2"),
        (["profile.memory=true"], r"profile\.memory=true needs profile\.start"),
        (["profile.start=1", "profile.tool=nsys", "profile.memory=true"], "has no effect with"),
    ],
)
def test_what_would_not_be_profiled_is_refused(overrides, said):
    settings = tiny("train.iterations=3", *overrides)
    with pytest.raises(ValueError, match=said):
        validate_profile(settings, 2)


def test_nsys_needs_a_gpu(monkeypatch):
    settings = tiny("profile.start=1", "profile.tool=nsys")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"profile\.tool=nsys needs a GPU"):
        profilers(settings)
    monkeypatch.setenv("RANK", "1")
    assert profilers(settings) == []
