"""The check of several GPUs, rehearsed on CPU ranks: layouts are compared, and judged right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agrpo_megatron.config.parallel import model_ranks
from agrpo_megatron.config.schema import build, from_text
from agrpo_megatron.config.settings import ParallelSettings
from tools.gpu_verdict import NOT_REACHED, RIGHT, WRONG
from tools.gpus_rows import ALONE, ROWS, by_ranks

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))  # where the tools import one another from
report = importlib.import_module("gpus_report")


def _layout(**changed):
    against = {"ratio error": {"largest": 2e-5, "99 %": 1e-6}}
    against |= {"same tokens": 1.0, "grad norm": 1e-6, "weights": 1e-4}
    found = {"own": {"largest": 1e-5, "99 %": 1e-6}, "against one": against}
    found |= {"rollout tokens/s": 5000.0, "update tokens/s": 900.0, "peak GiB": 11.5}
    return found | changed


def _record(planned=(), **rows):
    found = {"schema": 1, "rehearsal": False, "date": "2026-01-01", "commit": "abc"}
    found |= {"command": "tools/gpus_check.sh", "seconds": 1.0, "machine": {"gpu": "H100"}}
    found |= {"gpus": 2, "planned": list(planned), "ranks": dict.fromkeys(rows, 2), "rows": rows}
    return report.finish(found)


GOOD = {"fp32": _layout(), "bf16": _layout(own={"largest": 0.15, "99 %": 0.01})}
AGAINST = _layout()["against one"]
CHECKPOINT = {"largest difference": 0.0, "next update": 1e-5, "GB": 0.9}
CHECKPOINT |= {"save seconds": 1.0, "load seconds": 2.0}
NAN = float("nan")
VERDICTS = {  # a row, its status, and a part of the reasons
    "right": (GOOD, RIGHT, ""),
    "needs more": ({"needs": "needs 4 GPUs"}, RIGHT, ""),
    "failed": ({"failed": "rank 1 failed with status 1"}, WRONG, "wrong: x: rank 1 failed"),
    "cut": ({"cut": "cut: no time was left"}, NOT_REACHED, "not reached: x: cut"),
    "refused": ({"refused": "precision=bf16 needs"}, NOT_REACHED, "not reached: x: precision"),
    "own ratio": (
        GOOD | {"fp32": _layout(own={"largest": 2e-3, "99 %": 1e-6})},
        WRONG,
        "wrong: x: own ratio error, largest is 0.002 in fp32, over 0.001",
    ),
    "ratio in bf16": (
        GOOD | {"bf16": _layout(own={"largest": 0.21, "99 %": 0.01})},
        WRONG,
        "wrong: x: own ratio error, largest is 0.21 in bf16, over 0.2",
    ),
    "tokens": (
        GOOD | {"fp32": _layout(**{"against one": AGAINST | {"same tokens": 0.9}})},
        WRONG,
        "tokens unlike one GPU's, share is 0.1 in fp32",
    ),
    "tokens in bf16": (
        GOOD | {"bf16": _layout(**{"against one": AGAINST | {"same tokens": 0.5}})},
        RIGHT,
        "",
    ),
    "gradient": (
        GOOD | {"fp32": _layout(**{"against one": AGAINST | {"grad norm": NAN}})},
        WRONG,
        "gradient norm, relative to one GPU's is nan in fp32",
    ),
    "weights": (
        GOOD | {"fp32": _layout(**{"against one": AGAINST | {"weights": 0.5}})},
        WRONG,
        "change of weights, relative to one GPU's is 0.5 in fp32",
    ),
    "checkpoint": ({"fp32": CHECKPOINT}, RIGHT, ""),
    "weight not restored": (
        {"fp32": CHECKPOINT | {"largest difference": 1e-9}},
        WRONG,
        "wrong: x: largest difference is 1e-09, over 0",
    ),
    "moments not restored": (
        {"fp32": CHECKPOINT | {"next update": 0.3}},
        WRONG,
        "next update is 0.3, over 0.01",
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_row_is_judged_by_its_figures(name):
    row, status, reason = VERDICTS[name]
    found = _record(one={"fp32": _layout(), "bf16": _layout()}, x=row)
    assert found["verdict"]["status"] == status, found["verdict"]
    assert reason in report.table(found)


def test_a_row_that_never_began_was_not_reached():
    found = _record(planned=["x", "y"], x=GOOD)
    assert found["verdict"]["status"] == NOT_REACHED
    assert found["verdict"]["not reached"] == ["y: not begun"]


def test_the_table_has_a_line_for_each_precision_and_says_what_is_missing():
    reshard = {"GB": 2.0, "seconds": 0.01, "GB/s": 200.0}
    alone = {"fp32": {k: v for k, v in _layout().items() if k != "against one"}}
    rows = {"one": alone, "x": GOOD, "four": {"needs": "needs 4 GPUs"}, "late": {"cut": "cut: no"}}
    rows |= {"moved": {"fp32": CHECKPOINT}, "resharded": {"bf16": _layout(reshard=reshard)}}
    lines = report.table(_record(**rows)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| layout | GPUs"))
    body = lines[start : lines.index("", start)]
    assert {line.count("|") for line in body} == {14}
    assert (
        "| x | 2 | bf16 | 0.15 | 0.01 | 2e-05 | 1e-06 | 1 | 1e-06 | 0.0001 | 5,000 | 900 | 11.5 |"
        in body
    )
    assert sum(line.startswith("| x |") for line in body) == 2
    assert any(line.startswith("| four | 2 | needs 4 GPUs |") for line in body)
    assert any(line.startswith("| late | 2 | cut: no |") for line in body)
    assert "| moved | 0 | 1e-05 | 0.9 | 1.00 | 2.00 |" in lines
    assert "| resharded | bf16 | 2 | 10.0 | 200 |" in lines


def test_rows_ask_for_as_many_ranks_as_their_layouts_have():
    assert ROWS[0].name == ALONE and len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS[1:]:
        for overrides in filter(None, (row.overrides, row.then)):
            said = dict(each.split("=", 1) for each in overrides)
            for key in ("parallel", "rollout.parallel"):
                if key in said:
                    tree = from_text(ParallelSettings, said[key], key=key)
                    assert row.ranks % model_ranks(build(ParallelSettings, tree, key)) == 0
    assert [rows[0].ranks for rows in by_ranks(ROWS)] == [1, 2, 4, 8]
    two = {row.name for row in ROWS if row.ranks == 2}
    assert two >= {"tp2", "tp2-sp", "pp2", "pp2 lockstep", "cp2", "dp2 distributed optimizer"}
    assert any("rollout" in name for name in two) and any("checkpoint" in name for name in two)


@pytest.mark.slow
def test_the_check_is_rehearsed_on_two_ranks(tmp_path):
    plain = {key: v for key, v in os.environ.items() if not key.startswith("AGRPO")}
    done = subprocess.run(
        [ROOT / "tools" / "gpus_check.sh", "--rehearse", "--out", tmp_path],
        cwd=ROOT,
        env=plain | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    record = json.loads((tmp_path / "gpus_check.json").read_text())
    rows = record["rows"]
    assert done.returncode == record["verdict"]["status"] == RIGHT, (done.stdout, done.stderr)
    assert list(rows) == [row.name for row in ROWS]
    for row in ROWS:
        found = rows[row.name]
        if row.ranks > 2:
            assert found == {"needs": f"needs {row.ranks} GPUs"}
        elif row.then is not None:
            assert found["fp32"]["largest difference"] == 0 and found["fp32"]["GB"] > 0
            assert 0 < found["fp32"]["next update"] < 1e-2
        else:
            for precision in ("fp32", "bf16"):
                assert found[precision]["own"]["largest"] < (1e-4 if precision == "fp32" else 0.2)
                assert ("reshard" in found[precision]) == ("rollout" in row.name)
    against = rows["tp2"]["fp32"]["against one"]
    assert against["same tokens"] == 1.0 and against["weights"] < 1e-2
    text = (tmp_path / "gpus_check.md").read_text()
    assert "REHEARSAL" in text and text in done.stdout
