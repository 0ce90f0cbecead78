"""Evaluation over a grid: resumable, the same under any layout, batch and order of cells."""

import json
import os
import shutil
import signal
from itertools import combinations

import pytest
import torch.distributed as dist

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.evaluate import evaluate_grid
from agrpo_megatron.evaluation.grid import RESULTS
from agrpo_megatron.evaluation.open import opened
from agrpo_megatron.evaluation.plan import plan_evaluation
from agrpo_megatron.evaluation.results import COMPLETIONS, ResultStore
from agrpo_megatron.runs.progress import RUN_SETTINGS, checkpoint_path
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.training.run import train
from tests.cli.test_main import call
from tests.ranks import run_ranks
from tests.training.tiny import silent_view, tiny

# Sudoku with partial credit, and just enough supervision to write digits: scores differ even
# where no completion is right. Three batches of two problems at each of four cells.
RUN = ["task.name=sudoku", "task.options={clues: 10, partial_credit: 1.0}", "sft.iterations=40"]
RUN += ["sft.optimizer.learning_rate=2e-2", "task.seed=3"]
RUN += ["sampling.completion_length=16", "train.iterations=0", "algorithm.mc_samples=2"]
GRID = ["evaluation.completion_lengths=[16, 20]", "evaluation.tokens_per_step=[1, 4]"]
GRID += ["evaluation.batch_size=2", "evaluation.temperature=1", "evaluation.unmasking=random"]
CELLS, BATCHES, PROBLEMS = 4, 12, 6


def _train(run_dir):
    train(resolve(tiny(*RUN, f"run.dir={run_dir}"), world_size=1), silent_view())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a run with a checkpoint."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_ranks(1, _train, directory)
    return directory


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in(moment, number):
    """Kill the process in the so-many-th call of a method of the store, half way through it."""
    own, calls = getattr(ResultStore, moment), []

    def stand_in(self, what):
        calls.append(moment)
        if len(calls) < number:
            return own(self, what)
        if moment == "append":
            own(self, what)
            path = self.directory / COMPLETIONS
            os.truncate(path, path.stat().st_size - 20)
        _die()

    setattr(ResultStore, moment, stand_in)


def _evaluate(run_dir, output, overrides, kill=None):
    """Evaluate on this rank; returns what was shown and the results, on the main rank."""
    if kill is not None:
        _kill_in(*kill)
    settings = load(Settings, run_dir / RUN_SETTINGS, overrides)
    store = ResultStore(output)
    plan = plan_evaluation(
        settings,
        checkpoint=checkpoint_path(run_dir),
        label="tiny",
        world_size=dist.get_world_size(),
        stored=store.stored(),
    )
    store.check(plan.evaluation)
    shown, ticks = [], []
    with opened(plan.resolved, plan.checkpoint) as (session, network):
        show, tick = shown.append, lambda number, share: ticks.append((number, share))
        results = evaluate_grid(session, network, plan, store, show, tick)
    if kill is None and os.environ["WORLD_SIZE"] == "1" and shown:
        assert ticks == sorted(ticks), "batch after batch, each from little to all"
        assert [share for number, share in ticks if number == ticks[-1][0]][-1] == 1.0
        assert len(ticks) > 2 * len(shown)
    return shown, results


def _files(output):
    return [(output / name).read_text() for name in (RESULTS, COMPLETIONS)]


