"""Settings files: what is read back, what is refused and how it is said."""

import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml

from agrpo_megatron.config.rules import validate, validate_sampling
from agrpo_megatron.config.schema import build, describe, flatten, load, to_yaml
from agrpo_megatron.config.settings import (
    ParallelSettings,
    SamplingSettings,
    Settings,
)

OVERRIDES = [
    "run.seed=3",
    "optimizer.learning_rate=1e-4",
    "sampling.top_k=20",
    "sampling.threshold=0.9",
    "model.megatron={attention_dropout: 0.1}",
    "task.options.numbers=3",
    "logging.live=false",
    "tokenizer.path=null",
]


def _message(overrides, *, world_size=1, path=None):
    with pytest.raises(ValueError, match=".") as error:
        validate(load(Settings, path, overrides), world_size)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_resolved_settings_read_back_equal(tmp_path):
    settings = load(Settings, None, OVERRIDES)
    assert settings != Settings()
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(settings))
    assert load(Settings, path) == settings
    assert build(Settings, asdict(settings)) == settings


def test_the_defaults_are_valid_and_read_back_equal(tmp_path):
    validate(Settings())
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(Settings()))
    assert load(Settings, path) == Settings()


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
def test_numbers_are_read_as_people_write_them(tmp_path, written):
    path = tmp_path / "settings.yaml"
    path.write_text(f"optimizer:\n  learning_rate: {written}\n")
    rate = load(Settings, path).optimizer.learning_rate
    assert rate == 1e-4
    assert load(Settings, None, [f"optimizer.learning_rate={written}"]).optimizer == replace(
        Settings().optimizer, learning_rate=rate
    )


def test_overrides_win_over_the_file_in_their_order(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("run: {seed: 1}\nmodel:\n  # all defaults\n")
    assert load(Settings, path).run.seed == 1
    assert load(Settings, path, ["run.seed=2", "run.seed=3"]).run.seed == 3
    assert load(Settings, path).model == Settings().model


@pytest.mark.parametrize("written", ["10:00:00", "04:30", "1-12", "'90'", 90])
def test_a_time_limit_is_read_as_it_is_written(tmp_path, written):
    """YAML 1.1 takes 10:00:00 for 36000, a number to base 60."""
    path = tmp_path / "settings.yaml"
    path.write_text(f"launch: {{time: {written}}}\n")
    settings = load(Settings, path, [f"launch.time={written}"])
    assert settings.launch.time == load(Settings, path).launch.time
    assert str(settings.launch.time) == str(written).strip("'")
    path.write_text(to_yaml(settings))
    assert load(Settings, path) == settings


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("# nothing set\n")
    assert load(Settings, path) == Settings()


def test_a_list_of_numbers_is_read_from_a_file_and_an_override(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("parallel:\n  layers: [1, 3]\n")
    assert load(Settings, path).parallel.layers == [1, 3]
    assert load(Settings, path, ["parallel.layers=[3,5]"]).parallel.layers == [3, 5]
    assert load(Settings, path, ["parallel.layers=null"]).parallel.layers is None


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ("parallel: tp2-pp2-cp1-dp2", [], {"tensor": 2, "pipeline": 2, "data": 2}),
        (
            "",
            ["parallel=tp2-sp-pp2-vpp3"],
            {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 3},
        ),
        ("parallel: tp2-pp2", ["parallel.context=2"], {"tensor": 2, "pipeline": 2, "context": 2}),
        (
            "",
            ["parallel=pp2", "parallel.layers=[1,3]", "parallel.pipeline=2"],
            {"pipeline": 2, "layers": [1, 3]},
        ),
        # One text sets all of it, so nothing of an earlier layout is left.
        ("parallel: {tensor: 2, layers: [1, 3]}", ["parallel=pp2"], {"pipeline": 2}),
        ("parallel: tp2-pp2", ["parallel=cp2"], {"context": 2}),
        ("parallel: tp2", ["parallel=null"], {}),
    ],
)
def test_a_layout_is_one_text_or_single_keys(tmp_path, file, overrides, expected):
    path = tmp_path / "settings.yaml"
    path.write_text(file)
    settings = load(Settings, path, overrides)
    assert settings.parallel == ParallelSettings(**expected)
    path.write_text(to_yaml(settings))
    assert load(Settings, path) == settings


