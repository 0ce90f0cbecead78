"""Run a test function where Triton interprets its kernels: on a CPU, on one or more gloo ranks.

`tests.ranks` cannot: Triton decides when it is imported, and its server has imported it. So each
rank is a new interpreter, which takes seconds to start.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import call_in_group

ROOT = Path(__file__).parent.parent


def run_interpreted(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a module's function on `ranks` ranks and return what each returned, by rank."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    given = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="interpreted-") as name:
        folder = Path(name)
        job = (function.__module__, function.__qualname__, args)
        (folder / "job").write_bytes(pickle.dumps(job))
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.interpreter", name, str(rank), str(ranks)],
                env={**os.environ, **given},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            printed = [rank.communicate(timeout=300)[0] for rank in started]
        finally:
            for rank in started:
                rank.kill()
        assert not any(rank.returncode for rank in started), "\n".join(printed)[-6000:]
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(ranks)]


def _be_a_rank(folder: Path, rank: int, ranks: int) -> None:
    result = call_in_group(folder, rank, ranks)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _be_a_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
