"""Where texts end, and which part of a text no later token changes."""

import pytest

from agrpo_megatron.config.settings import TokenizerSettings
from agrpo_megatron.serving.texts import completion, settled
from agrpo_megatron.text.tokenizer import load_tokenizer
from tests.text.chat_tokenizers import write_llada

TOKENIZER = load_tokenizer(TokenizerSettings())
END = TOKENIZER.eos_id
IDS = [*TOKENIZER.encode("one two three"), END, END]

# stops, most tokens -> text, tokens, reason
CASES = [
    ([], 99, "one two three", 13, "stop"),
    ([], 13, "one two three", 13, "length"),
    ([], 6, "one tw", 6, "length"),
    (["two"], 99, "one ", 7, "stop"),
    (["three", " t"], 99, "one", 5, "stop"),
    (["two"], 6, "one tw", 6, "length"),
    (["four"], 99, "one two three", 13, "stop"),
]


@pytest.mark.parametrize(("stops", "most", "text", "tokens", "reason"), CASES)
def test_a_text_ends_at_its_end_a_stop_text_or_its_length(stops, most, text, tokens, reason):
    found = completion(TOKENIZER, IDS, most=most, stops=stops)
    assert (found.text, found.tokens, found.reason) == (text, tokens, reason)


@pytest.mark.parametrize(("stops", "most", "text", "tokens", "reason"), CASES)
def test_what_is_settled_only_grows_and_is_never_taken_back(stops, most, text, tokens, reason):
    parts = [settled(TOKENIZER, IDS[:n], most=most, stops=stops) for n in range(len(IDS) + 1)]
    assert all(text.startswith(part) for part in parts)
    assert all(after.startswith(part) for part, after in zip(parts, parts[1:], strict=False))


def test_the_start_of_a_stop_text_is_held_back():
    ids = TOKENIZER.encode("a tw")
    assert settled(TOKENIZER, ids, most=9, stops=["two", "w7"]) == "a "
    assert settled(TOKENIZER, ids, most=9, stops=["wx"]) == "a t"
    assert settled(TOKENIZER, ids, most=9, stops=[]) == "a tw"


def test_a_character_is_held_back_until_all_its_bytes_are_there(tmp_path):
    bytewise = load_tokenizer(TokenizerSettings(str(write_llada(tmp_path / "bytes"))))
    ids = bytewise.encode("a\u20acb")
    assert len(ids) == 5 and bytewise.decode(ids[:3]) == "a\ufffd"
    parts = [settled(bytewise, ids[:n], most=9, stops=[]) for n in range(6)]
    assert parts == ["", "a", "a", "a", "a\u20ac", "a\u20acb"]
