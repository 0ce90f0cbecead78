"""Tokenizers: the built-in characters, sentencepiece, or Hugging Face.

Importing this module loads neither torch, sentencepiece nor transformers.
"""

import itertools
import json
import os
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrpo_megatron.config.settings import TokenizerSettings
from agrpo_megatron.families.config_json import CONFIG, GENERATION, end_ids, read_object
from agrpo_megatron.text.chat import CONTROL_TOKENS, DEFAULT, Template, choose_template
from agrpo_megatron.types import Prompt

CHARACTERS = Path(__file__).parent / "characters.model"
MASK_PIECES = ("<mask>", "<|mdm_mask|>", "<|mask|>")
EOS_PIECES = ("<eos>", "</s>", "<|endoftext|>")
STOP_PIECES = ("<|eot_id|>", "<|im_end|>", "<|endoftext|>")  # end of a turn of LLaDA and Dream
MASK_TEXT = "_"
EOS_TEXT = "<eos>"
FIX = (
    "give a sentencepiece .model file, a Hugging Face directory, or null for the built-in "
    "characters"
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with a mask token; the callables belong to its library and need known ids."""

    vocab_size: int
    mask_id: int
    eos_id: int  # fills a completion after its text
    stop_ids: frozenset[int]  # the first of these ends a completion's text; includes eos_id
    unknown_id: int | None  # for text outside the vocabulary; None if there is no such text
    special: frozenset[int]  # ids without text
    render: Template
    to_ids: Callable[[list[str]], list[list[int]]]
    to_text: Callable[[list[int]], str]
    to_piece: Callable[[int], str]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without added tokens."""
        return self.encode_prompts([text])[0]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of a text, or of a chat in the chat template."""
        return self.encode_prompts([prompt])[0]

    def text_of(self, prompt: Prompt) -> str:
        """Return the exact text of a prompt, with the tokens of the chat template."""
        return prompt if isinstance(prompt, str) else self.render(prompt)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt in one call, which is faster.

        Raises:
            ValueError: a text holds half of a surrogate pair.
        """
        texts = [self.text_of(prompt) for prompt in prompts]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 40) : error.end]
            raise ValueError(f"a text with {near!r} holds half of a character; remove it") from None
        return self.to_ids(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text before the first stop token, without special or unknown ids."""
        kept = itertools.takewhile(lambda i: i not in self.stop_ids, map(int, ids))
        return self.to_text([i for i in kept if self._has_text(i)])

    def decode_raw(self, ids: Iterable[int]) -> str:
        """Return the whole text, also after stop tokens; special ids appear by name."""
        known = (i for i in map(int, ids) if 0 <= i < self.vocab_size)
        runs = itertools.groupby(known, self._has_text)
        return "".join(
            self.to_text(list(run)) if has_text else "".join(map(self.to_piece, run))
            for has_text, run in runs
        )

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return one printable string per id: `_` for the mask token, escapes for line breaks."""
        return [self._piece(int(i)) for i in ids]

    def _has_text(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token not in self.special

    def _piece(self, token: int) -> str:
        if token == self.mask_id:
            return MASK_TEXT
        if token == self.eos_id:
            return EOS_TEXT
        if not 0 <= token < self.vocab_size:  # a padding row of the embedding
            return f"<{token}>"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.to_piece(token))


def load_tokenizer(settings: TokenizerSettings, *, mask_id: int | None = None) -> Tokenizer:
    """Load the tokenizer that `settings` names, from local files only.

    Args:
        mask_id: the mask token of a tokenizer that has none; None: it must have one.

    Raises:
        ValueError: the path is missing or unreadable, the vocabulary has no mask token or no
            end-of-text token, or the chat template cannot be used.
    """
    path = CHARACTERS if settings.path is None else Path(settings.path)
    if not os.path.exists(path):
        raise ValueError(f"tokenizer.path={path} does not exist; {FIX}")
    if os.path.isdir(path):
        return _load_huggingface(path, settings.chat_template, mask_id)
    if path.suffix == ".model":
        return _load_sentencepiece(path, settings.chat_template, mask_id)
    raise ValueError(f"tokenizer.path={path} is neither a .model file nor a directory; {FIX}")


def _load_sentencepiece(path: Path, chat_template: str | None, given_mask: int | None) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
        size = model.vocab_size()
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, "sentencepiece model", error) from None
    vocabulary = {model.id_to_piece(i): i for i in range(size)}
    own_mask = _find(vocabulary, MASK_PIECES)
    mask_id, eos_id = _require(
        path,
        mask_id=given_mask if own_mask is None else own_mask,
        eos_id=_find(vocabulary, EOS_PIECES),
    )
    silent = (model.is_control, model.is_unknown, model.is_unused)
    special = {i for i in range(size) if any(kind(i) for kind in silent)}
    return Tokenizer(
        vocab_size=size,
        mask_id=mask_id,
        eos_id=eos_id,
        stop_ids=_stop_ids(vocabulary, eos_id),
        unknown_id=model.unk_id(),
        special=frozenset(special | {mask_id, eos_id}),
        render=choose_template(chat_template, {}, vocabulary=vocabulary, special_tokens={}),
        to_ids=model.encode,
        to_text=model.decode,
        to_piece=lambda i: model.id_to_piece(i).replace("\u2581", " "),
    )