def test_a_wrong_text_is_named_when_a_key_is_set_on_top_of_it(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("parallel: tp2-pp0\n")
    message = _message(["parallel.context=2"], path=path)
    assert message.startswith("parallel=tp2-pp0: 'pp0' is not a part; write any of tpN")


def test_the_reference_says_which_text_sets_a_key():
    help = {line.key: line.help for line in describe(Settings)}
    assert help["parallel.virtual"].endswith("; as text parallel=vppN")
    assert help["parallel.sequence"].endswith("; as text parallel=sp")
    assert "as text" not in help["parallel.layers"] + help["rollout.parallel"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sampling.block_lenght=32",
            "sampling.block_lenght is not a setting; did you mean sampling.block_length?",
        ),
        ("modle.num_layers=2", "modle is not a setting; did you mean model?"),
        (
            "checkpoint.zzz=1",
            "checkpoint.zzz is not a setting; section checkpoint has interval, keep, best, "
            "background, rollouts, keep_rollouts",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(override, message):
    assert _message([override]) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=one", "run.seed='one' has the wrong type; it must be an integer"),
        (
            "algorithm.mc_samples=most",
            "algorithm.mc_samples='most' has the wrong type; it must be an integer or auto or null",
        ),
        (
            "run.seed=true",
            "run.seed=true (YAML reads yes, no, on and off as true and false) has the wrong type; "
            "it must be an integer",
        ),
        ("run.seed=", "run.seed is empty; it must be an integer"),
        ("logging.live=1", "logging.live=1 has the wrong type; it must be true or false"),
        ("algorithm.group_size=1", "algorithm.group_size=1 must be at least 2"),
        ("sampling.top_p=1.5", "sampling.top_p=1.5 must be at most 1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate=nan must be a finite number"),
        (
            "sampling.unmasking=entropie",
            "sampling.unmasking=entropie must be one of random, low_confidence, entropy, margin, "
            "bernoulli, leftmost; did you mean entropy?",
        ),
        ("model=4", "model=4 is a section; write model: and indent its keys"),
        ("run.seed", "override 'run.seed': write section.key=value, e.g. run.seed=1"),
        ("run.seed.x=1", "run.seed={'x': 1} has the wrong type; it must be an integer"),
        (
            "parallel.layers=[3, x]",
            "parallel.layers=[3, 'x'] has the wrong type; it must be a list of integers or null",
        ),
        (
            "parallel.layers=3",
            "parallel.layers=3 has the wrong type; it must be a list of integers or null",
        ),
        (
            "parallel=4",
            "parallel=4 is a section; write parallel: and indent its keys, or write any of tpN, "
            "sp, ppN, vppN, cpN, epN, etpN, dpN (N from 1) joined by -",
        ),
        (
            "parallel=tp2-xx3",
            "parallel=tp2-xx3: 'xx3' is not a part; write any of tpN, sp, ppN, vppN, cpN, "
            "epN, etpN, dpN (N from 1) joined by -",
        ),
        ("parallel=tp2-tp4", "parallel=tp2-tp4: tp is written twice; write it once"),
        ("model=llada", "model='llada' is a section; write model: and indent its keys"),
        ("run.dir=[", "override 'run.dir=[': the value is not valid YAML; quote it"),
        (
            "task.mixture={a: {name: gsm8k}, a: {name: sudoku}}",
            "override 'task.mixture={a: {name: gsm8k}, a: {name: sudoku}}': a is written twice; "
            "write it once",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_it_must_be(override, message):
    assert _message([override]) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampling.block_length=24"],
            "sampling.block_length=24 does not divide sampling.completion_length=256; use 16 or 32",
        ),
        (
            ["sampling.denoising_steps=100"],
            "sampling.denoising_steps=100 must be a multiple of the 8 blocks and at most "
            "sampling.completion_length=256; use 96",
        ),
        (
            ["model.num_attention_heads=6"],
            "model.num_attention_heads=6 does not divide model.hidden_size=128; use 4",
        ),
        (
            ["model.num_query_groups=3"],
            "model.num_query_groups=3 does not divide model.num_attention_heads=4; use 2",
        ),
        (
            ["checkpoint.best=f1"],
            "checkpoint.best=f1 is not an evaluation metric; use accuracy, reward/mean, the name "
            "of a part of the reward such as reward/format, or null",
        ),
        (
            ["sampling.temperature=0"],
            "sampling.temperature=0 draws equal completions in a group, so no advantage; use a "
            "positive temperature such as 1.0 (evaluation.temperature may be 0)",
        ),
        (
            ["tokenizer.path=missing.model"],
            "tokenizer.path=missing.model does not exist; give a sentencepiece .model file, a "
            "Hugging Face directory, or null for the built-in characters",
        ),
        (
            ["parallel.sequence=true"],
            "parallel.sequence=true needs parallel.tensor of at least 2; "
            "use parallel=tp1-pp1-cp1-dp1, the nearest layout that fits",
        ),
        (
            ["parallel.tensor=2"],
            "parallel.tensor=2 does not divide the 1 ranks that were started; start 2 ranks "
            "(torchrun --nproc-per-node 2) or use parallel=tp1-pp1-cp1-dp1, the nearest layout "
            "that fits",
        ),
        (
            ["model.max_sequence_length=256"],
            "sampling.completion_length=256 leaves no room for a prompt in "
            "model.max_sequence_length=256; shorten or raise it",
        ),
    ],
)
def test_a_broken_rule_says_key_value_rule_and_fix(overrides, message):
    assert _message(overrides) == message