def _lines(output):
    return [json.loads(line) for line in (output / COMPLETIONS).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Return the directory of an evaluation that was not interrupted."""
    output = tmp_path_factory.mktemp("evaluations") / "whole"
    shown, results = run_ranks(1, _evaluate, run, output, GRID)[0]
    assert len(shown) == BATCHES and results["finished"] and len(results["cells"]) == CELLS
    assert (shown[-1].work_done, shown[0].work_before) == (1.0, 0.0)
    return output


def test_the_evaluation_tells_completions_apart(whole):
    """Or else every comparison below would pass for the wrong reason."""
    lines = _lines(whole)
    assert len(lines) == CELLS * PROBLEMS
    assert len({line["completion"] for line in lines}) > CELLS * PROBLEMS // 2
    assert len({line["score"] for line in lines}) > 2
    assert all(line["input"] == line["prompt"] for line in lines), "these prompts are plain texts"


KILLS = {
    "in the first batch": ("append", 1),
    "between two cells, with a torn last line": ("append", 4),
    "in the middle of a cell": ("append", 8),
    "before results are written": ("write", 2),
    "in the last batch": ("append", BATCHES),
    "before it has begun": ("begin", 1),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_evaluation_ends_with_the_same_bytes(run, whole, tmp_path, name):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _evaluate, run, tmp_path / "cut", GRID, KILLS[name])
    cut = tmp_path / "cut" / COMPLETIONS
    left = len(cut.read_text().splitlines()) if cut.exists() else 0
    assert left <= CELLS * PROBLEMS
    shown, _ = run_ranks(1, _evaluate, run, tmp_path / "cut", GRID)[0]
    done = left // 2 - (KILLS[name][0] == "append")  # a torn batch is answered again
    assert len(shown) == BATCHES - max(0, done)
    assert _files(tmp_path / "cut") == _files(whole)


def test_an_evaluation_goes_on_under_another_layout(run, whole, tmp_path):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _evaluate, run, tmp_path / "cut", GRID, ("append", 5))
    run_ranks(2, _evaluate, run, tmp_path / "cut", GRID)
    assert _files(tmp_path / "cut") == _files(whole)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_two_ranks_write_what_one_writes(run, whole, tmp_path, layout):
    overrides = [*GRID, f"parallel={layout}"]
    _, (shown, results) = run_ranks(2, _evaluate, run, tmp_path / layout, overrides)
    assert (shown, results["cells"]) == ([], []), "one rank speaks"
    assert _files(tmp_path / layout) == _files(whole)


def test_batches_and_other_cells_change_no_completion(run, whole, tmp_path):
    alone = [*GRID, "evaluation.completion_lengths=[20]", "evaluation.batch_size=null"]
    run_ranks(1, _evaluate, run, tmp_path / "alone", alone)
    expected = [line for line in _lines(whole) if line["completion_length"] == 20]
    assert _lines(tmp_path / "alone") == expected
    cells = json.loads((whole / RESULTS).read_text())["cells"]
    ours = json.loads((tmp_path / "alone" / RESULTS).read_text())["cells"]
    assert ours == [cell for cell in cells if cell["completion_length"] == 20]


def test_the_first_of_several_samples_is_the_only_one_of_one(run, whole, tmp_path):
    overrides = [*GRID, "evaluation.samples=3"]
    _, results = run_ranks(1, _evaluate, run, tmp_path / "three", overrides)[0]
    lines = _lines(tmp_path / "three")
    assert [line for line in lines if line["sample"] == 0] == _lines(whole)
    by_problem = {}
    for line in lines[: 3 * PROBLEMS]:
        by_problem.setdefault(line["key"], set()).add(line["completion"])
    assert max(map(len, by_problem.values())) == 3, "samples of a problem differ"
    for cell in results["cells"]:
        assert list(cell["pass_at"]) == ["1", "2", "3"]
        assert cell["pass_at"]["1"]["value"] == pytest.approx(cell["accuracy"])


def test_tasks_at_once_are_each_what_they_are_alone(run, whole, tmp_path):
    tasks = "{sudoku: {options: {clues: 10, partial_credit: 1.0}}, sums: {name: countdown}}"
    overrides = [*GRID, f"evaluation.tasks={tasks}"]
    _, results = run_ranks(1, _evaluate, run, tmp_path / "both", overrides)[0]
    assert [cell["task"] for cell in results["cells"]] == ["sudoku"] * CELLS + ["sums"] * CELLS
    alone = json.loads((whole / RESULTS).read_text())["cells"]
    assert results["cells"][:CELLS] == alone
    lines = _lines(tmp_path / "both")
    assert lines[0]["key"] == f"sudoku: {_lines(whole)[0]['key']}"
    assert {line["task"] for line in lines} == {"sudoku", "sums"}


def test_training_problems_are_rewarded_as_in_training(run, tmp_path):
    overrides = [*GRID, "evaluation.split=train", "evaluation.completion_lengths=null"]
    overrides += ["evaluation.tokens_per_step=[4]", "evaluation.batch_size=null"]
    _, results = run_ranks(1, _evaluate, run, tmp_path / "train", overrides)[0]
    (cell,) = results["cells"]
    assert cell["problems"] == 24
    settings = load(Settings, run / RUN_SETTINGS)
    task = resolve(settings, world_size=1).task
    problems = {problem.key: problem for problem in task.problems("train")}
    for line in _lines(tmp_path / "train"):
        assert task.reward(problems[line["key"]], line["completion"]).score == line["score"]


def test_something_else_is_refused_and_named(run, whole):
    for change, said in (
        ("evaluation.temperature=0.5", "sampling.temperature=1.0, not 0.5"),
        ("run.seed=1", "seed=0, not 1"),
        ("task.options.clues=9", "tasks.sudoku.options.clues=10, not 9"),
        ("evaluation.samples=2", "samples=1, not 2"),
    ):
        settings = load(Settings, run / RUN_SETTINGS, [*GRID, change])
        plan = plan_evaluation(
            settings, checkpoint=checkpoint_path(run), label="tiny", world_size=1
        )
        with pytest.raises(ValueError, match="holds an evaluation with") as error:
            ResultStore(whole).check(plan.evaluation)
        assert said in str(error.value) and "--restart" in str(error.value)


def test_the_recipe_of_fp8_decides_about_completions(run):
    evaluated = []
    for precision in ("bf16", "fp8", "fp8 fp8.recipe=tensorwise", "fp8 fp8.bf16_last_layers=1"):
        overrides = [*GRID, *f"precision={precision}".split()]
        settings = load(Settings, run / RUN_SETTINGS, overrides)
        plan = plan_evaluation(settings, checkpoint=checkpoint_path(run), label="", world_size=1)
        evaluated.append(plan.evaluation["evaluates"])
    assert "fp8" not in evaluated[0]
    assert all(a != b for a, b in combinations(evaluated, 2))


def test_completions_that_were_changed_by_hand_are_refused(run, whole, tmp_path):
    run_ranks(1, _evaluate, run, tmp_path / "hand", GRID)
    path = tmp_path / "hand" / COMPLETIONS
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rest, first]))
    with pytest.raises(AssertionError, match="completions.jsonl was changed from line 1 on"):
        run_ranks(1, _evaluate, run, tmp_path / "hand", GRID)


DAMAGES = {"half of it": lambda line: line[:40], "a key": lambda line: '{"key": "5"}'}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_line_is_one_error_on_every_rank(run, whole, tmp_path, name):
    output = tmp_path / "damaged"
    shutil.copytree(whole, output)
    lines = (output / COMPLETIONS).read_text().splitlines()
    lines[3] = DAMAGES[name](lines[3])
    (output / COMPLETIONS).write_text("\n".join(lines[:9]) + "\n")
    (output / RESULTS).unlink()
    command = ["evaluate", run, "--output", output, *GRID]
    said = f"{output / COMPLETIONS} was changed from line 4 on; --restart starts it again"
    (status, printed), (other, nothing) = run_ranks(2, call, command, tmp_path)
    assert (status, other, nothing) == (2, 2, "")
    assert printed.endswith(f"agrpo: error: {said}\n") and "Traceback" not in printed


OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem, Reward


class Own(Task):
    name = "own"

    def load(self):
        fields = {"gold": {GOLD}, "one of": {"a", "b", "c"}, "made by": object()}
        return {"train": [], "eval": [Problem("1", fields, "2")]}

    def prompt(self, problem):
        return "1="

    def reward(self, problem, completion):
        return Reward(0.0, False)
"""


def _evaluates(file):
    settings = tiny(f"task.name={file}", "task.options={}", f"model.load={file.parent / 'run'}")
    plan = plan_evaluation(settings, checkpoint=file.parent, label="", world_size=1)
    return plan.evaluation["evaluates"]["tasks"]["own"]


def test_golds_and_the_code_that_grades_are_part_of_what_is_evaluated(run, tmp_path):
    file = tmp_path / "own.py"
    (tmp_path / "run").symlink_to(run)
    file.write_text(OWN.replace("{GOLD}", "2"))
    (first,), (again,) = (run_ranks(1, _evaluates, file) for _ in range(2))
    assert first == again, "another process says the same"
    file.write_text(OWN.replace("{GOLD}", "3"))
    (other,) = run_ranks(1, _evaluates, file)
    assert {key for key in first if first[key] != other[key]} == {"graded", "file"}
    file.write_text(OWN.replace("{GOLD}", "2").replace("0.0", "0.5"))
    (other,) = run_ranks(1, _evaluates, file)
    assert {key for key in first if first[key] != other[key]} == {"file"}


def test_metrics_of_the_training_tasks_are_not_asked_of_others(run):
    chosen = ["checkpoint.best=accuracy/a", "train.stop_metric=accuracy/a", "train.stop_target=1"]
    settings = load(Settings, run / RUN_SETTINGS, [*GRID, *chosen, "evaluation.tasks={sudoku: {}}"])
    plan = plan_evaluation(settings, checkpoint=checkpoint_path(run), label="", world_size=1)
    assert list(plan.tasks) == ["sudoku"]


def _train_mixture(run_dir):
    tasks = "task.mixture={sums: {name: countdown}, small: {name: sudoku, options: {clues: 12}}}"
    options = ["task.name=mixture", tasks, "task.options={}", "evaluation.unmasking=random"]
    settings = tiny(*RUN, *options, f"run.dir={run_dir}", "train.iterations=1")
    train(resolve(settings, world_size=1), silent_view())


def test_a_mixture_is_evaluated_as_it_was_in_training(tmp_path):
    """The order of unmasking is random, so the noise of every problem has to be the same."""
    run_ranks(1, _train_mixture, tmp_path / "run")
    _, results = run_ranks(1, _evaluate, tmp_path / "run", tmp_path / "again", [])[0]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "after"
    assert [cell["task"] for cell in results["cells"]] == ["sums", "small"]
    for cell in results["cells"]:
        assert cell["accuracy"] == last[f"accuracy/{cell['task']}"]
        assert cell["score"] == pytest.approx(last[f"reward/{cell['task']}/mean"])
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    shown = [sample for line in samples if (sample := json.loads(line))["phase"] == "eval"]
    written = {line["prompt"]: line["completion"] for line in _lines(tmp_path / "again")}
    latest = [sample for sample in shown if sample["stage"] == "after"]
    assert latest
    for sample in latest:
        assert written[sample["prompt"]] == sample["completion"]
