"""A sweep on a cluster: each member is a separate job, and the table covers failed members too."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.test_main import write_settings

# The supervised phase of a member is over when its learning rate turns out not to be one.
RATES = ["1e-4", "3e-4", "1e38", "1e-3"]


@pytest.mark.slow
def test_four_members_give_four_runs_and_a_table_that_names_the_failed_one(
    launch, cluster, monkeypatch, tmp_path
):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    directory = tmp_path / "a sweep"
    file = write_settings(
        tmp_path / "s.yaml",
        run={"dir": str(directory)},
        sft={"iterations": 5},
        train={"iterations": 2},
        evaluation={"interval": 0},
        launch={"gpus_per_node": 0, "cpus_per_task": 2, "restarts": 0, "launcher": "torchrun"},
        resilience={"idle_attempts": 1},
    )
    grid = f"optimizer.learning_rate=[{', '.join(RATES)}]"
    status, printed, errors = launch(file, "--nodes", 1, "--sweep", grid)
    assert (status, errors) == (0, "")
    table = re.findall(r"(?m)^job     \d+, and (\d+) for the table$", printed)[0]
    cluster.wait(table, "COMPLETED", timeout=500)
    members = json.loads((directory / "summary.json").read_text())["members"]
    assert sorted((m["name"], m["state"], m["iterations"]) for m in members) == [
        ("00", "finished", "rl 2/2"),
        ("01", "finished", "rl 2/2"),
        ("02", "failed", "sft 5/5"),
        ("03", "finished", "rl 2/2"),
    ]
    assert [m["settings"]["optimizer.learning_rate"] for m in members if m["error"]] == ["1e38"]
    failed = members[-1]
    assert failed["name"] == "02" and "without overflow" in failed["error"]
    assert failed["error"] in (directory / "summary.md").read_text()
    assert "without overflow" in Path(failed["log"]).read_text()
    assert all(m["after"] is not None for m in members[:3])
    status, printed, _ = launch(file, "--nodes", 1, "--dry-run", "--sweep", grid)
    assert status == 0 and " --array=2 " in printed and "#   03 " in printed
    assert (directory / "03" / "report.html").is_file()
