"""Tokenizers: exact round trips, the mask token, and unusable files."""

import json
import runpy
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo_megatron.config.settings import TaskSettings, TokenizerSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.text.tokenizer import CHARACTERS, load_tokenizer
from agrpo_megatron.types import Chat, Message

ALPHABET = string.digits + string.ascii_letters + "+-*/=():., \n"
BUILT_IN = load_tokenizer(TokenizerSettings())
MAKER = Path(__file__).parents[2] / "tools" / "make_tokenizer.py"


@given(st.text(ALPHABET))
def test_characters_round_trip(text):
    ids = BUILT_IN.encode(text)
    assert len(ids) == len(text)
    assert BUILT_IN.decode(ids) == text
    assert BUILT_IN.decode([*ids, BUILT_IN.eos_id, *ids]) == text
    assert not set(ids) & BUILT_IN.special


def test_ids_are_fixed():
    assert (BUILT_IN.vocab_size, BUILT_IN.eos_id, BUILT_IN.mask_id) == (80, 1, 2)
    assert BUILT_IN.encode("0123456789") == list(range(3, 13))
    assert BUILT_IN.encode("<mask>")[0] == 0  # typed text never becomes a control token


def test_a_tokenizer_without_a_mask_token_takes_the_models(write_huggingface):
    """It is a row of the embedding for which the tokenizer has no text; its own comes first."""
    plain = write_huggingface([], eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="or set model.mask_token_id to an id without a text"):
        load_tokenizer(plain)
    tokenizer = load_tokenizer(plain, mask_id=300)
    assert tokenizer.mask_id == 300 and tokenizer.vocab_size < 300
    assert tokenizer.pieces([300]) == ["_"]
    assert tokenizer.decode([300]) == tokenizer.decode_raw([300]) == ""
    assert load_tokenizer(TokenizerSettings(), mask_id=70).mask_id == BUILT_IN.mask_id


def test_shipped_model_is_what_the_tool_makes():
    pytest.importorskip("google.protobuf")
    assert CHARACTERS.read_bytes() == runpy.run_path(str(MAKER))["build_model"]()


@pytest.mark.parametrize(
    "name, options",
    [("countdown", {"operators": "+-*/", "parentheses": True}), ("sudoku", {})],
)
def test_text_of_plain_tasks_is_all_characters(name, options):
    options = {"protocol": "plain", **options}
    task = build_task(TaskSettings(name=name, train_problems=200, eval_problems=1, options=options))
    assert len(task.problems("train")) == 200
    for problem in task.problems("train"):
        text = task.prompt(problem) + problem.solution
        assert BUILT_IN.decode(BUILT_IN.encode(text)) == text


def test_special_ids_show_as_pieces_and_decode_to_nothing():
    ids = [*BUILT_IN.encode("a \n"), BUILT_IN.mask_id, 0, 79, 80, -1, BUILT_IN.eos_id]
    shown = ["a", " ", "\\n", "_", "<unk>", "<unused2>", "<80>", "<-1>", "<eos>"]
    assert BUILT_IN.pieces(ids) == shown
    assert BUILT_IN.decode([*ids[:-1], 3]) == "a \n0"
    assert BUILT_IN.decode([]) == ""


@pytest.fixture
def write_huggingface(tmp_path):
    """Return a function that writes a byte-level tokenizer with the given added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def write(added, **named):
        level = tokenizers.pre_tokenizers.ByteLevel
        alphabet = {byte: i for i, byte in enumerate(sorted(level.alphabet()))}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
        model.pre_tokenizer = level(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named)
        wrapped.add_special_tokens({"additional_special_tokens": added})
        wrapped.save_pretrained(tmp_path)
        return TokenizerSettings(path=str(tmp_path))

    return write


@pytest.mark.parametrize(
    "added, named",
    [(["<|mdm_mask|>"], {}), (["<|mask|>"], {}), ([], {"mask_token": "<MASK>"})],
)
def test_huggingface_directory(write_huggingface, added, named):
    tokenizer = load_tokenizer(write_huggingface(added, eos_token="<|endoftext|>", **named))
    assert tokenizer.vocab_size == 258
    assert {tokenizer.mask_id, tokenizer.eos_id} == {256, 257}
    text = "Na\u00efve  text,\n\ttwice . "
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.mask_id, tokenizer.eos_id, *ids]) == text
    assert tokenizer.pieces([*ids[:2], tokenizer.mask_id, tokenizer.eos_id]) == [
        "N",
        "a",
        "_",
        "<eos>",
    ]


@pytest.mark.parametrize(("declared", "taken"), [(5, True), (10**6, False), ("5", False)])
def test_the_mask_token_may_be_one_that_the_model_reserves(write_huggingface, declared, taken):
    """As Nemotron-Labs-Diffusion has it: only config.json names the id."""
    chosen = write_huggingface([], eos_token="<|endoftext|>")
    (Path(chosen.path) / "config.json").write_text(json.dumps({"mask_token_id": declared}))
    if taken:
        tokenizer = load_tokenizer(chosen)
        assert tokenizer.mask_id == declared and declared in tokenizer.special
    else:
        with pytest.raises(ValueError, match="has no mask token"):
            load_tokenizer(chosen)


def test_huggingface_directory_without_a_mask_token(write_huggingface):
    chosen = write_huggingface([], eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="has no mask token; use the tokenizer of a masked-diff"):
        load_tokenizer(chosen)


def test_sentencepiece_model_without_a_mask_piece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "plain.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abc"] * 10),
            model_writer=file,
            model_type="char",
            vocab_size=7,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="plain.model has no mask token; .* add one of <mask>"):
        load_tokenizer(TokenizerSettings(path=str(path)))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("absent.model", None, "does not exist"),
        ("junk.model", b"junk", "is not a readable sentencepiece model"),
        ("empty.model", b"", "is not a readable sentencepiece model"),
        ("notes.txt", b"text", "is neither a .model file nor a directory"),
        ("folder", "directory", "is not a readable Hugging Face tokenizer directory"),
    ],
)
def test_unusable_path_is_refused_in_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.path=") as caught:
        load_tokenizer(TokenizerSettings(path=str(path)))
    message = str(caught.value)
    assert message.startswith(f"tokenizer.path={path} {reason}")
    assert message.endswith("or null for the built-in characters")
    assert "\n" not in message


@pytest.mark.parametrize("text", ["\ud83e", "A fox \ud83e eats", "a" * 99 + "\udfff"])
def test_half_of_a_character_is_refused_in_one_line(text):
    tokenizer = load_tokenizer(TokenizerSettings())
    calls = (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_prompt(Chat((Message("user", text),))),
        lambda: tokenizer.encode_prompts(["fine", text]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="holds half of a character; remove it") as caught:
            call()
        assert str(caught.value).isprintable()


def test_importing_and_loading_needs_neither_torch_nor_transformers():
    program = (
        "import sys; from agrpo_megatron.config.settings import TokenizerSettings as S; "
        "from agrpo_megatron.text.tokenizer import load_tokenizer; load_tokenizer(S()); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)
