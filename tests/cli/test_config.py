"""`agrpo config`: its references, in this process."""

import pytest
import yaml

from agrpo_megatron.cli.common import run_file
from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.reports.reference import metrics_page, settings_page
from tests.cli.test_main import write_settings


def agrpo(capsys, *arguments):
    """Return the exit status of `agrpo config` and what it printed."""
    status = main(["config", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_pages_are_printed_as_they_are_kept(capsys):
    assert agrpo(capsys, "--markdown") == (0, settings_page(), "")
    assert agrpo(capsys, "--metrics", "--markdown") == (0, metrics_page(), "")


def test_tasks_and_sections_are_explained_and_a_file_is_resolved(capsys, tmp_path):
    _, tasks, _ = agrpo(capsys, "--tasks")
    assert "task.name=countdown" in tasks and "task.options.clues" in tasks
    _, part, _ = agrpo(capsys, "--section", "checkpoint")
    assert "checkpoint.keep" in part and "run.dir" not in part
    status, checked, _ = agrpo(capsys, str(write_settings(tmp_path / "s.yaml")), "run.seed=7")
    resolved = yaml.safe_load(checked)
    assert status == 0 and resolved["run"]["seed"] == 7
    assert resolved["model"]["mask_token_id"] is not None


def test_metrics_are_explained_whole_or_by_prefix(capsys):
    _, whole, _ = agrpo(capsys, "--metrics")
    assert "Rewards and accuracy" in whole and "alarm/<name>" in whole
    status, part, _ = agrpo(capsys, "--metrics", "--section", "zero_adv")
    assert status == 0 and "zero_advantage_fraction" in part and "alarm/" not in part


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "--section", "loos"], "no metric begins with loos; did you mean loss?"),
        (["a.yaml", "--metrics"], "agrpo config a.yaml checks a file"),
        (["--tasks", "--markdown"], "--tasks prints the options of all tasks"),
        (["--markdown", "--section", "run"], "--markdown prints a whole page"),
    ],
)
def test_options_that_exclude_each_other_are_refused(capsys, arguments, said):
    status, printed, error = agrpo(capsys, *arguments)
    assert (status, printed) == (2, "") and error.startswith(f"agrpo: error: {said}")


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ([], (8, 3.0)),
        (["sft.epochs=5"], (0, 5.0)),
        (["sft.iterations=20"], (20, None)),
        (["sft.iterations=20", "sft.epochs=5"], (20, 5.0)),
        (["sft.epochs=null"], (8, None)),
    ],
)
def test_one_length_of_the_supervised_phase_replaces_the_other_of_a_run(tmp_path, words, length):
    """A run's file has its epochs, and the iterations that they took."""
    (tmp_path / "config.yaml").write_text("sft: {iterations: 8, epochs: 3}\n")
    sft = load(Settings, *run_file(str(tmp_path), words)).sft
    assert (sft.iterations, sft.epochs) == length
