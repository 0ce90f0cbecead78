"""The recipes plan on a machine without their weights, and name the files that a run needs."""

import json
from pathlib import Path

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.families import FAMILIES
from agrpo_megatron.families.config_json import INDEX
from agrpo_megatron.runs.resolve import resolve
from tests.cli.test_main import ROOT
from tests.test_recipes import NO_WEIGHTS
from tests.text.chat_tokenizers import write_llada

EXAMPLES = ROOT / "examples"
RECIPES = {"llada_8b/gsm8k": 1, "sdar_8b/math": 1, "nemotron_14b/gsm8k": 2}  # nodes
RECIPES |= {"sdar_30b/math_4_nodes": 4, "llada2_flash/gsm8k": 16}
SHARDS = [f"model-{number:05d}-of-00012.safetensors" for number in range(1, 13)]
ROW = {"problem": "1 + 1", "question": "1 + 1", "answer": "#### 2"}


@pytest.fixture(params=RECIPES)
def recipe(request, tmp_path, no_slurm):
    """Return a recipe with data of its own: file, overrides, nodes, and config.json's text."""
    file, words = EXAMPLES / f"{request.param}.yaml", [f"run.dir={tmp_path / 'run'}"]
    for split in ("train", "eval"):
        data = tmp_path / f"{split}.jsonl"
        data.write_text(json.dumps(ROW | {"question": split, "problem": split}))
        words.append(f"task.options.{split}={data}")
    model = load(Settings, file, [NO_WEIGHTS]).model
    config = json.dumps(FAMILIES[model.family].config(model))
    return file, words, RECIPES[request.param], config


@pytest.fixture
def plans(recipe, capsys):
    """Return a function that plans a recipe by both commands; returns the lines on what lacks."""
    file, words, nodes, _ = recipe

    def call(source):
        given = [str(file), f"model.load={source}", *words]
        assert main(["config", *given, "--ranks", str(8 * nodes)]) == 0
        printed, noted = capsys.readouterr()
        assert f"  load: {source}\n" in printed
        assert main(["launch", *given, "--nodes", str(nodes), "--dry-run"]) == 0
        script, errors = capsys.readouterr()
        assert errors == "" and "GiB in the fullest rank" in script
        line = noted.removeprefix("note: ")
        assert line.count("\n") == 1 and f"# missing   {line}" in script
        assert main(["launch", *given, "--nodes", str(nodes)]) == 2
        printed, refused = capsys.readouterr()
        assert printed == "" and refused.startswith(f"agrpo: error: {line.strip()}; put there what")
        with pytest.raises(
            ValueError, match=r"tokenizer.path=|is not a directory|shard .* is missing"
        ):
            resolve(load(Settings, file, given[1:]), world_size=8 * nodes)
        return line.strip()

    return call


def test_a_recipe_plans_from_config_json_alone(recipe, plans, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(recipe[3])
    said = f"model.load={folder}: the folder lacks %s, tokenizer.json; planned with its config.json"
    said += ", prompts are not checked"
    assert plans(folder) == said % "*.safetensors"
    files = {f"tensor {name}": name for name in SHARDS}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / SHARDS[0]).write_text("")
    assert plans(folder) == said % f"{', '.join(SHARDS[1:9])}, 3 more shards"
    (folder / SHARDS[-1]).write_text("")
    (folder / SHARDS[-2]).write_text("four")
    assert plans(folder) == said % ", ".join(SHARDS[1:10])
    index = {"metadata": {"total_size": 1004}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))
    sizes = "(about 1 kB of 1 kB)"
    assert plans(folder) == said % f"{', '.join(SHARDS[1:10])} {sizes}"


def test_a_recipe_plans_from_its_shapes_without_the_folder(plans, tmp_path):
    folder = tmp_path / "nowhere"
    assert plans(folder) == (
        f"model.load={folder}: the folder is missing; planned with the shapes of the settings "
        "file, prompts are not checked"
    )


def test_a_plan_without_shapes_is_refused(recipe, launch):
    _, (run, *_), nodes, _ = recipe
    source = "model.load=/nowhere"
    bare = ROOT / "examples" / "tiny.yaml"
    words = ["model=null", source, run]
    status, printed, errors = launch(bare, "--nodes", nodes, "--dry-run", *words)
    assert (status, printed) == (2, "") and f"{source} is not a directory" in errors


def test_with_a_tokenizer_the_prompts_are_checked(launch, no_slurm, tmp_path):
    """Also where the weights are missing, and where the tokenizer is a folder of its own."""
    folder, file = write_llada(tmp_path / "weights"), EXAMPLES / "llada_8b" / "gsm8k.yaml"
    model = load(Settings, file, [NO_WEIGHTS]).model
    (folder / "config.json").write_text(json.dumps(FAMILIES["llada"].config(model)))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ROW | {"question": "x" * 4000}))
    words = [f"task.options={{train: {data}, eval: {data}}}", "task.leaks=keep"]
    words += [f"run.dir={tmp_path / 'run'}"]
    for source in ([f"model.load={folder}"], ["model.load=nowhere", f"tokenizer.path={folder}"]):
        status, _, errors = launch(file, "--nodes", 1, "--dry-run", *words, *source)
        assert status == 2 and "1 of 1 training problems have prompts over" in errors
        drop = "model.max_sequence_length=8192"
        status, script, errors = launch(file, "--nodes", 1, "--dry-run", *words, *source, drop)
        assert (status, errors) == (0, "")
        assert f"# missing   {source[0]}: " in script and "prompts" not in script
    assert not Path(tmp_path / "run").exists()
