"""About how many ids raw texts have, by their first ones: for plans, which read no more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.settings import SftSettings
from agrpo_megatron.tasks.supervised.sources import sources
from agrpo_megatron.tasks.supervised.text_files import COLUMN, ENDINGS, begin_of, text_files
from agrpo_megatron.text.tokenizer import Tokenizer

SOME = 64  # texts that stand for those of the files of one ending


@dataclass(frozen=True)
class TextSizes:
    """Estimates of what a run finds when it reads its texts."""

    tokens: int  # of all sources, those that are held out included
    iterations: int | None  # that `sft.epochs` take; None: without epochs


def estimated_sizes(sft: SftSettings, tokenizer: Tokenizer, *, length: int) -> TextSizes:
    """Estimate the ids of `sft.data` and `sft.eval_data`, and the iterations.

    Args:
        length: tokens of a row.

    Raises:
        ValueError: as `begin_of`, or there are no files.
    """
    tokens, shares = 0.0, list[tuple[float, float]]()
    chosen = sources(sft)
    for key, source in chosen.items():
        own = _tokens(source.data, source.columns or {}, tokenizer, key=key)
        rows = max(1.0, own / length)
        tokens, shares = tokens + own, [*shares, (rows, source.share(round(rows)))]
    if sft.eval_data is not None:
        tokens += _tokens(sft.eval_data, sft.columns, tokenizer, key="sft.eval_data")
    iterations = None
    if sft.epochs is not None:
        is_weighted = any(source.weight is not None for source in chosen.values())
        epoch = sum(rows if is_weighted else share for rows, share in shares)
        iterations = max(1, math.ceil(sft.epochs * epoch / sft.batch_size))
    return TextSizes(round(tokens), iterations)


def _tokens(source: str, columns: Mapping[str, Any], tokenizer: Tokenizer, *, key: str) -> float:
    """Return about how many ids a source has; the first file of an ending stands for all."""
    files, total = text_files(source, key=key)[0], 0.0
    for ending in ENDINGS:
        mine = [file for file in files if file.name.lower().endswith(ending)]
        for file in mine:
            texts, share = begin_of(file, columns.get(COLUMN, COLUMN), key=key, count=SOME)
            if any(texts):
                count = sum(len(ids) + 1 for ids in tokenizer.encode_prompts(texts) if ids)
                whole = sum(each.stat().st_size for each in mine)
                total += count / share * whole / file.stat().st_size
                break
    return total
