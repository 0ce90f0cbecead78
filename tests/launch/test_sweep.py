"""Sweeps: the grid, its members, and the arguments of their job."""

import subprocess
import sys

import pytest
import yaml

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.launch.submit import ranges
from agrpo_megatron.launch.sweep import (
    SWEEP,
    check_directory,
    flow,
    make_sweep,
    read_grid,
    read_sweep,
)
from tests.cli.test_main import ROOT


def test_a_grid_is_read_from_arguments_and_from_files(tmp_path):
    file = tmp_path / "grid=1.yaml"
    file.write_text("optimizer: {learning_rate: [1e-4, 3e-4]}\nrun.seed: [0, 1]\n")
    expected = {"optimizer.learning_rate": ["1e-4", "3e-4"], "run.seed": [0, 1]}
    assert read_grid([str(file)]) == expected
    assert read_grid(["optimizer.learning_rate=[1e-4,3e-4]", "run.seed=[0, 1]"]) == expected
    both = read_grid([str(file), "evaluation.steps=[[1, 2], null]"])
    assert both == {**expected, "evaluation.steps": [[1, 2], None]}
    assert set(read_grid([str(ROOT / "examples" / "sweep.yaml")])) == {
        "optimizer.learning_rate",
        "run.seed",
    }


WRONG = {
    "run.seed=3": "--sweep run.seed=3 is not a list of values; write run.seed=[3, ...]",
    "run.seed=[]": "--sweep run.seed=[] is not a list of values",
    "run.seed=": "--sweep run.seed=null is not a list",
    "run.seed=[1, 2, 1]": "--sweep run.seed has 1 twice; write it once",
    "run.dir=[a, b]": "--sweep run.dir cannot differ: each member has its own",
    "launch.time=[1, 2]": "--sweep launch.time cannot differ: all members are one job",
    "run.seed=[1": "override 'run.seed=[1': the value is not valid YAML; quote it",
    "nowhere.yaml": "settings file nowhere.yaml: No such file or directory",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_grid_that_is_none_is_refused(text):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_grid([text])
    assert str(error.value).startswith(WRONG[text])
    with pytest.raises(ValueError, match="--sweep run.seed is given twice"):
        read_grid(["run.seed=[1]", "run.seed=[2]"])


def test_members_are_all_combinations_the_last_key_fastest():
    sweep = make_sweep("a.yaml", ["run.threads=1"], {"x.a": [1, 2], "y.b": ["p", None, [3]]})
    assert sweep.members == {
        "00": {"x.a": 1, "y.b": "p"},
        "01": {"x.a": 1, "y.b": None},
        "02": {"x.a": 1, "y.b": [3]},
        "03": {"x.a": 2, "y.b": "p"},
        "04": {"x.a": 2, "y.b": None},
        "05": {"x.a": 2, "y.b": [3]},
    }
    assert list(make_sweep("a.yaml", [], {"x": list(range(101))}).members)[-1] == "100"


HOSTILE = ["it's", "a b", "- x", "{", "null", "1e-4", "10:00:00", 'say "so"', "$x", "caf\u00e9", ""]


@pytest.mark.parametrize("value", [*HOSTILE, None, True, 3, 1e-4, [1, "a, b"], {"k": [None]}])
def test_a_value_on_a_line_reads_back(value):
    text = flow(value)
    assert "\n" not in text and yaml.safe_load(text) == value


def test_a_member_is_told_to_bash_word_by_word(tmp_path):
    """The words that bash reads give the settings of the member, spaces and quotes included."""
    directory = tmp_path / "it's a $weep"
    directory.mkdir()
    texts = ["task.name=[countdown]", "optimizer.learning_rate=[1e-4, 3e-4]"]
    sweep = make_sweep(ROOT / "examples/tiny.yaml", ["run.dir=no", "run.seed=7"], read_grid(texts))
    (directory / SWEEP).write_text(sweep.text())
    assert read_sweep(directory) == sweep
    script = """
        mapfile -d '' -t words < <("$1" -m agrpo_megatron.launch "$2" 1)
        printf '%s\\n' "${words[@]}"
    """
    command = ["bash", "-c", script, "bash", sys.executable, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    file, *overrides = done.stdout.splitlines()
    settings = load(Settings, file, overrides)
    assert settings.run.dir == str(directory / "01")
    assert (settings.run.seed, settings.optimizer.learning_rate) == (7, 3e-4)


def test_a_wrong_member_or_directory_is_one_line(tmp_path):
    def call(*words):
        command = [sys.executable, "-m", "agrpo_megatron.launch", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    nothing = call(tmp_path, 0)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr == (
        f"agrpo: error: {tmp_path} holds no sweep.yaml; give the directory of a sweep\n"
    )
    (tmp_path / SWEEP).write_text(make_sweep("a.yaml", [], {"run.seed": [1, 2]}).text())
    assert call(tmp_path, 2).stderr == f"agrpo: error: {tmp_path} has members 0 to 1\n"
    assert "either I or --table" in call(tmp_path).stderr


def test_a_directory_keeps_its_sweep(tmp_path):
    sweep = make_sweep("a.yaml", [], {"run.seed": [1, 2]})
    check_directory(tmp_path, sweep)
    (tmp_path / SWEEP).write_text(sweep.text())
    check_directory(tmp_path, make_sweep("a.yaml", ["logging.live=false"], {"run.seed": [1, 2]}))
    with pytest.raises(ValueError, match="holds another sweep; choose another run.dir"):
        check_directory(tmp_path, make_sweep("a.yaml", [], {"run.seed": [1, 3]}))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="holds a run, not a sweep"):
        check_directory(run, sweep)


def test_an_array_names_its_members_shortly():
    assert [ranges(n) for n in ([0], [0, 1, 2], [0, 2, 3, 5], [1, 3])] == [
        "0",
        "0-2",
        "0,2-3,5",
        "1,3",
    ]
