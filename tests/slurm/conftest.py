"""A SLURM cluster for the tests of this folder, one per test process; settings of their runs."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running_cluster, what_is_missing
from tests.slurm.jobs import settings_file


@contextlib.contextmanager
def cluster_or_skip(**options: int) -> Iterator[Cluster]:
    """Run a cluster of four nodes where one can run; else skip, or fail where it is required."""
    missing = what_is_missing()
    if missing is not None:
        if os.environ.get("AGRPO_REQUIRE_SLURM"):
            pytest.fail(f"AGRPO_REQUIRE_SLURM is set, but {missing}")
        pytest.skip(missing)
    folder = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
    with folder as name, running_cluster(Path(name), **options) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Run a cluster until the last test of this process is over."""
    with cluster_or_skip() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with settings, whose path has a space."""
    folder = tmp_path_factory.mktemp("a folder")
    settings_file(folder)
    return folder