def test_the_fix_that_a_rule_names_is_accepted():
    for fix in ("sampling.block_length=16", "sampling.block_length=32"):
        validate(load(Settings, None, [fix]))
    validate(load(Settings, None, ["sampling.denoising_steps=96"]))
    validate(load(Settings, None, ["parallel.tensor=2", "parallel.sequence=true"]), world_size=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "not valid YAML"),
        ("- run", "the top level must be sections"),
        (
            "run:\n  seed: 1\n  dir: x\n  seed: 2\n",
            " line 4: not valid YAML: seed is written twice",
        ),
        ("sft: {}\nrun: {}\nsft: {}\n", " line 3: not valid YAML: sft is written twice"),
        (b"\xff\xfe", "not a UTF-8 text file"),
        (None, "No such file or directory; give the path of a YAML file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    told = _message([], path=path)
    assert str(path) in told
    assert message in told


def test_an_anchor_may_be_merged_and_overridden(tmp_path):
    """YAML's own way to say a thing once: it writes no key twice."""
    path = tmp_path / "settings.yaml"
    path.write_text(
        "optimizer: &one\n  learning_rate: 0.5\n  decay: cosine\n"
        "sft:\n  optimizer: {<<: *one, learning_rate: 0.25}\n"
    )
    settings = load(Settings, path)
    assert (settings.optimizer.learning_rate, settings.sft.optimizer.learning_rate) == (0.5, 0.25)
    assert settings.sft.optimizer.decay == "cosine"


def test_nested_settings_are_told_by_dotted_names():
    tree = {"a": {"b": 1, "c": {"d": None}, "e": {}}, "f": [2]}
    assert flatten(tree) == {"a.b": 1, "a.c.d": None, "f": [2]}
    assert flatten(tree, whole={"a.c"}) == {"a.b": 1, "a.c": {"d": None}, "f": [2]}


def test_evaluation_takes_the_sampler_of_the_run_where_it_sets_nothing():
    settings = load(Settings, None, ["sampling.block_length=64", "evaluation.denoising_steps=64"])
    assert settings.evaluation_sampling == SamplingSettings(
        block_length=64, denoising_steps=64, temperature=0.0, unmasking="low_confidence"
    )


def test_the_reference_describes_every_setting_with_help_and_default():
    lines = list(describe(Settings))
    assert all(line.help and line.type for line in lines)
    resolved = yaml.safe_load(to_yaml(Settings()))
    for line in lines:
        value = resolved
        for part in line.key.split("."):
            value = value[part]
        assert value == line.default, line.key


@pytest.mark.parametrize(
    "module",
    [
        "config.settings",
        "config.schema",
        "config.parallel",
        "config.rules",
        "text.tokenizer",
        "hardware.doctor",
    ],
)
def test_what_reads_settings_loads_no_heavy_library(module):
    heavy = "{'torch', 'megatron', 'transformers', 'sentencepiece', 'wandb'}"
    code = f"import sys, agrpo_megatron.{module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def _write(folder, **files):
    """Write settings files of these names and contents; return the folder."""
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return folder


def test_files_are_found_beside_the_settings_file_unless_they_are_here(tmp_path, monkeypatch):
    folder, here = tmp_path / "there", tmp_path / "here"
    for made in (folder / "own", here):
        made.mkdir(parents=True)
    for name in ("task.py", "rows.jsonl", "own/both.csv", "a:b.py"):
        (folder / name).write_text("")
    (here / "own").mkdir()
    (here / "own" / "both.csv").write_text("")
    options = {
        "train": "rows.jsonl",
        "eval": "own/both.csv",
        "reward": [{"python": "task.py:score"}, "gone.py:score", "rows.txt"],
    }
    tree = {"base": "base.yaml", "task": {"options": options}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    (folder / "base.yaml").write_text("task: {name: task.py}")
    monkeypatch.chdir(here)
    task = load(Settings, "../there/run.yaml", ["task.pass_rates=rows.jsonl"]).task
    assert (task.name, task.pass_rates) == ("../there/task.py", "rows.jsonl")
    assert task.options == {
        "train": "../there/rows.jsonl",
        "eval": "own/both.csv",
        "reward": [{"python": "../there/task.py:score"}, "gone.py:score", "rows.txt"],
    }


def test_a_file_says_what_differs_from_its_base(tmp_path):
    (tmp_path / "shared").mkdir()
    _write(
        tmp_path / "shared",
        lowest="model: {num_layers: 3, megatron: {a: 1, b: {c: 2}}}\nparallel: tp2-sp\nsft:\n",
        base="base: lowest.yaml\nmodel: {hidden_size: 64, megatron: {b: {d: 3}}}\nprecision: bf16",
    )
    text = "base: shared/base.yaml\nmodel: {num_layers: 5}\nparallel: dp4\nsampling:\n"
    settings = load(Settings, _write(tmp_path, run=text) / "run.yaml", ["model.hidden_size=32"])
    assert settings.model.num_layers == 5
    assert settings.model.hidden_size == 32
    assert settings.model.megatron == {"a": 1, "b": {"c": 2, "d": 3}}
    assert settings.precision == "bf16"
    assert settings.parallel == ParallelSettings(data=4)  # a text says all of its section
    assert settings.sampling == SamplingSettings()


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {"run": "base: gone.yaml"},
            "run.yaml: base=gone.yaml is not a file; name one rel",
        ),
        ({"run": "base: [a]"}, "run.yaml: base=['a'] is not a file"),
        ({"run": "base: run.yaml"}, "run.yaml: base=run.yaml leads back to"),
        ({"run": "base: a.yaml", "a": "base: run.yaml"}, "a.yaml: base=run.yaml leads back to"),
        ({"run": "base: a.yaml", "a": "]"}, "a.yaml line 1: not valid YAML"),
        (
            {"run": "base: a.yaml", "a": "sft: {iteration: 2}"},
            "a.yaml: sft.iteration is not a",
        ),
        (
            {"run": "base: a.yaml\nsft: {iterations: x}", "a": ""},
            "run.yaml: sft.iterations='x'",
        ),
        (
            {"run": "base: a.yaml\nparallel: {virtual: 2}", "a": "parallel: pp2"},
            "run.yaml: parallel is a section here and the text 'pp2' in the base; write both",
        ),
    ],
)
def test_a_base_that_cannot_be_used_is_named(tmp_path, files, message):
    said = _message([], path=_write(tmp_path, **files) / "run.yaml")
    assert said.startswith(f"settings file {tmp_path}")
    assert message in said


