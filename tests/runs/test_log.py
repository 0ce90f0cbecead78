"""The files of a run, and what wandb keeps of it offline."""

import json
import struct
from pathlib import Path

import pytest

from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import resolved_run, silent_view, tiny

BLOCK, HEADER = 32768, 7  # bytes of LevelDB's log format, which wandb writes


def wandb_records(path):
    """Return the protobuf records of a run-ID.wandb file."""
    from wandb.proto import wandb_internal_pb2

    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    place, part, records = 7, b"", []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            place += left
            continue
        part += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # the whole of a record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def _history(records):
    """Return the metrics of each logged step."""
    return [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def _train(run_dir, iterations):
    overrides = ["logging.wandb=offline", "logging.project=tests", "sft.iterations=2"]
    overrides += [f"train.iterations={iterations}", "evaluation.interval=0"]
    train(resolved_run(run_dir, *overrides), silent_view())


def test_wandb_offline_keeps_every_metric_and_a_resumed_run_keeps_its_id(tmp_path):
    run_dir = tmp_path / "run"
    run_ranks(1, _train, run_dir, 1)
    run_ranks(1, _train, run_dir, 2)
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    ident = (run_dir / "wandb_id").read_text()
    assert len(files) == 2
    assert {path.name for path in files} == {f"run-{ident}.wandb"}
    logged = []
    for path in files:
        records = wandb_records(path)
        kinds = [record.WhichOneof("record_type") for record in records]
        assert "exit" in kinds, "the run was finished"
        started = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (started.run_id, started.project, started.display_name) == (ident, "tests", "run")
        logged += _history(records)
    metrics = read(run_dir / "metrics.jsonl")
    phases = ["sft", "sft", "eval", "rl", "eval", "rl", "eval"]
    assert [record["phase"] for record in metrics] == phases
    assert len(logged) == len(metrics)
    for entry, record in zip(logged, metrics, strict=True):
        expected = {f"{record['phase']}/{k}": v for k, v in record.items() if k != "phase"}
        assert {k: v for k, v in entry.items() if not k.startswith("_")} == expected


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path / "run", settings=tiny(), is_main=True)
    yield log
    log.close()


def test_logs_are_cut_back_to_a_checkpoint_and_go_on_from_there(log):
    log.metrics({"phase": "sft", "iteration": 1})
    log.samples([{"completion": "a"}], phase="sft", iteration=1)
    offsets = log.offsets()
    log.metrics({"phase": "sft", "iteration": 2})
    log.samples([{"completion": "b"}], phase="sft", iteration=2)
    log.cut_back(offsets)
    assert log.offsets() == offsets
    log.metrics({"phase": "sft", "iteration": 3})
    assert [r["iteration"] for r in read(log.directory / "metrics.jsonl")] == [1, 3]
    assert [r["completion"] for r in read(log.directory / "samples.jsonl")] == ["a"]
    log.cut_back({})
    assert read(log.directory / "metrics.jsonl") == read(log.directory / "samples.jsonl") == []


def test_a_line_that_a_kill_cut_short_does_not_survive_a_resume(log):
    log.metrics({"phase": "sft", "iteration": 1})
    offsets = log.offsets()
    with (log.directory / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "sft", "itera')
    log.cut_back(offsets)
    log.metrics({"phase": "sft", "iteration": 2})
    assert [r["iteration"] for r in read(log.directory / "metrics.jsonl")] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", settings=tiny(), is_main=False)
    log.metrics({"phase": "sft", "iteration": 1})
    log.samples([{}], phase="sft")
    log.cut_back(log.offsets())
    log.close()
    assert not (tmp_path / "run").exists()
