"""The measurements of `tools/gpu_check.py` run, rehearsed with replacement kernels.

On a GPU the tool itself runs before the tests, so this does not.
"""

import sys
from importlib.util import find_spec

import pytest

from tests.gpu.common import REHEARSES, ROOT, in_fresh_process
from tools.gpu_jobs import JOBS, QUARTER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSES, reason="tools/gpu_check.py itself runs on a GPU"),
    pytest.mark.skipif(
        find_spec("transformer_engine") is None,
        reason="tests/test_gpu_check.py rehearses the tool without Transformer Engine",
    ),
]


def _all_jobs():
    sys.path.insert(0, str(ROOT / "tools"))
    from gpu_timing import run_job

    return {job.name: run_job(job, is_rehearsal=True) for job in JOBS}


def test_every_job_measures_or_says_why_not():
    found = in_fresh_process(_all_jobs)
    for name, result in found.items():
        if "refused" in result:
            assert "kernels." in result["refused"] or "precision" in result["refused"], name
            continue
        speeds = [result[part] for part in ("rollout", "update") if part in result]
        speeds += result.get("graphs", [])
        assert name == "ceiling" or speeds
        assert all(speed["tokens_per_second"] > 0 and speed["tflops"] > 0 for speed in speeds)
    assert "update" in found["local bf16"] and found["ceiling"]["ceilings"]["bf16"] > 0
    # All are given the same rows, or a quarter of them.
    for fewer in (1, QUARTER):
        names = [job.name for job in JOBS if job.fewer == fewer and "rollout" in found[job.name]]
        sizes = {found[name]["rollout"]["tokens"] for name in names}
        assert len(names) > 1 and len(sizes) == 1, names
