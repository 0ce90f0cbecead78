"""With model.load, each written setting of `model` is applied, or contradicts the weights."""

import json

import pytest

from agrpo_megatron.checkpoint.convert import to_megatron_checkpoint
from agrpo_megatron.cli.common import open_target
from agrpo_megatron.config.schema import load, to_yaml
from agrpo_megatron.config.settings import ModelSettings, Settings
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.text.tokenizer import CHARACTERS
from tests.families.autoregressive import write_autoregressive
from tests.text.chat_tokenizers import write_llada

CONFIG = {
    "model_type": "llada",
    "n_layers": 2,
    "d_model": 32,
    "mlp_hidden_size": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "embedding_size": 300,
    "vocab_size": 300,
    "mask_token_id": 260,
    "eos_token_id": 257,
    "max_sequence_length": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
SETTINGS = """
task: {name: countdown, train_problems: 4, eval_problems: 2}
sampling: {completion_length: 8, block_length: 8, denoising_steps: 4}
"""


@pytest.fixture
def weights(tmp_path):
    """Return a Hugging Face directory without its tensors, which settings do not need."""
    path = write_llada(tmp_path / "weights")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def _resolved(folder, source, *overrides, model=""):
    path = folder / "settings.yaml"
    path.write_text(f"{SETTINGS}model: {{{model}}}\n")
    settings = load(Settings, path, [f"model.load={source}", *overrides])
    return resolve(settings, world_size=1).settings.model


APPLIED = {
    "a shorter row": ("max_sequence_length", 512),
    "a longer row": ("max_sequence_length", 8192),
    "the default length": ("max_sequence_length", 4096),
    "another mask token": ("mask_token_id", 5),
    "the first id": ("mask_token_id", 0),
    "another end": ("eos_token_id", 7),
    "a rotary base": ("rope_theta", 500.0),
    "the default base": ("rope_theta", 500000.0),
    "an epsilon": ("norm_epsilon", 1e-3),
    "no epsilon": ("norm_epsilon", 0.0),
    "a deviation": ("init_std", 0.1),
    "the same layers": ("num_layers", 2),
    "the same width": ("hidden_size", 32),
    "the same groups": ("num_query_groups", 2),
    "the same heads": ("head_dim", 8),
    "the same vocabulary": ("vocab_size", 300),
    "the same family": ("family", "llada"),
    "no bias": ("qkv_bias", False),
    "passed by name": ("megatron", {"attention_dropout": 0.1}),
}


@pytest.mark.parametrize("is_file", [False, True], ids=["override", "file"])
@pytest.mark.parametrize("name", APPLIED)
def test_a_setting_that_fits_the_weights_is_applied(tmp_path, weights, name, is_file):
    key, value = APPLIED[name]
    written = f"{key}: {value}" if is_file else f"model.{key}={value}"
    written = written.replace("False", "false").replace("'", "")
    model = (
        _resolved(tmp_path, weights, model=written)
        if is_file
        else _resolved(tmp_path, weights, written)
    )
    assert getattr(model, key) == value
    others = {**CONFIG, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    for other in ("num_layers", "hidden_size", "num_attention_heads"):
        assert getattr(model, other) == others[other]
    assert key == "rope_theta" or model.rope_theta == 10000.0


CONTRADICTS = {
    "width": ("hidden_size", "999", 32),
    "the default width": ("hidden_size", "128", 32),
    "layers": ("num_layers", "12", 2),
    "the default layers": ("num_layers", "4", 2),
    "a hidden layer": ("ffn_hidden_size", "65", 64),
    "heads": ("num_attention_heads", "2", 4),
    "groups": ("num_query_groups", "4", 2),
    "wider heads": ("head_dim", "16", 8),
    "blocks": ("attention", "block_causal", "full"),
    "a vocabulary": ("vocab_size", "4096", 300),
    "a family": ("family", "dream", "llada"),
    "biases": ("qkv_bias", "true", "false"),
    "norms": ("qk_norm", "true", "false"),
    "a shift": ("shift", "true", "false"),
}


@pytest.mark.parametrize("name", CONTRADICTS)
def test_a_setting_that_contradicts_the_weights_is_refused(tmp_path, weights, name):
    key, value, there = CONTRADICTS[name]
    for how in ({"model": f"{key}: {value}"}, {}):
        overrides = [] if how else [f"model.{key}={value}"]
        with pytest.raises(ValueError, match="contradicts") as error:
            _resolved(tmp_path, weights, *overrides, **how)
        assert str(error.value) == (
            f"model.{key}={value} contradicts model.load={weights}, where it is {there}; leave it "
            f"out, or write model.{key}={there}"
        )


@pytest.mark.parametrize("key", ["vocab_size", "num_query_groups", "mask_token_id"])
def test_null_takes_the_value_of_the_weights(tmp_path, weights, key):
    loaded = _resolved(tmp_path, weights)
    assert _resolved(tmp_path, weights, f"model.{key}=null") == loaded


def test_the_resolved_settings_are_resolved_again_to_the_same(tmp_path, weights):
    first = _resolved(tmp_path, weights, "model.rope_theta=500", "model.max_sequence_length=600")
    path = tmp_path / "again.yaml"
    path.write_text(SETTINGS + "model:\n" + _indented(to_yaml(first)))
    assert resolve(load(Settings, path), world_size=1).settings.model == first


def test_a_run_or_a_checkpoint_may_be_loaded_with_other_values_too(tmp_path, weights):
    first = _resolved(tmp_path, weights, "model.rope_theta=500")
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    for folder, file, text in (
        (run, "config.yaml", "model:\n" + _indented(to_yaml(first)) + SETTINGS),
        (checkpoint, "model.yaml", to_yaml(first)),
    ):
        folder.mkdir()
        (folder / file).write_text(text)
        tokenizer = f"tokenizer.path={weights}"
        assert _resolved(tmp_path, folder, tokenizer).rope_theta == 500
        assert _resolved(tmp_path, folder, tokenizer, "model.rope_theta=50").rope_theta == 50
        with pytest.raises(ValueError, match="model.num_layers=3 contradicts model.load="):
            _resolved(tmp_path, folder, tokenizer, "model.num_layers=3")


def test_heads_are_as_many_groups_where_the_weights_have_no_groups(tmp_path, weights):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    model = ModelSettings(num_layers=2, hidden_size=32, vocab_size=300, max_sequence_length=1024)
    (folder / "model.yaml").write_text(to_yaml(model))
    tokenizer = f"tokenizer.path={weights}"
    assert _resolved(tmp_path, folder, tokenizer, "model.num_query_groups=4").num_query_groups == 4
    with pytest.raises(ValueError, match="model.num_query_groups=2 contradicts .* it is 4; leave"):
        _resolved(tmp_path, folder, tokenizer, "model.num_query_groups=2")


def test_layouts_are_judged_by_the_weights_not_by_the_defaults(tmp_path, weights):
    """A written vocabulary does not make the default heads those of the weights."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"{SETTINGS}model: {{load: {weights}, vocab_size: 300}}\nparallel: tp4\n")
    settings = load(Settings, file)
    with pytest.raises(ValueError, match="tensor=4 does not divide model.num_query_groups=2"):
        resolve(settings, world_size=4)
    long = ["sampling.completion_length=5000", "sampling.block_length=5000"]
    with pytest.raises(ValueError, match="leaves no room for a prompt in model.max_sequence_le"):
        _resolved(tmp_path, weights, *long, "sampling.denoising_steps=5000")
    more = (*long, "sampling.denoising_steps=5000", "model.max_sequence_length=6000")
    assert _resolved(tmp_path, weights, *more).max_sequence_length == 6000


def test_blocks_are_judged_by_the_weights(tmp_path, weights):
    """Released weights differ in their blocks, which their config.json may lack."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    ids = {"mask_token_id": 260, "eos_token_id": 257}
    rest = {"max_position_embeddings": 1024, "rope_theta": 1000000, "rms_norm_eps": 1e-6}
    config = {"model_type": "sdar", **sizes, **ids, **rest}
    (weights / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sampling.block_length=8 differs from model.block_length"):
        _resolved(tmp_path, weights)
    assert _resolved(tmp_path, weights, "sampling.block_length=4").block_length == 4
    model = _resolved(tmp_path, weights, "model.block_length=8")
    assert (model.block_length, model.head_width) == (8, 16)
    with pytest.raises(ValueError, match="model.attention=full contradicts model.load="):
        _resolved(tmp_path, weights, "model.attention=full")


class _Arguments:
    checkpoint = settings = None

    def __init__(self, target, *overrides):
        self.target, self.overrides = target, list(overrides)


def test_settings_besides_a_target_are_applied_too(weights):
    target = open_target(_Arguments(weights, "model.rope_theta=50"))  # type: ignore[arg-type]
    assert target.settings.model.load == str(weights)
    assert resolve(target.settings, world_size=1, needs=()).settings.model.rope_theta == 50
    target = open_target(_Arguments(weights, "model.num_layers=3"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model.num_layers=3 contradicts model.load="):
        resolve(target.settings, world_size=1, needs=())


def test_other_weights_than_the_target_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=f"^model.load=x: the weights are those of {weights}; le"):
        open_target(_Arguments(weights, "model.load=x"))  # type: ignore[arg-type]


def _indented(text):
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Return a folder of Qwen2.5 with a tied head; its tokenizer has no mask token."""
    folder = tmp_path_factory.mktemp("causal")
    write_autoregressive(folder / "qwen2", "qwen2", tied=True, vocab_size=90)
    return folder / "qwen2"


@pytest.mark.parametrize(
    ("overrides", "attention", "shift", "rows", "is_tied"),
    [
        ([], "full", True, 90, True),
        (["model.shift=false"], "full", False, 90, True),
        (["model.vocab_size=92", "model.mask_token_id=91"], "full", True, 92, True),
        (["model.vocab_size=90", "model.tie_embeddings=false"], "full", True, 90, False),
        (
            ["model.attention=block_causal", "model.block_length=8"],
            "block_causal",
            False,
            90,
            True,
        ),
    ],
)
def test_an_autoregressive_model_becomes_a_diffusion_model(
    tmp_path, causal, overrides, attention, shift, rows, is_tied
):
    given = [f"tokenizer.path={CHARACTERS}", *overrides]
    model = _resolved(tmp_path, causal, *given)
    assert (model.attention, model.shift) == (attention, shift)
    assert (model.vocab_size, model.tie_embeddings) == (rows, is_tied)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.vocab_size=89"], "model.vocab_size=89 contradicts model.load=.*, where it is 90"),
        (["model.family=qwen3"], "model.family=qwen3 contradicts"),
        (["model.attention=causal"], "model.attention=causal predicts one token after another"),
        (["model.vocab_size=91", "lora.rank=4"], "model.vocab_size=91 adds rows, and lora.rank=4"),
        (["model.tie_embeddings=false", "lora.rank=4"], "model.tie_embeddings=false adds a head"),
        (["lora.rank=4", "lora.train_head=true"], "lora.train_head=true trains one of embedding"),
        (["model.mask_token_id=90"], "model.mask_token_id=90 is outside model.vocab_size=90"),
        (["model.mask_token_id=1"], "model.mask_token_id=1 is model.eos_token_id too"),
        (
            ["model.attention=block_causal", "model.block_length=8", "model.shift=true"],
            "use model.shift=false",
        ),
    ],
)
def test_what_an_autoregressive_model_cannot_start_is_refused(tmp_path, causal, overrides, said):
    with pytest.raises(ValueError, match=said) as error:
        _resolved(tmp_path, causal, f"tokenizer.path={CHARACTERS}", *overrides)
    assert "\n" not in str(error.value)


def test_a_grown_vocabulary_starts_from_a_hugging_face_directory_only(tmp_path, causal):
    to_megatron_checkpoint(causal, tmp_path / "m", progress=lambda *_: None)
    given = [f"tokenizer.path={CHARACTERS}"]
    assert _resolved(tmp_path, tmp_path / "m", *given).attention == "full"
    with pytest.raises(ValueError, match="only a Hugging Face directory can start"):
        _resolved(tmp_path, tmp_path / "m", *given, "model.vocab_size=91")
