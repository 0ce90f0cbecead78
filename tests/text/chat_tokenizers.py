"""Tokenizer directories in the layout of LLaDA's and Dream's: real names, small ids."""

import json
from pathlib import Path

# The templates that the published directories carry.
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
DREAM_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLADA_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
DREAM_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
FIRST_ADDED = 256  # below are the bytes


def write_llada(path: Path, *, chat_template: str | None = LLADA_TEMPLATE) -> Path:
    """Write tokenizer.json and its config; the mask token is not registered, as published."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model = Tokenizer(models.BPE(vocab=_bytes(), merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    model.add_special_tokens([AddedToken(text, special=True) for text in LLADA_TOKENS])
    path.mkdir()
    model.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    _write(path / "config.json", {"model_type": "llada", "architectures": ["LLaDAModelLM"]})
    return _write_config(path, config, LLADA_TOKENS, chat_template)


def write_dream(path: Path, *, chat_template: str | None = DREAM_TEMPLATE) -> Path:
    """Write vocab.json, merges.txt and a config with a tokenizer class in code, as published."""
    path.mkdir()
    _write(path / "vocab.json", _bytes())
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "unk_token": None,
    }
    _write(path / "config.json", {"model_type": "Dream", "architectures": ["DreamModel"]})
    return _write_config(path, config, DREAM_TOKENS, chat_template)


def _bytes() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    return {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _write_config(
    path: Path, config: dict, tokens: tuple[str, ...], chat_template: str | None
) -> Path:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(FIRST_ADDED + i): {"content": token, "special": True, **flags}
        for i, token in enumerate(tokens)
    }
    chat = {} if chat_template is None else {"chat_template": chat_template}
    _write(path / "tokenizer_config.json", {**config, "added_tokens_decoder": added, **chat})
    return path


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
