"""Replies as tokens: exactly the assistant's texts are trained, after what the sampler sees."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo_megatron.config.settings import TokenizerSettings
from agrpo_megatron.text.replies import Conversation, token_rows
from agrpo_megatron.text.tokenizer import Tokenizer, load_tokenizer
from agrpo_megatron.types import Chat, Message
from tests.text.chat_tokenizers import write_dream, write_llada

THINKING = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% if loop.last %}<think>

</think>

{% endif %}{{ message.content.split('</think>')[-1].strip() }}{% else %}{{ message.content }}
{%- endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ENDS = {"llada": "<|eot_id|>", "dream": "<|im_end|>", "thinking": "<|im_end|>", "plain": "<eos>"}
texts = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=12)
replies = texts.filter(str.strip)
letters = st.text("abc xyz", min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """Return tokenizers whose templates close a turn, open it otherwise, or do neither."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "thinking.jinja").write_text(THINKING)
    paths = {
        "llada": (write_llada(root / "llada"), None),
        "dream": (write_dream(root / "dream"), None),
        "thinking": (root / "dream", str(root / "thinking.jinja")),
        "plain": (None, None),
    }
    return {
        name: load_tokenizer(TokenizerSettings(str(path) if path else None, template))
        for name, (path, template) in paths.items()
    }


def conversation(*turns: str, system: str = "") -> Conversation:
    """Return a conversation of texts of the user and the assistant, in turn."""
    first = [Message("system", system)] if system else []
    said = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    places = range(len(first) + 1, len(first) + len(turns), 2)
    return Conversation((*first, *said), tuple(places))


def trained_texts(tokenizer: Tokenizer, row) -> list[str]:
    """Return the text of each run of trained tokens, special tokens included."""
    ids = [int(i) if is_trained else -1 for i, is_trained in zip(row.ids, row.trained, strict=True)]
    runs = [[]]
    for token in ids:
        if token < 0:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode_raw(run) for run in runs if run]


@pytest.mark.parametrize("name", ["llada", "dream", "plain"])
@settings(max_examples=30)
@given(st.data())
def test_trained_tokens_are_the_replies(tokenizers, name, data):
    """Each reply and the token that ends it are trained, after what the sampler gets."""
    tokenizer, end = tokenizers[name], ENDS[name]
    some = letters if name == "plain" else replies
    turns = data.draw(st.lists(some, min_size=2, max_size=6))
    talk = conversation(*turns, system=data.draw(st.just("") | some))
    says = (lambda text: text) if name == "dream" else str.strip  # it keeps white space
    said = [says(talk.messages[place].content) for place in talk.replies]
    rows = {
        kind: token_rows(tokenizer, [(1, talk)], turns=kind, key="sft.data")[0]
        for kind in ("last", "each", "all")
    }
    assert [trained_texts(tokenizer, row) for row in rows["each"]] == [[t + end] for t in said]
    assert trained_texts(tokenizer, rows["last"][0]) == [said[-1] + end]
    ends = [end] * len(said) if name != "plain" else [""] * (len(said) - 1) + [end]
    assert trained_texts(tokenizer, rows["all"][0]) == list(map(str.__add__, said, ends))
    for row, place in zip(rows["each"], talk.replies, strict=True):
        assert row.ids[: row.prompt].tolist() == tokenizer.encode_prompt(
            Chat(talk.messages[:place])
        )
        assert row.trained[row.prompt :].all()
    assert rows["last"][0].ids.tolist() == rows["each"][-1].ids.tolist()
    assert rows["all"][0].ids.tolist() == rows["each"][-1].ids.tolist()


def test_what_the_template_opens_a_finished_reply_with_is_trained(tokenizers):
    tokenizer, talk = tokenizers["thinking"], conversation("Hi", "think", "Bye", "Ciao.")
    each = token_rows(tokenizer, [(1, talk)], turns="each", key="sft.data")[0]
    found = [trained_texts(tokenizer, row) for row in each]
    head = "<think>\n\n</think>\n\n"
    assert found == [[f"{head}think<|im_end|>"], [f"{head}Ciao.<|im_end|>"]]
    (row,) = token_rows(tokenizer, [(1, talk)], turns="all", key="sft.data")[0]
    assert trained_texts(tokenizer, row) == ["think<|im_end|>", f"{head}Ciao.<|im_end|>"]


def test_a_text_that_names_the_closing_token_is_not_cut(tokenizers):
    talk = conversation("Hi", "a <|im_end|> b")
    (row,) = token_rows(tokenizers["dream"], [(1, talk)], turns="last", key="sft.data")[0]
    assert trained_texts(tokenizers["dream"], row) == ["a <|im_end|> b<|im_end|>"]


def test_plain_text_has_no_template(tokenizers):
    plain = Conversation((Message("user", "a = "), Message("assistant", "b")), (1,), is_chat=False)
    tokenizer = tokenizers["llada"]
    (row,) = token_rows(tokenizer, [(1, plain)], turns="each", key="sft.data")[0]
    assert tokenizer.decode_raw(row.ids.tolist()) == "a = b<|endoftext|>"
    assert row.prompt == 4


def test_a_template_that_rewrites_a_reply_is_refused_with_its_row(tokenizers):
    talk = conversation("Hi", "<think>1</think>2")
    said = "sft.data, row 3: the chat template rewrites the assistant's text '<think>1</think>2'"
    with pytest.raises(ValueError, match=re.escape(said)):
        token_rows(tokenizers["thinking"], [(3, talk)], turns="last", key="sft.data")


def test_a_conversation_without_replies_has_no_rows(tokenizers):
    empty = Conversation((Message("user", "Hi"),), ())
    for turns in ("last", "each", "all"):
        assert token_rows(tokenizers["plain"], [(1, empty)], turns=turns, key="sft.data") == [[]]