def _load_huggingface(path: Path, chat_template: str | None, given_mask: int | None) -> Tokenizer:
    try:
        model = _open_huggingface(path)
    except Exception as error:  # transformers raises many kinds for a broken directory
        raise _unreadable(path, "Hugging Face tokenizer directory", error) from None
    vocabulary, names = model.get_vocab(), model.special_tokens_map
    mask_id = model.mask_token_id
    if mask_id is None:  # LLaDA's and Dream's directories do not register it
        mask_id = _find(vocabulary, MASK_PIECES)
    if mask_id is None:  # Nemotron's is a reserved token
        mask_id = _declared_mask(path, set(vocabulary.values()))
    mask_id = given_mask if mask_id is None else mask_id
    mask_id, eos_id = _require(path, mask_id=mask_id, eos_id=model.eos_token_id)
    own = model.chat_template or {}
    own = {DEFAULT: own} if isinstance(own, str) else own
    added = {i for i, token in model.added_tokens_decoder.items() if token.special}
    control = {vocabulary[t] for t in itertools.chain(*CONTROL_TOKENS.values()) if t in vocabulary}
    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        mask_id=mask_id,
        eos_id=eos_id,
        stop_ids=_stop_ids(vocabulary, eos_id) | _declared_ends(path),
        unknown_id=None if model.unk_token_id == eos_id else model.unk_token_id,
        special=frozenset({*model.all_special_ids, *added, *control, mask_id, eos_id}),
        render=choose_template(
            chat_template,
            own,
            source=f"tokenizer.path={path}",
            vocabulary=vocabulary,
            special_tokens=names,
        ),
        to_ids=lambda texts: model(texts, add_special_tokens=False)["input_ids"] if texts else [],
        to_text=lambda ids: model.decode(ids, clean_up_tokenization_spaces=False),
        to_piece=lambda i: model.decode([i], clean_up_tokenization_spaces=False),
    )


def _open_huggingface(path: Path) -> Any:
    """Load a tokenizer without running code from its directory."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
    from transformers.utils import logging

    config = path / "tokenizer_config.json"
    declared = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    # Dream's class, shipped as code, is Qwen2's under another name.
    kinds = {"PreTrainedTokenizerFast": PreTrainedTokenizerFast, "DreamTokenizer": Qwen2Tokenizer}
    kind = kinds.get(declared.get("tokenizer_class", ""), AutoTokenizer)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # AutoTokenizer warns about a model type that it does not know
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # and about keys of such a config.json
            return kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)


def _find(vocabulary: dict[str, int], pieces: Iterable[str]) -> int | None:
    return next((vocabulary[piece] for piece in pieces if piece in vocabulary), None)


def _stop_ids(vocabulary: dict[str, int], eos_id: int) -> frozenset[int]:
    return frozenset({eos_id, *(vocabulary[p] for p in STOP_PIECES if p in vocabulary)})


def _declared_ends(path: Path) -> frozenset[int]:
    """Return the end-of-text ids in the model's configuration, one or several in each file."""
    files = (path / name for name in (CONFIG, GENERATION))
    found = [end for file in files if file.is_file() for end in end_ids(read_object(file))]
    return frozenset(end for end in found if type(end) is int)


def _declared_mask(path: Path, ids: Container[int]) -> int | None:
    """Return the mask token in the model's configuration, if the tokenizer has it."""
    file = path / CONFIG
    found = read_object(file).get("mask_token_id") if file.is_file() else None
    return found if type(found) is int and found in ids else None


def _require(path: Path, *, mask_id: int | None, eos_id: int | None) -> tuple[int, int]:
    """Return both ids, neither of them None."""
    if mask_id is None:
        raise ValueError(
            f"tokenizer.path={path} has no mask token; use the tokenizer of a masked-diffusion "
            f"model, or add one of {', '.join(MASK_PIECES)} to it, or set model.mask_token_id to "
            "an id without a text"
        )
    if eos_id is None:
        raise ValueError(
            f"tokenizer.path={path} has no end-of-text token; set its eos_token, or add one of "
            f"{', '.join(EOS_PIECES)} to it"
        )
    return mask_id, eos_id


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"tokenizer.path={path} is not a readable {kind} ({reason}); {FIX}")
