"""A run plans at once without its data, and the lines on what lacks name `agrpo prefetch`."""

import json
import time

import pytest
from huggingface_hub import constants

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.rules.profile import validate_profile
from agrpo_megatron.runs.directory import plan_settings
from agrpo_megatron.runs.sizes import measure
from agrpo_megatron.tasks import row_sources
from tests.cli.test_main import ROOT
from tests.training.tiny import tiny

TINY, GSM8K = ROOT / "examples" / "tiny.yaml", ROOT / "examples" / "llada_8b" / "gsm8k.yaml"
ABSENT = "is a data set that is not on this machine, and the hub does not answer"
FETCH = "; fetch it by `agrpo prefetch FILE` where there is network"
PLANNED = "; planned with 256 held-out problems, and 256 tokens in each prompt"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Let the hub's client refuse to ask, as without network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    row_sources._hub_failure.cache_clear()
    yield
    row_sources._hub_failure.cache_clear()


def test_a_recipe_plans_at_once_without_weights_and_data_sets(capsys, no_slurm, tmp_path):
    words = [str(GSM8K), f"run.dir={tmp_path / 'run'}"]
    started = time.monotonic()
    assert main(["config", *words]) == 0
    assert row_sources._hub_failure.cache_info().misses == 1, "the hub is asked once"
    assert time.monotonic() - started < 45, "and not for half a minute for each of two sources"
    printed, noted = capsys.readouterr()
    assert "# iteration " in printed
    weights, train, held_out = noted.replace("note: ", "").splitlines()
    assert weights.startswith("model.load=models/LLaDA-8B-Instruct: the folder is missing")
    why = f"{ABSENT} (HF_HUB_OFFLINE is set){FETCH}"
    assert train == f"task.options.train=openai/gsm8k:main {why}"
    assert held_out == f"task.options.eval=madrylab/gsm8k-platinum:main {why}{PLANNED}"
    assert main(["launch", *words, "--nodes", "1", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert all(f"# missing   {line}\n" in script for line in (weights, train, held_out))
    assert main(["launch", *words, "--nodes", "1"]) == 2
    assert "(agrpo prefetch FILE), or add --dry-run" in capsys.readouterr().err


def test_a_run_is_refused_at_once_with_the_command_that_fetches(capsys, tmp_path):
    words = [str(TINY), "task=null", "task.name=gsm8k", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *words]) == 2
    said = f"madrylab/gsm8k-platinum:main {ABSENT} (HF_HUB_OFFLINE is set){FETCH}"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_lacks_each_missing_source_and_reads_the_others(tmp_path):
    rows, gone = tmp_path / "rows.jsonl", tmp_path / "gone.jsonl"
    rows.write_text(json.dumps({"prompt": "1 1", "completion": "2"}) + "\n")
    kept = tiny(f"sft.data={rows}", "sft.iterations=0", "sft.epochs=4", "sft.batch_size=1")
    assert plan_settings(kept, world_size=1).missing == ()
    task = "task={name: jsonl, eval_problems: 7, options: {train: gone.jsonl, eval: me/gone}}"
    planned = plan_settings(
        tiny("task=null", task, f"sft.data={rows}", "sft.iterations=2"), world_size=1
    )
    first, second = planned.missing
    assert first.startswith("task.options.train=gone.jsonl does not exist; give a .jsonl")
    assert second.startswith(f"task.options.eval=me/gone {ABSENT}")
    assert second.endswith("; planned with 7 held-out problems, and 256 tokens in each prompt")
    assert planned.supervised is not None and planned.task.problems("train") == []
    sizes = measure(planned)
    assert (sizes.train, sizes.held_out, len(sizes.rows)) == ([256], [256] * 7, 1)
    given = tiny(f"sft.data=[{rows}, {gone}]", "sft.iterations=0", "sft.epochs=4")
    planned = plan_settings(given, world_size=1)
    (line,) = planned.missing
    assert line.startswith(f"sft.data[1]={gone} does not exist; give")
    assert line.endswith("planned with no supervised iteration, as sft.epochs=4 needs the data")
    assert planned.supervised is None and len(planned.task.problems("train")) > 0


def test_raw_texts_that_a_plan_lacks_are_files_and_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    for named in ("gone", "empty"):
        planned = plan_settings(
            tiny("sft.format=texts", f"sft.data={tmp_path}/{named}", "sft.iterations=2"),
            world_size=1,
        )
        (line,) = planned.missing
        assert line.startswith(f"sft.data={tmp_path}/{named} names no texts; give a .jsonl, ")


def test_data_of_later_evaluations_are_noted_and_stop_no_run():
    tasks = "evaluation.tasks={mine: {name: jsonl, options: {eval: gone.jsonl}}}"
    planned = plan_settings(tiny(tasks), world_size=1)
    assert planned.missing == ()
    (line,) = planned.notes
    assert line.startswith("evaluation.tasks.mine.options.eval=gone.jsonl does not exist; give")
    assert line.endswith("; only `agrpo evaluate` reads it")
    with pytest.raises(ValueError, match="evaluation.tasks.mine.options.level is not"):
        plan_settings(tiny(tasks.replace("eval: gone.jsonl", "level: 3")), world_size=1)


def test_iterations_of_epochs_that_a_plan_does_not_know_can_be_profiled(tmp_path):
    epochs = [f"sft.data={tmp_path}/gone.jsonl", "sft.iterations=0", "sft.epochs=4"]
    words = ["profile.phase=sft", "profile.start=3"]
    planned = plan_settings(tiny(*epochs, *words), world_size=1)
    validate_profile(planned.settings, 1)
    with pytest.raises(ValueError, match="profile.start=3 is after the last iteration"):
        validate_profile(tiny(*words, "sft.iterations=2"), 1)


def test_a_data_set_in_the_cache_is_read_without_the_hub(monkeypatch):
    """The cache alone is asked, and only while the hub does not answer."""
    import datasets

    asked = []

    def load(name, config=None, **more):
        asked.append((name, config, datasets.config.HF_HUB_OFFLINE))
        return [{"question": "1 + 1"}]

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = row_sources.read_rows("me/kept:main", key="task.options.train", split="train")
    assert found == [(1, {"question": "1 + 1"})]
    assert asked == [("me/kept", "main", True)] * 2 and not datasets.config.HF_HUB_OFFLINE
