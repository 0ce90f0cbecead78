"""Values of settings: numbers as they are read, their ranges, and what is refused later at best."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load, to_yaml, written
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import dump_yaml, parse_yaml


def _refused(*overrides):
    with pytest.raises(ValueError, match=".") as error:
        validate(load(Settings, None, overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


READ = {
    "an octal of YAML 1.1": ("010", 10),
    "three digits": ("007", 7),
    "no octal": ("008", 8),
    "a hundred": ("0100", 100),
    "a negative number": ("-010", -10),
    "underscores": ("1_000", 1000),
    "zeros and underscores": ("00_10", 10),
    "hexadecimal": ("0x10", 16),
    "binary": ("0b11", 3),
    "zero": ("0", 0),
    "a padded fraction": ("00.5", 0.5),
    "a time": ("10:00:00", "10:00:00"),
    "a date": ("2026-01-31", "2026-01-31"),
    "no date": ("2026-13-45", "2026-13-45"),
    "a version": ("1.2.3", "1.2.3"),
    "quoted": ("'010'", "010"),
    "octal of YAML 1.2": ("0o10", "0o10"),
}


@pytest.mark.parametrize("name", READ)
def test_values_are_those_of_yaml_1_2(tmp_path, name):
    text, value = READ[name]
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)
    path = tmp_path / "settings.yaml"
    path.write_text(f"task: {{options: {{a: {text}, b: [{text}]}}}}\n")
    settings = load(Settings, path)
    assert settings.task.options == {"a": value, "b": [value]}
    path.write_text(to_yaml(settings))
    assert load(Settings, path) == settings


@pytest.mark.parametrize("text", ["008", "010", "09_1", "2026-01-31", "10:00", "yes", "1e5", "~"])
def test_a_text_is_written_so_that_it_is_read_as_text(tmp_path, text):
    path = tmp_path / "settings.yaml"
    settings = load(Settings, None, [f"logging.name='{text}'"])
    path.write_text(to_yaml(settings))
    assert load(Settings, path).logging.name == text
    assert parse_yaml(dump_yaml({text: [text]})) == {text: [text]}


TAG = "a value is nested too deep, or does not fit its tag"
ANCHOR = "it is nested over 50 deep, or contains itself"
CHARACTER = "a text has a character that no file can hold"
UNUSABLE = {
    "more digits than Python reads": (5000 * "9", TAG),
    "a tag that does not fit": ("!!int x", TAG),
    "a date that is none": ("!!timestamp x", TAG),
    "a NUL": ('"a\\0b"', CHARACTER),
    "half a character": ('"\\ud800"', CHARACTER),
    "a NUL in a key": ('{"a\\0b": 1}', CHARACTER),
    "an alias in its anchor": ("&a [*a]", ANCHOR),
    "a mapping in itself": ("&a {b: *a}", ANCHOR),
    "deep nesting": (60 * "[" + 60 * "]", ANCHOR),
    "very deep nesting": (2000 * "[", TAG),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_no_setting_can_be_is_refused_by_its_reason(tmp_path, name):
    text, reason = UNUSABLE[name]
    assert _refused(f"task.options.a={text}").endswith(f": {reason}")
    path = tmp_path / "settings.yaml"
    path.write_text(f"task:\n  options: {{a: {text}}}\n")
    with pytest.raises(ValueError, match="not valid YAML: ") as error:
        load(Settings, path)
    assert str(error.value).endswith(reason)


RANGES = {
    "run.seed=9223372036854775808": "must be at most 9223372036854775807",
    "run.seed=-1": "must be at least 0",
    "run.seed=1.0": "has the wrong type; it must be an integer",
    "run.seed=true": "has the wrong type; it must be an integer",
    "task.seed=99999999999999999999": "must be at most 9223372036854775807",
    "train.iterations=2147483648": "must be at most 2147483647",
    "run.threads=1000000000000": "must be at most 1024",
    "run.timeout=3000000": "must be at most 2000000",
    "run.timeout=.inf": "must be a finite number",
    "resilience.first_timeout=1.0e+10": "must be at most 2000000",
    "resilience.timeout_factor=1.0e+9": "must be at most 1000",
    "resilience.timeouts={rollout: 1e9}": "is not a time limit; use 1 to 2000000 seconds",
    "resilience.timeouts={rollout: true}": "is not a time limit; use 1 to 2000000 seconds",
    "resilience.timeouts={rolout: 5}": "names no section; use setup, rollout, reward, update",
    "resilience.timeouts={rollout: x}": "is not a time limit; use 1 to 2000000 seconds",
    "launch.gpus_per_node=4096": "must be at most 1024",
    "optimizer.learning_rate=.nan": "must be a finite number",
    "optimizer.learning_rate=nan": "must be a finite number",
    "optimizer.learning_rate=1e39": "must be at most 3.4e+38",
    "optimizer.learning_rate=1e-40": "must be 0, or at least 1.2e-38: float32 has no smaller",
    f"optimizer.clip_grad={400 * '9'}": "has the wrong type; it must be a number",
    "optimizer.adam_beta1=1": "must be at most 0.999999999",
    "sft.optimizer.adam_beta2=1.0": "must be at most 0.999999999",
    "task.grader.failed_score=-1e39": "must be at least -3.4e+38",
    "evaluation.steps=[1, 99999999999]": "must be at most 2147483647",
    "parallel.layers=[true]": "has the wrong type; it must be a list of integers or null",
    "model.megatron={attention_dropout: .nan}": "must be a finite number",
    "ddp.bucket_size=99999999999999999999": "must be at most 9223372036854775807",
    "task.options={a: [1, .inf]}": "must be a finite number",
    "task.options={a: !!set {b}}": "has the wrong type; write it in quotes",
    "logging.name=007": "has the wrong type; it must be text or null; write it in quotes",
    "model.hidden_size=12": " / model.num_attention_heads=4 is odd, and rotary",
}


@pytest.mark.parametrize("override", RANGES)
def test_a_number_outside_its_range_is_refused_with_the_limit(override):
    message, key = _refused(override), override.partition("=")[0]
    assert RANGES[override] in message and message.startswith(key)


def test_large_seeds_are_taken():
    for seed in (4294967296, 20260131094500, 1769852700123456789, 2**63 - 1):
        assert load(Settings, None, [f"run.seed={seed}"]).run.seed == seed


def test_rules_of_large_sizes_are_checked_at_once():
    """The divisors of a size are found without counting up to it."""
    message = _refused("model.hidden_size=2147483647")
    assert message.startswith("model.num_attention_heads=4 does not divide model.hidden_size=21")
    sizes = "sampling.completion_length=2147483637", "sampling.block_length=32"
    assert "use 27 or 39" in _refused(*sizes)


LEAST = "optimizer.min_learning_rate=1e-05 is above optimizer.learning_rate=1e-06"
RATES = {
    "below the least rate": (["learning_rate=1e-6", "min_learning_rate=1e-5"], LEAST),
    "with a decay": (["decay=cosine", "learning_rate=1e-6", "min_learning_rate=1e-5"], LEAST),
    "above the default peak": (["min_learning_rate=1"], "optimizer.min_learning_rate=1 is above"),
    "a peak of zero": (["learning_rate=0", "min_learning_rate=1e-9"], "=1e-09 is above"),
    "unseen": (
        ["megatron={lr: 0.1}"],
        "optimizer.megatron.lr=0.1 would replace optimizer.learning",
    ),
    "unseen least": (["megatron.min_lr=1"], "would replace optimizer.min_learning_rate unseen;"),
    "unseen decay": (["megatron={adam_beta1: 1.5}"], "would replace optimizer.adam_beta1 unseen"),
    "unseen shards": (
        ["megatron.use_distributed_optimizer=true"],
        "megatron.use_distributed_optimizer=true would replace optimizer.distributed unseen",
    ),
}


@pytest.mark.parametrize("section", ["optimizer", "sft.optimizer"])
@pytest.mark.parametrize("name", RATES)
def test_what_megatron_would_assert_is_refused(section, name):
    overrides, message = RATES[name]
    said = _refused(*(f"{section}.{text}" for text in overrides))
    assert said.startswith(section) and message.replace("optimizer.", f"{section}.") in said


@pytest.mark.parametrize("rates", [("1e-5", "1e-5"), ("0", "0"), ("1e-4", "0")])
def test_a_least_rate_up_to_the_peak_passes(rates):
    names = ("learning_rate", "min_learning_rate")
    validate(
        load(Settings, None, [f"optimizer.{n}={r}" for n, r in zip(names, rates, strict=True)])
    )


@pytest.mark.parametrize(
    "passed, own",
    [
        ("model.megatron={hidden_size: 999}", "model.hidden_size"),
        ("model.megatron.layernorm_epsilon=1e-3", "model.norm_epsilon"),
        ("model.megatron={init_method_std: 0.5}", "model.init_std"),
        ("model.megatron.num_layers=3", "model.num_layers"),
        ("optimizer.megatron.clip_grad=-1", "optimizer.clip_grad"),
    ],
)
def test_a_setting_is_not_replaced_by_its_name_in_megatron(passed, own):
    assert _refused(passed).endswith(f" would replace {own} unseen; write {own}")


def test_an_override_changes_one_place_of_what_an_anchor_shares(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("optimizer: &o {learning_rate: 0.5}\nsft: {optimizer: *o}\n")
    settings = load(Settings, path, ["optimizer.learning_rate=0.25"])
    assert settings.optimizer.learning_rate == 0.25
    assert settings.sft.optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["sampling={block_length: 16}"], (64, 16)),
        (["sampling={}"], (64, 32)),
        (["sampling={completion_length: 32}", "sampling.block_length=8"], (32, 8)),
        (["sampling.block_length=8", "sampling={completion_length: 32}"], (32, 8)),
        (["sampling=null"], (256, 32)),
    ],
)
def test_an_override_of_a_section_keeps_the_keys_that_it_does_not_name(
    tmp_path, overrides, expected
):
    path = tmp_path / "settings.yaml"
    path.write_text("sampling: {completion_length: 64}\n")
    sampling = load(Settings, path, overrides).sampling
    assert (sampling.completion_length, sampling.block_length) == expected


def test_what_was_written_is_known(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model: {num_layers: 4, megatron: {}}\n")  # the default, but written
    settings = load(Settings, path, ["model.rope_theta=500000"])
    assert written(settings.model) == {"num_layers", "megatron", "rope_theta"}
    assert written(settings.sampling) == written(Settings()) == frozenset()
