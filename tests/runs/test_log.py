"""The files of a run, and what wandb keeps of it offline."""

import json
import os
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agrpo_megatron.runs.log import RunLog, check_log
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import TIMED, resolved_run, silent_view, tiny

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
    for step, (entry, record) in enumerate(zip(logged, metrics, strict=True)):
        assert entry["_step"] == step
        assert _without_underscores(entry) == _named(record)


def _named(record):
    """Return a line of metrics with the names that wandb gets; it has no lists."""
    lists = {k: v for k, v in record.items() if isinstance(v, list)}
    named = {k: v for k, v in record.items() if k not in ("phase", *lists)}
    named |= {f"{k}/{n}": v for k, part in lists.items() for n, v in enumerate(part)}
    return {f"{record['phase']}/{k}": v for k, v in named.items() if v is not None}


def _without_underscores(entry):
    return {k: v for k, v in entry.items() if not k.startswith("_")}


def _attempt(run_dir, ending):
    """Train; in `ending` an attempt ends after so many lines: killed, asked to stop, or not."""
    own, how, last = RunLog.metrics, *ending
    written = []

    def metrics(self, record):
        own(self, record)
        written.append(record)
        if len(written) == last:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[how])

    if how != "end":
        RunLog.metrics = metrics
    overrides = ["logging.wandb=offline", "sft.iterations=2", "train.iterations=6"]
    overrides += ["evaluation.interval=3", "checkpoint.interval=2"]
    train(resolved_run(run_dir, *overrides), silent_view())


# How each attempt ends, after how many lines. Lines: sft 1-2, before, rl 1-3, eval, rl 4-6, after.
ATTEMPTS = {
    "undisturbed": [("end", 0)],
    "a stop": [("stop", 6), ("end", 0)],
    "a stop in the supervised phase": [("stop", 1), ("end", 0)],
    "a kill": [("kill", 8), ("end", 0)],
    "a kill before the first checkpoint": [("kill", 1), ("end", 0)],
    "a kill, twice": [("kill", 7), ("kill", 2), ("end", 0)],
    "a kill and a stop": [("kill", 7), ("stop", 2), ("end", 0)],
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_attempts_of_a_run_give_the_curves_of_an_undisturbed_one(tmp_path, name):
    """Read back in order, a later attempt replaces a step: by the same values, or a redone line."""
    run_dir, curves = tmp_path / "run", {}
    for number, ending in enumerate(ATTEMPTS[name]):
        if number:
            time.sleep(1.1)  # wandb names an attempt's folder by the second
        if ending[0] == "kill":
            with pytest.raises(AssertionError, match="killed by signal 9"):
                run_ranks(1, _attempt, run_dir, ending)
        else:
            run_ranks(1, _attempt, run_dir, ending)
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == len(ATTEMPTS[name])
    for path in files:
        for entry in _history(wandb_records(path)):
            step, values = entry["_step"], _without_underscores(entry)
            timeless = {
                k: v for k, v in values.items() if not k.partition("/")[2].startswith(TIMED)
            }
            earlier = curves.setdefault(step, (timeless, values))
            assert earlier[0] == timeless, "a step that two attempts logged is the same"
            curves[step] = (timeless, values)
    metrics = read(run_dir / "metrics.jsonl")
    assert [values for _, values in (curves[step] for step in sorted(curves))] == [
        _named(record) for record in metrics
    ]
    assert sorted(curves) == list(range(len(metrics))) == list(range(11))


def test_a_server_that_refuses_leaves_the_attempt_offline(tmp_path, monkeypatch, capsys):
    import wandb

    modes = []

    def init(mode, **rest):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no such\nproject")
        define = dict.fromkeys(("finish", "define_metric"), lambda *_, **__: None)
        return SimpleNamespace(id=rest["id"], **define)

    monkeypatch.setattr(wandb, "init", init)
    settings = tiny("logging.wandb=online")
    RunLog(tmp_path / "run", settings=settings, is_main=True).close()
    assert modes == ["online", "offline"]
    said = "warning: wandb is offline in this attempt (no such project)\n"
    assert capsys.readouterr().err == said


MACHINE = f"machine {{}} login user password {'0' * 40}"
KEYS = {  # environment, whether there is a key
    "no key": ({}, False),
    "a key": ({"WANDB_API_KEY": "0" * 40}, True),
    "a key in the netrc file": ({"NETRC": MACHINE.format("api.wandb.ai")}, True),
    "a key of another server": ({"NETRC": MACHINE.format("example.org")}, False),
    "a key that is too short": ({"WANDB_API_KEY": "abc"}, False),
    "a token's file": ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, True),
    "a server of one's own, without a key": (
        {"WANDB_BASE_URL": "https://x.org", "NETRC": MACHINE.format("api.wandb.ai")},
        False,
    ),
    "a server of one's own": (
        {"WANDB_BASE_URL": "https://x.org", "NETRC": MACHINE.format("x.org")},
        True,
    ),
    "a netrc file that cannot be read": ({"NETRC": "machine"}, False),
}


def _checked(folder, environment):
    """Return the error of a run that is to log online, or None."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    netrc = Path(folder) / "netrc"
    netrc.write_text(environment.get("NETRC", ""))
    netrc.chmod(0o600)
    os.environ.update({**environment, "HOME": folder, "WANDB_CONFIG_DIR": folder})
    os.environ["NETRC"] = str(netrc)
    try:
        check_log(tiny("logging.wandb=online", f"run.dir={folder}/run"))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_wandb_is_looked_for_before_ranks_start(tmp_path, name):
    environment, has_key = KEYS[name]
    (error,) = run_ranks(1, _checked, str(tmp_path), environment)
    assert (error is None) == has_key
    if error is not None:
        said = "logging.wandb=online cannot log in: there is no valid API key"
        assert error.startswith(said) and "\n" not in error
        assert error.endswith("run `wandb login`, set WANDB_API_KEY, or use logging.wandb=offline")


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


def test_a_log_goes_on_with_the_time_of_earlier_attempts_and_their_last_line(tmp_path):
    """Lines that a resume cuts away took time, too; a line cut short by a kill is passed over."""

    def opened(seconds):
        started = time.monotonic() - seconds
        return RunLog(tmp_path, settings=tiny(), is_main=True, started=started)

    log = opened(100)
    log.metrics({"phase": "rl", "iteration": 1, "totals/tokens": 7})
    assert log.last("rl")["totals/tokens"] == 7 and log.last("sft") == {}
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl"')
    log = opened(50)
    log.cut_back({})
    assert log.last("rl") == {}
    log.metrics({"phase": "eval", "iteration": 0})
    log.close()
    (line,) = read(tmp_path / "metrics.jsonl")
    assert 150 <= line["totals/seconds"] < 180


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", settings=tiny(), is_main=False)
    log.metrics({"phase": "sft", "iteration": 1})
    log.samples([{}], phase="sft")
    log.cut_back(log.offsets())
    log.close()
    assert not (tmp_path / "run").exists()
