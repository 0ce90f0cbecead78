"""`agrpo prefetch` against a hub on this machine, by the hub's own client and `datasets`."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from huggingface_hub.hf_api import RepoSibling
from pyarrow import parquet

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.launch.prefetch.hub import _is_there
from agrpo_megatron.launch.prefetch.sources import overrides, sources
from agrpo_megatron.tasks import build_task
from tests.cli.test_main import ROOT
from tests.launch.hub import serving

GSM8K = ROOT / "examples" / "llada_8b" / "gsm8k.yaml"
# Several calls of `agrpo` in one process: the client reads the hub's address when it is imported.
CALLS = """
import json, sys
from agrpo_megatron.cli.main import main
for number, words in enumerate(json.loads(sys.argv[1])):
    print(f"== {number}", flush=True)
    print(f"-- {main(words)}", flush=True)
"""


def calls(address, folder, *several):
    """Return status, output and errors of several commands that ask the hub at an address."""
    words = json.dumps([[str(word) for word in each] for each in several])
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env=environment,
    )
    parts = done.stdout.split("== ")[1:]
    assert len(parts) == len(several), done.stderr
    return parts, done.stderr


def table(rows):
    """Return the bytes of a parquet file."""
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def weights():
    """Return files of published weights: safetensors, and more that a run does not read."""
    return {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": b'{"weight_map": {}}',
        "model-00001-of-00001.safetensors": bytes(range(256)) * 400,
        "modeling_llada.py": b"pass\n",
        "pytorch_model.bin": b"pickled" * 100,
        "onnx/model.json": b"{}",
    }


def rows(split, count):
    return [{"question": f"{split} {n} + 1?", "answer": f"#### {n + 1}"} for n in range(count)]


@pytest.fixture
def repos():
    return {
        "models/GSAI-ML/LLaDA-8B-Instruct": weights(),
        "models/me/mine": {**weights(), "only.bin": b"x"},
        "models/me/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickled"},
        "datasets/openai/gsm8k": {
            "main/train-00000-of-00001.parquet": table(rows("train", 5)),
            "main/test-00000-of-00001.parquet": table(rows("test", 3)),
            "README.md": b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n"
            b"    path: main/train-*\n  - split: test\n    path: main/test-*\n---\n",
        },
    }


def test_weights_and_data_are_shown_fetched_resumed_and_read_offline(repos, tmp_path):
    to = tmp_path / "store"
    words = ["prefetch", GSM8K, "task.options.protocol=d1", "--to", to]
    shard = "model-00001-of-00001.safetensors"
    with serving(repos, cut={shard: 5000}) as (address, asked):
        parts, errors = calls(address, tmp_path, [*words, "--dry-run"], words, words, words)
    shown, first, second, third = parts
    assert "models/LLaDA-8B-Instruct  GSAI-ML/LLaDA-8B-Instruct@0123456789ab" in shown, errors
    assert f"102 kB  {shard}" in shown and "702 bytes not needed" in shown
    assert f"{to}/data/openai--gsm8k-main-train.parquet" in shown and shown.endswith("-- 0\n")
    # The transfer broke off; whether the client tried again or not, the same command continues.
    assert third.count("is there") == 3, errors
    assert "together 0 bytes" in third and "-- 0" in third
    assert "fetched; without network: HF_HUB_OFFLINE=1 agrpo train " in first + second
    here = tmp_path / "models" / "LLaDA-8B-Instruct"
    kept = {path.name for path in here.iterdir() if path.is_file()}
    assert kept == set(weights()) - {"pytorch_model.bin", "onnx/model.json"}
    assert (here / shard).read_bytes() == weights()[shard]
    assert not any("pytorch_model.bin" in line for line in asked)
    settings = load(Settings, to / "gsm8k-offline.yaml")
    assert settings.model.load == "models/LLaDA-8B-Instruct"
    assert settings.task.options["protocol"] == "agrpo"  # an override stays one
    task = build_task(settings.task)
    problems = {split: len(task.problems(split)) for split in ("train", "eval")}
    assert problems == {"train": 5, "eval": 3}


def test_each_refusal_is_one_line_that_says_what_to_do(repos, tmp_path):
    data = [f"task.options.{split}=none.jsonl" for split in ("train", "eval")]
    words = ["prefetch", GSM8K, *data, "--to", tmp_path]
    refused = {"models/me/gated": (403, "GatedRepo")}
    with serving(repos, refused=refused) as (address, _):
        names = ("me/absent", "me/gated", "me/pickles", "me/mine")
        several = [[*words, f"model.load={name}"] for name in names]
        several.append([*words, "model.load=me/mine", "--all", "--dry-run"])
        parts, errors = calls(address, tmp_path, *several)
    lines = errors.splitlines()
    assert [part.strip()[-1] for part in parts] == ["2", "2", "2", "0", "0"]
    assert len(lines) == 3
    assert (
        "me/absent at http://127.0.0.1" in lines[0] and "does not exist or is private" in lines[0]
    )
    assert "asks for consent; accept its terms on its page, and set HF_TOKEN" in lines[1]
    assert (
        "me/pickles has no weights in safetensors (only pickles such as pytorch_model.bin"
        in (lines[2])
    )
    assert "only.bin" not in parts[3] and "only.bin" in parts[4] and "onnx/model.json" in parts[4]
    with serving({}) as (closed, _):
        pass
    parts, errors = calls(closed, tmp_path, several[0])
    assert "cannot be reached or read (" in errors and errors.count("\n") == 1


def test_a_full_disk_is_refused_before_anything_is_written(repos, tmp_path):
    repo = repos["models/me/mine"]

    class Huge(bytes):
        def __len__(self):
            return 10**18

    repo["model-00001-of-00001.safetensors"] = Huge(b"x")
    data = [f"task.options.{split}=none.jsonl" for split in ("train", "eval")]
    words = ["prefetch", GSM8K, *data, "--to", tmp_path / "new", "model.load=me/mine"]
    with serving(repos) as (address, _):
        parts, errors = calls(address, tmp_path, words)
    assert "free, and me/mine takes 1e+06 TB; free some space" in errors
    assert errors.count("\n") == 1 and not (tmp_path / "new").exists()


def test_names_of_the_hub_are_those_that_settings_name(tmp_path):
    def named(*overrides, file=GSM8K, **more):
        found = sources(load(Settings, file, overrides), tmp_path, **more)
        return {key: (each.name, str(each.path)) for each in found for key in each.keys}

    (tmp_path / "rows.jsonl").write_text("{}")
    local = [f"task.options.{split}={tmp_path / 'rows.jsonl'}" for split in ("train", "eval")]
    assert named(*local) == {
        "model.load": ("GSAI-ML/LLaDA-8B-Instruct", "models/LLaDA-8B-Instruct")
    }
    assert named(*local, "model.load=me/mine")["model.load"] == ("me/mine", f"{tmp_path}/mine")
    assert named(*local, "model.load=/x/LLaDA2.0-mini")["model.load"] == (
        "inclusionAI/LLaDA2.0-mini",
        "/x/LLaDA2.0-mini",
    )
    assert named(*local, weights="me/mine")["model.load"] == ("me/mine", "models/LLaDA-8B-Instruct")
    both = ["model.load=/x/mine", "tokenizer.path=/x/mine"]
    mine = named(*local, *both, weights="me/mine")
    assert mine["model.load"] == mine["tokenizer.path"] == ("me/mine", "/x/mine")
    with pytest.raises(ValueError, match="=a/mine and tokenizer.path=b/mine would both"):
        named(*local, "model.load=a/mine", "tokenizer.path=b/mine")
    with pytest.raises(ValueError, match="model.load=/x/mine is missing here, and its name on"):
        named(*local, "model.load=/x/mine")
    mixed = named(
        "task.name=mixture",
        "model.load=models/LLaDA-8B-Instruct",
        "task.mixture={gsm8k: {options: {protocol: d1}}, math: {}, countdown: {}}",
        "evaluation.tasks={other: {name: gsm8k, options: {protocol: d1}}}",
        file=GSM8K.with_name("model.yaml"),
    )
    test = ("openai/gsm8k", f"{tmp_path}/data/openai--gsm8k-main-test.parquet")
    assert mixed["task.mixture.gsm8k.options.eval"] == test
    assert mixed["evaluation.tasks.other.options.eval"] == test
    assert mixed["task.mixture.math.options.eval"][0] == "HuggingFaceH4/MATH-500"
    assert not any("countdown" in key for key in mixed)
    assert named(file=ROOT / "examples" / "tiny.yaml") == {}
    assert Path(mixed["model.load"][1]) == Path("models/LLaDA-8B-Instruct")


def test_supervised_rows_are_fetched_and_a_list_is_replaced_as_a_whole(tmp_path):
    tiny = ROOT / "examples" / "tiny.yaml"

    def named(*words):
        settings = load(Settings, tiny, words)
        return overrides(settings, sources(settings, tmp_path))

    (tmp_path / "mine.jsonl").write_text("{}")
    mine, theirs = f"{tmp_path}/mine.jsonl", f"{tmp_path}/data/a--b-train.parquet"
    assert named("sft.data=a/b", "sft.eval_data=a/b@test") == {
        "sft.data": theirs,
        "sft.eval_data": f"{tmp_path}/data/a--b-test.parquet",
    }
    assert named(f"sft.data=[{mine}, a/b]") == {"sft.data": [mine, theirs]}
    assert named(f"sft.data={{x: {{data: {mine}}}, y: {{data: a/b}}}}") == {
        "sft.data.y.data": theirs
    }


def test_a_name_of_the_hub_is_refused_with_the_command_that_fetches_it():
    settings = load(Settings, None, ["model.load=GSAI-ML/LLaDA-8B-Instruct"])
    with pytest.raises(ValueError, match="or fetch one by `agrpo prefetch FILE`"):
        validate(settings)


def test_a_file_of_another_commit_is_fetched_again(tmp_path):
    """Whole files of two commits are as long; the client's notes have the hash of each."""
    here = RepoSibling("config.json", size=2, blob_id="b")
    shard = SimpleNamespace(sha256="s")
    large = RepoSibling("model.safetensors", size=2, blob_id="of the pointer", lfs=shard)
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for each in (here, large):
        assert not _is_there(tmp_path, each)
        (tmp_path / each.rfilename).write_text("{}")
        assert _is_there(tmp_path, each), "copied here without the client"
    for content, is_there in (("b", (True, False)), ("s", (False, True))):
        for each in (here, large):
            (notes / f"{each.rfilename}.metadata").write_text(f"c0ffee\n{content}\n1.5\n")
        assert (_is_there(tmp_path, here), _is_there(tmp_path, large)) == is_there
