"""A completion in the terminal with the order in which its tokens were unmasked."""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from agrpo_megatron.reports.text import MASK_DOT, TAIL_BOX, tail_start, visible

INK = "#10151c"
MAX_LINES = 64  # more steps are thinned out evenly; the first and the last are kept


class Edit(NamedTuple):
    """A token that a denoising step overwrote by another."""

    step: int
    place: int
    old: str
    new: str


def trace(
    pieces: Sequence[str],
    unmask_step: Sequence[int],
    console: Console,
    *,
    num_steps: int,
    edits: Sequence[Edit] = (),
) -> None:
    """Print a completion coloured by denoising step, then one line per step.

    Masks are dots, as wide as the final token, so that lines align. Equal tokens at the end
    (end-of-text) are drawn as boxes.

    Args:
        num_steps: tokens at or past this step were filled in, not drawn.
        edits: in the order of their steps.
    """
    tail = tail_start(pieces)
    shown = [TAIL_BOX if i >= tail else visible(piece) for i, piece in enumerate(pieces)]
    console.print(_legend(num_steps))
    if tail < len(pieces):
        folded = f"{TAIL_BOX} is {visible(pieces[-1])} ({len(pieces) - tail} at the end)"
        console.print(Text(folded, style="dim"))
    console.print()
    cells = zip(shown, unmask_step, strict=True)
    console.print(Text.assemble(*((text, _colour(step, num_steps)) for text, step in cells)))
    console.print()
    console.print(_steps(shown, unmask_step, num_steps, edits))


def _steps(
    shown: Sequence[str], unmask_step: Sequence[int], num_steps: int, edits: Sequence[Edit]
) -> Table:
    """Return the state after each denoising step, with the tokens it unmasked or put coloured."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step", justify="right", style="dim", no_wrap=True)
    table.add_column("new", justify="right", style="dim", no_wrap=True)
    table.add_column("after it", overflow="fold")
    if edits:
        table.add_column("edited", overflow="fold")
    drawn = {step for step in unmask_step if step < num_steps} | {edit.step for edit in edits}
    for step in _thinned(sorted(drawn)):
        state, here = Text(), [edit for edit in edits if edit.step == step]
        places, texts = {edit.place for edit in here}, _before(shown, edits, step + 1)
        for place, (text, when) in enumerate(zip(texts, unmask_step, strict=True)):
            if when > step:
                state.append(MASK_DOT * cell_len(text), "dim")
            else:
                is_new = when == step or place in places
                state.append(text, _colour(step, num_steps) if is_new else None)
        said = ", ".join(f"{visible(edit.old)} -> {visible(edit.new)}" for edit in here)
        row = str(step), f"+{list(unmask_step).count(step)}", state, Text(said)
        table.add_row(*row[: len(table.columns)])
    filled = sum(step >= num_steps for step in unmask_step)
    if filled:
        table.add_row("end", f"+{filled}", Text("".join(shown)))
    return table


def _before(shown: Sequence[str], edits: Sequence[Edit], step: int) -> list[str]:
    """Return the tokens as they were before a step, where they are not masked."""
    texts = list(shown)
    for edit in reversed(edits):
        if edit.step >= step:
            texts[edit.place] = visible(edit.old)
    return texts


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    if len(steps) <= MAX_LINES:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MAX_LINES - 1))] for i in range(MAX_LINES)]


def _legend(num_steps: int) -> Text:
    legend = Text("denoising step  0 ")
    for i in range(24):
        legend.append(" ", _colour(round(i * (num_steps - 1) / 23), num_steps))
    return legend.append(f" {num_steps - 1}")


def _colour(step: int, num_steps: int) -> Style:
    """Return the colour of a step: blue first, through violet, to orange last."""
    if step >= num_steps:
        return Style(dim=True)
    share = step / max(1, num_steps - 1)
    red, green, blue = colorsys.hls_to_rgb((225 + 165 * share) % 360 / 360, 0.78, 0.9)
    tint = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return Style(color=INK, bgcolor=tint)
