"""A reward with a bug ends the run at its first evaluation, on all ranks, with its line."""

import pytest

from tests.cli.test_main import ROOT, call, write_settings
from tests.ranks import run_ranks

TASK = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem


class Own(Task):
    def load(self):
        return {
            split: [Problem(f"{n}{split}", {"n": str(n)}, SOLUTION) for n in range(4)]
            for split in ("train", "eval")
        }

    def prompt(self, problem):
        return problem.fields["n"]

    def reward(self, problem, completion):
        return {}["boom"]
"""
LINE = TASK.splitlines().index('        return {}["boom"]') + 1


def _write(folder, solution=""):
    path = folder / "own.py"
    path.write_text(TASK.replace("SOLUTION", repr(solution)))
    run = {"dir": str(folder / "run"), "threads": 1}
    return path, write_settings(folder / "tiny.yaml", run=run)


def _assert_told(found, path, said):
    """Check status and what the main rank printed: the line, then the traceback."""
    assert [status for status, _ in found] == [2] * len(found)
    printed = found[0][1]
    assert f"{said}, the first at {path}:{LINE} (KeyError: 'boom'); fix that, or" in printed
    _, _, trace = printed.partition("Traceback (most recent call last):")
    assert f'File "{path}", line {LINE}, in reward' in trace
    assert trace.rstrip().endswith("KeyError: 'boom'")
    assert "sandbox" not in trace, "only what the user wrote"
    assert not any("Traceback" in other for _, other in found[1:])


ONLY_RL = ["sft.iterations=0", "train.iterations=1", "logging.live=false"]


def test_a_run_whose_reward_always_raises_ends_on_all_ranks(tmp_path):
    path, file = _write(tmp_path)
    command = ["train", file, f"task.name={path}", "task.options={}", *ONLY_RL]
    found = run_ranks(2, call, command, tmp_path)
    _assert_told(found, path, "4 of 4 rewards of the first evaluation failed")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_solutions_on_which_the_reward_raises_end_it_before_any_work(tmp_path):
    path, file = _write(tmp_path, solution="1")
    command = ["train", file, f"task.name={path}", "task.options={}", *ONLY_RL]
    _assert_told(
        run_ranks(1, call, command, tmp_path), path, "8 of 8 rewards of known solutions failed"
    )


@pytest.mark.parametrize("most, status", [("0.5", 2), ("1", 0)])
def test_an_evaluation_ends_too_unless_failures_are_allowed(tmp_path, most, status):
    path, _ = _write(tmp_path)
    model = ROOT / "tests" / "fixtures" / "llada_tiny" / "hf"
    command = ["evaluate", model, f"task.name={path}", f"task.grader.most_failed={most}"]
    command += [f"tokenizer.path={ROOT / 'agrpo_megatron' / 'text' / 'characters.model'}"]
    command += ["sampling.completion_length=8", "sampling.block_length=8", "run.threads=1"]
    command += ["sampling.denoising_steps=2", "--output", tmp_path / "out"]
    found = run_ranks(1, call, command, tmp_path)
    if status:
        _assert_told(found, path, "4 of 4 rewards of the first batch failed")
        assert not (tmp_path / "out" / "completions.jsonl").exists()
    else:
        assert found[0][0] == 0
