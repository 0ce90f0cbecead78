"""The simulation of scaling: a row for each number of GPUs, and a figure that says what it is."""

import subprocess
import sys

from tests.cli.test_main import ROOT


def test_scaling_is_simulated_up_to_the_most_gpus(tmp_path):
    figure = tmp_path / "scaling.png"
    command = [sys.executable, "tools/simulate_scaling.py", "llada-8b", "--most", "16"]
    done = subprocess.run(
        [*command, "--output", str(figure)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "llada-8b" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:3] for row in cells] == [
        [kind, "llada-8b", count] for kind in ("weak", "strong") for count in ("8", "16")
    ]
    seconds = [float(row[4]) for row in cells]
    # 128 completions, 256; then 2048 of them on twice as many GPUs.
    assert 0.9 < seconds[1] / seconds[0] < 1.1 and 1.8 < seconds[2] / seconds[3] < 2.1
    assert figure.read_bytes().startswith(b"\x89PNG")
