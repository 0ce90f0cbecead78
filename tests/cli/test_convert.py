"""`agrpo convert` as a user calls it: what it prints, what it leaves, and how it refuses."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.settings import TokenizerSettings
from agrpo_megatron.text.tokenizer import load_tokenizer
from tests.cli.test_main import agrpo, write_settings
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LLADA = ROOT / "tests" / "fixtures" / "llada_tiny" / "hf"


def _call(arguments):
    """Call `agrpo convert` on this rank; return its status and what it printed, and where."""
    os.environ["COLUMNS"] = "200"
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(["convert", *map(str, arguments)])
    return status, out.getvalue(), error.getvalue()


def _convert(*arguments):
    return run_ranks(1, _call, arguments)[0]


def _tool(*arguments):
    """Run tools/convert_checkpoint.py in a process of its own; return what came of it."""
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=120, stdout=subprocess.PIPE, text=True
    )
    return done.returncode, done.stdout


def test_there_and_back_and_verified(tmp_path):
    status, printed, error = _convert("to-megatron", LLADA, tmp_path / "m")
    assert (status, printed) == (0, f"{tmp_path / 'm'}\n"), error
    assert "converting" in error
    assert _tool("to-hf", tmp_path / "m", tmp_path / "h")[0] == 0
    status, printed = _tool("verify", LLADA, tmp_path / "m")
    assert status == 0 and "logits" in printed
    assert printed.splitlines()[-1] == "21 of 21 tensors are identical: passed"
    tensors = load_file(tmp_path / "h" / "model.safetensors")
    tensors["model.transformer.ln_f.weight"][0] += 0.5
    save_file(tensors, tmp_path / "h" / "model.safetensors")
    status, printed, _ = _convert("verify", tmp_path / "m", tmp_path / "h")
    assert status == 1
    lines = printed.splitlines()
    assert lines[1].split()[0] == "model.transformer.ln_f.weight" and lines[1].split()[2] == "0.5"
    assert float(next(line for line in lines if "logits" in line).split()[-1]) > 1e-3
    assert lines[-1] == "20 of 21 tensors are identical: FAILED"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to-hf", "nowhere", "x"], "nowhere is not a directory"),
        (["to-megatron", LLADA, LLADA], "exists; choose another name"),
        (["to-hf", LLADA, "x"], "hf is a Hugging Face directory; to-hf reads a run or a Megatron"),
        (["to-peft", LLADA, "x"], "hf is a Hugging Face directory; to-peft reads a run or a"),
        (["to-hf", LLADA, "x", "--checkpoint", "best"], "is not a run directory"),
    ],
)
def test_wrong_input_is_one_line(arguments, said):
    status, printed, error = _convert(*arguments)
    assert (status, printed) == (2, "")
    assert error.splitlines()[-1].startswith("agrpo: error: ")
    assert "Traceback" not in error and said in error


def _check_tokenizer(folder):
    """Check that transformers has the ids and texts of the built-in characters."""
    from transformers import AutoTokenizer

    theirs, own = AutoTokenizer.from_pretrained(folder), load_tokenizer(TokenizerSettings())
    names = theirs.mask_token, theirs.eos_token, theirs.pad_token
    assert names == ("<mask>", "<eos>", "<eos>")
    assert (theirs.mask_token_id, theirs.eos_token_id) == (own.mask_id, own.eos_id)
    text = "7 5=12,9  6=03:\n" + own.decode(range(3, own.vocab_size))
    assert theirs(text)["input_ids"] == own.encode(text)
    assert theirs.decode(own.encode(text)) == text
    again = load_tokenizer(TokenizerSettings(str(folder)))
    facts = ("vocab_size", "mask_id", "eos_id", "stop_ids", "unknown_id", "special")
    assert all(getattr(again, fact) == getattr(own, fact) for fact in facts)


def _run_the_page(folder):
    """Run what docs/library.md shows of a Hugging Face folder, with this one."""
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    found = page.index("from transformers import AutoModel")
    code = page[found : page.index("```", found)]
    before = "import torch\nfrom agrpo_megatron.diffusion import *\n"
    code = before + code.replace("models/LLaDA-8B-Instruct", str(folder))
    environment = {**os.environ, "HF_HOME": str(folder.parent), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0 and ran.stdout.strip("\n"), ran.stderr


@pytest.mark.slow
def test_a_trained_run_becomes_a_hugging_face_directory_and_loads_again(tmp_path):
    """With its tokenizer, a config.json and a card that says what it is; runs start from it."""

    def call(*arguments):
        status, printed = agrpo(tmp_path, *arguments)
        assert status == 0, printed

    run = tmp_path / "run"
    changes = {"sft": {"iterations": 1}, "train": {"iterations": 1}}
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(run)}, **changes)
    call("train", file)
    call("convert", "to-hf", run, tmp_path / "h", "--checkpoint", "best")
    names = {p.name for p in (tmp_path / "h").iterdir()}
    weights = {"README.md", "config.json", "model.safetensors", "tokenizer.model"}
    own = {"modeling_agrpo.py", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == weights | own
    card = (tmp_path / "h" / "README.md").read_text()
    assert "phase `rl`, 1 iterations" in card and "| accuracy |" in card
    assert "AutoModel with trust_remote_code=True, transformers 4.46 to 5.23." in card
    assert json.loads((tmp_path / "h" / "config.json").read_text())["dtype"] == "float32"
    _check_tokenizer(tmp_path / "h")
    _run_the_page(tmp_path / "h")
    call("convert", "to-megatron", tmp_path / "h", tmp_path / "m")
    call("convert", "verify", run, tmp_path / "m", "--no-logits")
    for start in (tmp_path / "h", tmp_path / "m", run):
        tokenizer = f"tokenizer.path={tmp_path / 'h' / 'tokenizer.model'}"
        options = [f"run.dir={tmp_path / 'next'}", f"model.load={start}", tokenizer, "--restart"]
        call("train", file, "sft.iterations=0", *options)
