"""The recipes load, fit their machines, say where each value comes from, and are as published."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.grid import evaluation_grid
from agrpo_megatron.families.lora import adapted_layers
from agrpo_megatron.launch.speed import LEAST, SKIPPED
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.scaling.memory import worst_rank
from agrpo_megatron.tasks import build_task

FOLDER = Path(__file__).parent.parent / "examples" / "llada_8b"
TASKS = ("gsm8k", "math", "countdown", "sudoku")
RANKS = {
    **dict.fromkeys(TASKS, 8),
    "gsm8k_full": 8,
    "gsm8k_fp8": 8,
    "gsm8k_one_gpu": 1,
    "smoke": 8,
    "one_gpu": 1,
    "evaluate_d1": 8,
    **{f"{task}_4_nodes": 32 for task in TASKS},
}
ALL = [*RANKS, "base", "model"]
NO_WEIGHTS = "model.load=null"  # the architecture of model.yaml, without the weights
SOURCES = ("train.yaml", "code", "data", "evaluation", "d1", "config.json", "ours")

# What AGRPO's release sets, by our names.
PUBLISHED = {
    "precision": "bf16",
    "run.seed": 333,
    "task.name": "gsm8k",
    "task.options": {"protocol": "agrpo"},
    "sampling.completion_length": 384,
    "sampling.block_length": 12,
    "sampling.denoising_steps": 128,
    "sampling.unmasking": "random",
    "sampling.temperature": 0.6,
    "sampling.top_k": 150,
    "sampling.top_p": 0.99,
    "sampling.truncation": "top_k_first",
    "sampling.early_end": True,
    "algorithm.name": "agrpo",
    "algorithm.prompts_per_iteration": 16,
    "algorithm.group_size": 8,
    "algorithm.mc_samples": 24,
    "algorithm.step_sampler": "batch",
    "algorithm.proposal": "entropy",
    "algorithm.uniform_mix": 0.0,
    "algorithm.enumerate_short": False,
    "algorithm.live_steps": "text",
    "algorithm.baseline": "mean",
    "algorithm.scale_by_std": False,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.kl_coefficient": 0.0,
    "algorithm.normaliser": "live_steps",
    "algorithm.updates_per_iteration": 1,
    "algorithm.resample_rounds": 0,
    "lora.rank": 64,
    "lora.alpha": 64.0,
    "lora.dropout": 0.0,
    "lora.rank_stabilised": False,
    "lora.train_embedding": False,
    "lora.train_head": False,
    "optimizer.learning_rate": 5e-6,
    "optimizer.decay": "cosine",
    "optimizer.min_learning_rate": 0.0,
    "optimizer.warmup_iterations": 23,
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.99,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "train.iterations": 2335,
    "checkpoint.interval": 15,
    "evaluation.temperature": 0.0,
    "evaluation.unmasking": "low_confidence",
    "evaluation.block_length": 32,
    "evaluation.completion_lengths": [256],
    "evaluation.tokens_per_step": [2],
    "sft.iterations": 0,
}
OURS = {"sampling.forbid_mask_token": True}


def recipe(name, *overrides):
    return load(Settings, FOLDER / f"{name}.yaml", overrides)


def value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def test_every_file_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(ALL)


@pytest.mark.parametrize("name", RANKS)
def test_a_recipe_is_valid_on_the_machine_it_names(name):
    settings = recipe(name, NO_WEIGHTS)
    validate(settings, RANKS[name])
    build_task(settings.task)
    evaluation_grid(settings)
    replicas = RANKS[name] // settings.parallel.tensor
    rollouts = settings.algorithm.prompts_per_iteration * settings.algorithm.group_size
    assert rollouts % replicas == 0
    assert worst_rank(settings, RANKS[name]).total < 0.9 * 80 * 2**30


@pytest.mark.parametrize("name", [name for name in RANKS if name != "one_gpu"])
def test_weights_that_are_not_there_are_named(name, monkeypatch, tmp_path):
    settings = recipe(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model.load=models/LLaDA-8B-Instruct is not a directory"):
        validate(settings, RANKS[name])
    (tmp_path / "models" / "LLaDA-8B-Instruct").mkdir(parents=True)
    validate(settings, RANKS[name])


def test_gsm8k_is_the_published_run():
    settings = recipe("gsm8k")
    assert {key: value(settings, key) for key in PUBLISHED} == PUBLISHED
    assert {key: value(settings, key) for key in OURS} == OURS
    # Five epochs of GSM8K's training problems, and 1 % of them to warm up.
    assert settings.train.iterations == 5 * 7473 // 16
    assert settings.optimizer.warmup_iterations == settings.train.iterations // 100
    (cell,) = evaluation_grid(settings)
    assert (cell.completion_length, cell.denoising_steps) == (256, 128)


@pytest.mark.parametrize("task", TASKS)
def test_the_other_tasks_differ_in_problems_and_lengths_alone(task):
    allowed = {
        "run.dir",
        "task.name",
        "task.options",
        "task.train_problems",
        "sampling.completion_length",
        "sampling.block_length",
        "optimizer.warmup_iterations",
        "train.iterations",
        "evaluation.denoising_steps",
    }
    assert differences(recipe("gsm8k"), recipe(task)) <= allowed


@pytest.mark.parametrize("task", TASKS)
def test_on_four_nodes_each_gpu_does_as_much_and_all_see_as_many_problems(task):
    one, four = recipe(task), recipe(f"{task}_4_nodes")
    assert differences(one, four) == {
        "run.dir",
        "algorithm.prompts_per_iteration",
        "optimizer.learning_rate",
        "optimizer.warmup_iterations",
        "train.iterations",
        "evaluation.interval",
    }
    assert four.algorithm.prompts_per_iteration == 4 * one.algorithm.prompts_per_iteration
    assert four.optimizer.learning_rate == pytest.approx(4**0.5 * one.optimizer.learning_rate)
    assert four.train.iterations == pytest.approx(one.train.iterations / 4, abs=1)
    assert four.evaluation.interval * 4 == one.evaluation.interval


def test_the_published_adapters_are_on_all_linear_layers_and_the_head():
    settings = recipe("gsm8k")
    adapted = adapted_layers(settings.model, settings.lora)
    assert len(adapted) == 32 * 7 + 1 and adapted[-1].is_head


SPLIT = {"parallel.tensor", "parallel.sequence"}


def test_in_fp8_the_layout_alone_differs():
    assert differences(recipe("gsm8k"), recipe("gsm8k_fp8")) == {"run.dir", "precision", *SPLIT}


FULL = ["lora=null", "parallel=tp2-sp", "optimizer.learning_rate=1e-6", "checkpoint.interval=60"]


@pytest.mark.parametrize("name", [name for name in RANKS if name.startswith(TASKS)])
def test_four_values_train_all_weights_of_any_task(name):
    """Those of gsm8k_full.yaml, as base.yaml has them for the command line."""
    full = recipe("gsm8k_full")
    assert recipe("gsm8k", *FULL, f"run.dir={full.run.dir}") == full
    assert " ".join(FULL) in (FOLDER / "base.yaml").read_text()
    settings = recipe(name, *FULL, NO_WEIGHTS)
    ranks = max(8, RANKS[name])
    validate(settings, ranks)
    assert settings.lora.rank is None and worst_rank(settings, ranks).total < 0.9 * 80 * 2**30


def test_one_gpu_trains_the_published_adapters():
    """The same updates, in smaller micro-batches."""
    changed = {"run.dir", "train.token_budget", "evaluation.interval", "checkpoint.interval"}
    assert differences(recipe("gsm8k"), recipe("gsm8k_one_gpu")) == changed
    assert worst_rank(recipe("gsm8k"), 1).total < 0.9 * 80 * 2**30


def test_the_smoke_run_is_the_recipe_with_fewer_problems_and_iterations():
    changed = {"run.dir", "task.train_problems", "task.eval_problems", "train.iterations"}
    changed |= {"optimizer.warmup_iterations", "evaluation.interval", "checkpoint.interval"}
    assert differences(recipe("gsm8k"), recipe("smoke")) == changed
    assert recipe("smoke").train.iterations >= SKIPPED + LEAST  # its speed can be measured


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_one_gpu_runs_a_quarter_of_the_layers_with_room_and_trains_on_all_it_draws(precision):
    settings = resolve(recipe("one_gpu", f"precision={precision}"), world_size=1).settings
    whole, slice_ = recipe("model").model, settings.model
    assert differences(whole, slice_) == {"num_layers"} and slice_.load is None
    assert 4 * slice_.num_layers == whole.num_layers
    assert worst_rank(settings, 1).total < 0.85 * 80 * 2**30
    task = build_task(settings.task)
    problem = task.problems("train")[0]
    assert len(task.prompt(problem)) == 256 and task.reward(problem, "").score == 1.0
    assert settings.algorithm.baseline == "none"


def differences(one, other, prefix=""):
    """Return the keys in which two settings differ."""
    found = set()
    for name in one.__dataclass_fields__:
        mine = getattr(one, name)
        theirs = getattr(other, name)
        if hasattr(mine, "__dataclass_fields__"):
            found |= differences(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs:
            found.add(prefix + name)
    return found


def test_d1_is_evaluated_at_its_lengths_greedily_with_half_as_many_steps():
    settings = recipe("evaluate_d1")
    cells = [(c.completion_length, c.denoising_steps) for c in evaluation_grid(settings)]
    assert cells == [(128, 64), (256, 128), (512, 256)]
    chosen = settings.evaluation
    assert (chosen.temperature, chosen.block_length, settings.run.seed) == (0.0, 32, 42)
    assert chosen.unmasking == "low_confidence"
    assert list(chosen.tasks) == list(TASKS)
    assert {tree["options"]["protocol"] for tree in chosen.tasks.values()} == {"d1"}
    build_task(replace(settings.task, name="mixture", mixture=chosen.tasks, options={}))


@pytest.mark.parametrize("name", ALL)
def test_every_value_names_its_source(name):
    path = FOLDER / f"{name}.yaml"
    text = path.read_text()
    lines, numbers = text.splitlines(), set(value_lines(yaml.compose(text)))
    assert numbers
    for number in numbers:
        said = f"{path.name}:{number + 1} has no source: {lines[number]}"
        found = re.search(r" # ([a-z0-9.]+): \S.+", lines[number])
        assert found, said
        assert found[1] in SOURCES, said


def value_lines(node):
    """Yield the line of each value, from 0; the name of a base is none."""
    if not isinstance(node, yaml.MappingNode):
        yield node.start_mark.line
        return
    for key, value in node.value:
        if key.value != "base":
            yield from value_lines(value)


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_key_is_refused(name, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"base: {FOLDER / f'{name}.yaml'}\nsampling:\n  top_kk: 3\n")
    with pytest.raises(ValueError, match="sampling.top_kk is not a setting; did you mean .*top_k"):
        load(Settings, path)
