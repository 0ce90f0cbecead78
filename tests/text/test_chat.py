"""Chats of LLaDA and Dream, through their tokenizers' templates and ours."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo_megatron.config.settings import TaskSettings, TokenizerSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.text.tokenizer import Tokenizer, load_tokenizer
from agrpo_megatron.types import Chat, Message
from tests.text.chat_tokenizers import (
    DREAM_TOKENS,
    FIRST_ADDED,
    LLADA_TOKENS,
    write_dream,
    write_llada,
)

CHAT = Chat(
    (Message("system", "Think first.\n"), Message("user", " What is 6 x 7?")), "<reasoning>"
)
QUESTION = Chat((Message("user", "What is 6 x 7?"),))
TALK = Chat((Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye")))

LLADA_CHAT = (
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nThink first.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 6 x 7?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<reasoning>"
)
LLADA_QUESTION = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is 6 x 7?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
DREAM_CHAT = (
    "<|im_start|>system\nThink first.\n<|im_end|>\n<|im_start|>user\n What is 6 x 7?<|im_end|>\n"
    "<|im_start|>assistant\n<reasoning>"
)
DREAM_QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is 6 x 7?<|im_end|>\n<|im_start|>assistant\n"
)
WRITERS = {"llada": write_llada, "dream": write_dream}
TOKENS = {"llada": LLADA_TOKENS, "dream": DREAM_TOKENS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return a tokenizer directory of each family."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def published(folders) -> dict[str, Tokenizer]:
    """Return the tokenizer of each family with the template of its directory."""
    return {name: load_tokenizer(TokenizerSettings(str(path))) for name, path in folders.items()}


@pytest.mark.parametrize(
    "family, chat, text",
    [
        ("llada", CHAT, LLADA_CHAT),
        ("llada", QUESTION, LLADA_QUESTION),
        ("dream", CHAT, DREAM_CHAT),
        ("dream", QUESTION, DREAM_QUESTION),
    ],
)
def test_a_chat_is_laid_out_as_published(published, family, chat, text):
    tokenizer = published[family]
    ids = tokenizer.encode_prompt(chat)
    assert tokenizer.decode_raw(ids) == text
    # Control tokens are one id each, and everything else one id per byte.
    control = [token for token in TOKENS[family] if token in text]
    length = len(text.encode()) - sum(text.count(t) * (len(t) - 1) for t in control)
    assert len(ids) == length
    assert {i - FIRST_ADDED for i in ids if i >= FIRST_ADDED} == {
        TOKENS[family].index(token) for token in control
    }


@pytest.mark.parametrize("chat", [CHAT, QUESTION, TALK])
@pytest.mark.parametrize("family", WRITERS)
def test_built_in_templates_write_what_the_directories_do(published, folders, family, chat):
    chosen = TokenizerSettings(str(folders[family]), chat_template=family)
    assert load_tokenizer(chosen).render(chat) == published[family].render(chat)


@pytest.mark.parametrize("family, text", [("llada", LLADA_CHAT), ("dream", DREAM_CHAT)])
def test_a_directory_without_a_template_is_known_by_its_tokens(tmp_path, family, text):
    path = WRITERS[family](tmp_path / family, chat_template=None)
    assert load_tokenizer(TokenizerSettings(str(path))).render(CHAT) == text


def test_tokens_of_both_families_and_no_template_is_a_choice_for_the_user(tmp_path):
    path = write_llada(tmp_path / "both", chat_template=None)
    content = json.loads((path / "tokenizer.json").read_text())
    first = content["added_tokens"][-1]["id"] + 1
    for i, token in enumerate(("<|im_start|>", "<|im_end|>")):
        content["added_tokens"].append(
            {**content["added_tokens"][-1], "id": first + i, "content": token}
        )
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(TokenizerSettings(str(path)))
    assert tokenizer.decode_raw(tokenizer.encode_prompt("as it is")) == "as it is"
    with pytest.raises(ValueError, match="set tokenizer.chat_template to one of llada, dream"):
        tokenizer.encode_prompt(QUESTION)


SAYS = "{% for m in messages %}NAME {{ m['content'] }}{% endfor %}"
SEVERAL = {
    "the default of several": (["default", "tools"], None, "default What is 6 x 7?"),
    "one of several": (["default", "tools"], "tools", "tools What is 6 x 7?"),
    "the default by its name": (["default", "tools"], "default", "default What is 6 x 7?"),
    "one without a default": (["chat", "tools"], "chat", "chat What is 6 x 7?"),
    "published": (["chat", "tools"], "llada", LLADA_QUESTION),
    "plain": (["chat", "tools"], "plain", "What is 6 x 7?\n\n"),
    "a name that is built in": (["plain"], "plain", "What is 6 x 7?\n\n"),
    "a file": (["chat", "tools"], "own.jinja", "own What is 6 x 7?"),
    "none": ([], None, LLADA_QUESTION),
}


@pytest.fixture
def several(tmp_path):
    """Return a function that writes a tokenizer with named templates, and loads it."""

    def write(names, chosen):
        path = write_llada(tmp_path / "several", chat_template=None)
        file = path / "tokenizer_config.json"
        texts = [{"name": name, "template": SAYS.replace("NAME", name)} for name in names]
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": texts}))
        (tmp_path / "own.jinja").write_text(SAYS.replace("NAME", "own"))
        if chosen == "own.jinja":
            chosen = str(tmp_path / chosen)
        return path, load_tokenizer(TokenizerSettings(str(path), chat_template=chosen))

    return write


@pytest.mark.parametrize("name", SEVERAL)
def test_one_of_several_templates_is_chosen(several, name):
    names, chosen, text = SEVERAL[name]
    assert several(names, chosen)[1].render(QUESTION) == text


def test_several_templates_without_a_default_need_a_choice(several):
    path, tokenizer = several(["chat", "tools"], None)
    assert tokenizer.decode_raw(tokenizer.encode_prompt("as it is")) == "as it is"
    with pytest.raises(ValueError, match=".") as error:
        tokenizer.encode_prompt(QUESTION)
    assert str(error.value) == (
        f"tokenizer.path={path} has no chat template named default; set tokenizer.chat_template "
        "to one of chat, tools, llada, dream, plain, or a .jinja file"
    )


def test_a_template_that_is_not_there_names_those_that_are(several):
    with pytest.raises(ValueError, match="=tool must be one of llada, dream, plain, chat, tools, "):
        several(["chat", "tools"], "tool")


@pytest.mark.parametrize("family, end", [("llada", "<|eot_id|>"), ("dream", "<|im_end|>")])
def test_text_ends_at_the_first_stop_token_and_raw_text_does_not(published, family, end):
    tokenizer, fill = published[family], "<|endoftext|>"
    (end_id,), (fill_id,) = tokenizer.encode(end), tokenizer.encode(fill)
    assert tokenizer.eos_id == fill_id
    assert tokenizer.stop_ids == {end_id, fill_id}
    ids = [*tokenizer.encode("<answer>42"), end_id, *tokenizer.encode("x"), fill_id, fill_id]
    assert tokenizer.decode(ids) == "<answer>42"
    assert tokenizer.decode_raw(ids) == f"<answer>42{end}x{fill}{fill}"
    assert tokenizer.decode([tokenizer.eos_id, *ids]) == ""


@pytest.mark.parametrize("family, mask", [("llada", "<|mdm_mask|>"), ("dream", "<|mask|>")])
def test_special_tokens_of_the_families_are_known(published, family, mask):
    tokenizer = published[family]
    ids = {token: FIRST_ADDED + i for i, token in enumerate(TOKENS[family])}
    assert tokenizer.mask_id == ids[mask]
    assert tokenizer.eos_id == ids["<|endoftext|>"]
    assert tokenizer.special == frozenset(ids.values())
    assert tokenizer.unknown_id is None
    for token, i in ids.items():
        assert tokenizer.decode_raw([i]) == token
        assert tokenizer.decode([i]) == ""
    assert tokenizer.decode_raw([tokenizer.vocab_size, -1]) == ""  # rows that only pad


@pytest.mark.parametrize("family", WRITERS)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=40))
def test_round_trip(published, family, text):
    if family == "dream":  # Qwen's normaliser
        text = unicodedata.normalize("NFC", text)
    tokenizer = published[family]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode_raw(ids) == text
    assert tokenizer.encode_prompts([text, "next"]) == [ids, tokenizer.encode("next")]
    assert tokenizer.encode_prompts([]) == []


def test_plain_joins_texts_by_blank_lines_and_counts_no_roles():
    tokenizer = load_tokenizer(TokenizerSettings())
    assert tokenizer.render(CHAT) == "Think first.\n\nWhat is 6 x 7?\n\n<reasoning>"
    assert tokenizer.render(Chat((), "go")) == "go"


def test_characters_read_a_published_prompt_with_unknowns():
    tokenizer = load_tokenizer(TokenizerSettings())
    settings = TaskSettings(
        "countdown", train_problems=2, eval_problems=1, options={"protocol": "agrpo"}
    )
    task = build_task(settings)
    problem = task.problems("train")[0]
    ids = tokenizer.encode_prompt(task.prompt(problem))
    assert tokenizer.unknown_id in ids
    assert f"Target: {problem.fields['target']}" in tokenizer.decode_raw(ids)


def test_a_jinja_file_is_used_by_any_tokenizer(tmp_path, folders):
    path = tmp_path / "upper.jinja"
    path.write_text("{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}>")
    for folder in (None, str(folders["dream"])):
        tokenizer = load_tokenizer(TokenizerSettings(folder, chat_template=str(path)))
        assert tokenizer.render(TALK) == "USER: Hi\nASSISTANT: Hello.\nUSER: Bye\n>"


def test_a_jinja_file_cannot_reach_out_of_its_sandbox(tmp_path):
    path = tmp_path / "escape.jinja"
    path.write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    tokenizer = load_tokenizer(TokenizerSettings(chat_template=str(path)))
    with pytest.raises(
        ValueError, match=r"the chat template of .*escape.jinja cannot write a chat"
    ):
        tokenizer.encode_prompt(QUESTION)


@pytest.mark.parametrize(
    "text, reason", [("{{ 1 / 0 }}", "division by zero"), ("{{ messages[0].a.b }}", "no attribute")]
)
def test_a_template_that_fails_is_one_line(tmp_path, text, reason):
    path = tmp_path / "broken.jinja"
    path.write_text(text)
    tokenizer = load_tokenizer(TokenizerSettings(chat_template=str(path)))
    with pytest.raises(ValueError, match=f"cannot write a chat of user .*{reason}.*use token") as e:
        tokenizer.encode_prompt(QUESTION)
    assert "\n" not in str(e.value)


def test_a_template_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "latin.jinja"
    path.write_bytes("gr\xfcn".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jinja is not UTF-8 at byte 2; save it as UTF-8$"):
        load_tokenizer(TokenizerSettings(chat_template=str(path)))


def test_a_template_that_refuses_a_role_is_an_error_with_a_fix(tmp_path):
    path = tmp_path / "strict.jinja"
    path.write_text("{{ raise_exception('no system role') }}")
    tokenizer = load_tokenizer(TokenizerSettings(chat_template=str(path)))
    with pytest.raises(ValueError, match="a chat of system, user .no system role.; use tokenizer"):
        tokenizer.encode_prompt(CHAT)


@pytest.mark.parametrize(
    "chosen, message",
    [
        ("lada", "tokenizer.chat_template=lada must be one of llada, dream, plain, an existing"),
        ("lada", "own; did you mean llada?"),
        ("absent.jinja", "tokenizer.chat_template=absent.jinja must be one of"),
        ("dream", "writes <|im_start|>, <|im_end|>, which this tokenizer lacks; use plain"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(chosen, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tokenizer(TokenizerSettings(chat_template=chosen))


LOSING = {  # templates as people write them, and the role whose text is lost
    "another key": ("{% for m in messages %}{{ m.text }}{% endfor %}", "system"),
    "only the first message": ("{{ messages[0].content }}", "user"),
    "no system message": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "system",
    ),
    "a cut text": ("{% for m in messages %}{{ m.content[:8] }}{% endfor %}", "system"),
    "only assistants": (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
        "system",
    ),
    "nothing": ("Question:", "system"),
}
KEEPING = {  # templates that change a text, and keep it
    "trimmed": "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
    "in capitals": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "escaped": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "two texts in one": "{{ messages[0].content ~ messages[1].content }}",
    "words joined anew": "{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}",
}


def _with_template(folders, tmp_path, text):
    file = tmp_path / "own.jinja"
    file.write_text(text)
    return load_tokenizer(TokenizerSettings(str(folders["llada"]), chat_template=str(file)))


@pytest.mark.parametrize("name", LOSING)
def test_a_template_that_leaves_out_a_text_is_refused(folders, tmp_path, name):
    text, role = LOSING[name]
    tokenizer = _with_template(folders, tmp_path, text)
    with pytest.raises(
        ValueError, match=f"own.jinja cannot write .* leaves out the text of {role}"
    ):
        tokenizer.encode_prompt(CHAT)


@pytest.mark.parametrize("name", KEEPING)
def test_a_template_that_changes_a_text_is_not(folders, tmp_path, name):
    tokenizer = _with_template(folders, tmp_path, KEEPING[name])
    assert tokenizer.render(CHAT).endswith("<reasoning>")
    assert "6" in tokenizer.render(CHAT)


def test_equal_texts_hide_no_loss(folders, tmp_path):
    """The first text stands in the prompt, though only the second was written."""
    tokenizer = _with_template(folders, tmp_path, "{{ messages[-1].content }}")
    twice = Chat((Message("user", "Hi"), Message("user", "Hi there")))
    with pytest.raises(ValueError, match="leaves out the text of user"):
        tokenizer.render(Chat((Message("user", "Bye"), *twice.messages)))
    assert tokenizer.render(twice) == "Hi there"  # every text is there