@pytest.mark.parametrize(
    ("overrides", "block", "steps"),
    [
        ([], 32, 128),
        (["sampling.completion_length=8"], 8, 8),  # one block, a token a step
        (["sampling.completion_length=48"], 24, 48),
        (["sampling.completion_length=384"], 32, 120),  # 12 blocks of 10 steps
        (["sampling.completion_length=512"], 32, 128),
        (["sampling.completion_length=96", "sampling.schedule=dream"], 96, 96),
        (["sampling.completion_length=64", "sampling.block_length=16"], 16, 64),
        (["sampling.completion_length=64", "sampling.denoising_steps=8"], 32, 8),
    ],
)
def test_lengths_that_are_not_written_fit_the_completion(overrides, block, steps):
    found = load(Settings, None, overrides).sampling
    assert (found.block_length, found.denoising_steps) == (block, steps)
    validate_sampling(found, "sampling")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr=1e-4",
            "optimizer.lr is not a setting; did you mean optimizer.learning_rate",
        ),
        ("optimizer.wd=0", "did you mean optimizer.weight_decay"),
        (
            "logging.wandb=yes",
            "logging.wandb=true (YAML reads yes, no, on and off as true and false) has the wrong "
            "type; it must be one of offline, online, disabled",
        ),
        ("run.dir=no", "run.dir=false (YAML reads yes, no, on and off as true and false) has the"),
    ],
)
def test_the_fix_of_what_others_write(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(Settings, None, [override])
