"""`agrpo config`: its references, in this process."""

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.reports.reference import metrics_page, settings_page


def agrpo(capsys, *arguments):
    """Return the exit status of `agrpo config` and what it printed."""
    status = main(["config", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_pages_are_printed_as_they_are_kept(capsys):
    assert agrpo(capsys, "--markdown") == (0, settings_page(), "")
    assert agrpo(capsys, "--metrics", "--markdown") == (0, metrics_page(), "")


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
