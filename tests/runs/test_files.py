"""Folders that cannot be written, and full disks: one line, and nothing left behind."""

import errno
import os
from pathlib import Path

import pytest

from agrpo_megatron.runs.files import DiskFull, check_folder, naming_full_disk


def _fail(error, *, is_hidden):
    """Raise an error; or another in its place, as a library does."""
    try:
        raise error
    except Exception:
        if is_hidden:
            raise RuntimeError("the writer failed")  # noqa: B904 - the context is tested
        raise


FOLDERS = {  # what is there before: folder, whether it can be written
    "a new folder": ("new", True),
    "a new folder in a new folder": ("a/b/c", True),
    "a folder that is there": ("there", True),
    "a link to a folder": ("link", True),
    "a relative path up and down again": ("there/../x", True),
    "a file": ("file", False),
    "below a file": ("file/run", False),
    "a link to nowhere": ("nowhere", False),
    "below a link to nowhere": ("nowhere/run", False),
    "a name that is too long": ("x" * 300, False),
    "a folder with a name that is too long": (f"a/{'x' * 300}/b", False),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_tried_and_left_as_it_was(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "nowhere").symlink_to("absent")
    before = sorted(tmp_path.rglob("*"))
    folder, fits = FOLDERS[name]
    if fits:
        check_folder(tmp_path / folder, key="run.dir")
    else:
        with pytest.raises(ValueError, match="cannot be written .*; choose another") as error:
            check_folder(tmp_path / folder, key="run.dir")
        assert str(error.value).startswith(f"run.dir={tmp_path / folder} ")
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_file_system_that_takes_no_folder_is_refused_for_root_too():
    with pytest.raises(ValueError, match=r"^run.dir=/proc/run cannot be written \(/proc: "):
        check_folder(Path("/proc/run"), key="run.dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "there").mkdir(mode=0o555)
    for path in (tmp_path / "there", tmp_path / "there" / "run"):
        with pytest.raises(ValueError, match="cannot be written"):
            check_folder(path, key="run.dir")


FULL = {
    "of a write": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "of a file": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/metrics.jsonl"),
    "of a quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "of safetensors": RuntimeError(
        "Error while serializing: No space left on device (os error 28)"
    ),
    "of a writing process": RuntimeError([ValueError("x"), OSError(28, "No space left on device")]),
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("is_hidden", [False, True])
def test_a_full_disk_is_named_with_the_folder(tmp_path, name, is_hidden):
    with pytest.raises(DiskFull) as caught, naming_full_disk(tmp_path):
        _fail(FULL[name], is_hidden=is_hidden)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path} cannot be written (") and "\n" not in said
    assert "free some space" in said


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyError("space")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, naming_full_disk(tmp_path):
        raise error
    assert caught.value is error
