"""Text to token ids and back: the built-in characters, sentencepiece, or Hugging Face.

Importing this module loads neither torch, sentencepiece nor transformers.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.settings import TokenizerSettings

CHARACTERS = Path(__file__).parent / "tasks" / "characters.model"
MASK_PIECES = ("<mask>", "<|mdm_mask|>", "<|mask|>")
EOS_PIECES = ("<eos>", "</s>")
SHOWN_MASK = "_"
SHOWN_EOS = "<eos>"
FIX = (
    "give a sentencepiece .model file, a Hugging Face directory, or null for the built-in "
    "characters"
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with a mask token; the callables are what its library does for known ids."""

    vocab_size: int
    mask_id: int
    eos_id: int
    special: frozenset[int]  # ids that stand for no text
    to_ids: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]
    to_piece: Callable[[int], str]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with nothing put before or after it."""
        return self.to_ids(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text before the first end-of-text, without special or unknown ids."""
        kept = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self.to_text([i for i in kept if self._has_text(i)])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return one printable string per id: `_` for the mask token, escapes for line ends."""
        return [self._piece(int(i)) for i in ids]

    def _has_text(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token not in self.special

    def _piece(self, token: int) -> str:
        if token == self.mask_id:
            return SHOWN_MASK
        if token == self.eos_id:
            return SHOWN_EOS
        if not 0 <= token < self.vocab_size:  # a row that only pads the embedding
            return f"<{token}>"
        shown = [c if c.isprintable() else ascii(c)[1:-1] for c in self.to_piece(token)]
        return "".join(shown)


def load_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """Load the tokenizer that `settings` names, from local files only.

    Raises:
        ValueError: the path is missing or unreadable, or the vocabulary lacks a mask token or an
            end-of-text token.
    """
    path = CHARACTERS if settings.path is None else Path(settings.path)
    if not path.exists():
        raise ValueError(f"tokenizer.path={path} does not exist; {FIX}")
    if path.is_dir():
        return _load_huggingface(path)
    if path.suffix == ".model":
        return _load_sentencepiece(path)
    raise ValueError(f"tokenizer.path={path} is neither a .model file nor a directory; {FIX}")


def _load_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
        size = model.vocab_size()
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, "sentencepiece model", error) from None
    vocabulary = {model.id_to_piece(i): i for i in range(size)}
    mask_id, eos_id = _require(
        path, mask_id=_find(vocabulary, MASK_PIECES), eos_id=_find(vocabulary, EOS_PIECES)
    )
    silent = (model.is_control, model.is_unknown, model.is_unused)
    special = {i for i in range(size) if any(kind(i) for kind in silent)}
    return Tokenizer(
        vocab_size=size,
        mask_id=mask_id,
        eos_id=eos_id,
        special=frozenset(special | {mask_id, eos_id}),
        to_ids=model.encode,
        to_text=model.decode,
        to_piece=lambda i: model.id_to_piece(i).replace("\u2581", " "),
    )


def _load_huggingface(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        model = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a broken directory
        raise _unreadable(path, "Hugging Face tokenizer directory", error) from None
    vocabulary = model.get_vocab()
    mask_id = model.mask_token_id
    if mask_id is None:
        mask_id = _find(vocabulary, MASK_PIECES)
    mask_id, eos_id = _require(path, mask_id=mask_id, eos_id=model.eos_token_id)
    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        mask_id=mask_id,
        eos_id=eos_id,
        special=frozenset({*model.all_special_ids, mask_id, eos_id}),
        to_ids=lambda text: model.encode(text, add_special_tokens=False),
        to_text=lambda ids: model.decode(ids, clean_up_tokenization_spaces=False),
        to_piece=lambda i: model.decode([i], clean_up_tokenization_spaces=False),
    )


def _find(vocabulary: dict[str, int], pieces: Iterable[str]) -> int | None:
    return next((vocabulary[piece] for piece in pieces if piece in vocabulary), None)


def _require(path: Path, *, mask_id: int | None, eos_id: int | None) -> tuple[int, int]:
    """Return both ids, neither of them None."""
    if mask_id is None:
        raise ValueError(
            f"tokenizer.path={path} has no mask token; use the tokenizer of a masked-diffusion "
            f"model, or add one of {', '.join(MASK_PIECES)} to it"
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
