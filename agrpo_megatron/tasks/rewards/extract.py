"""Extraction of answers from completions, in time linear in the text."""

import re
from typing import Any

CELLS = 16  # of a 4x4 grid

type Fields = dict[str, Any]  # of a `Problem`


def tagged(text: str, tag: str) -> str | None:
    """Return the text between the first `<tag>` and the next `</tag>`, in any case, stripped."""
    opening, closing = (re.compile(f"<{end}{tag}>", re.IGNORECASE) for end in ("", "/"))
    start = opening.search(text)
    end = closing.search(text, start.end()) if start else None
    return text[start.end() : end.start()].strip() if start and end else None


def last_tagged(text: str) -> str | None:
    """Return the content of the last complete `<answer>` block, stripped; blocks do not overlap."""
    found, place = None, 0
    while (start := text.find("<answer>", place)) >= 0:
        end = text.find("</answer>", start)
        if end < 0:
            break
        found, place = text[start + len("<answer>") : end], end
    return None if found is None else found.strip()


def boxed(text: str) -> str | None:
    r"""Return the text between the first `\boxed{` and its closing brace."""
    start = text.find("\\boxed{")
    end = closing_brace(text, start) if start >= 0 else None
    return None if end is None else text[start + len("\\boxed{") : end]


def closing_brace(text: str, start: int) -> int | None:
    """Return the index of the brace that first balances the braces from `start` on."""
    depth = 0
    for match in re.compile("[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0 and match[0] == "}":
            return match.start()
    return None


def cells_right(grid: str, puzzle: str, solution: str) -> tuple[int, int]:
    """Return how many empty cells of a puzzle are right in a grid of 16, and their number."""
    empty = [i for i in range(CELLS) if puzzle[i] == "0"]
    return sum(grid[i] == solution[i] for i in empty), len(empty)


def share(right: int, empty: int) -> float:
    """Return the share of empty cells that are right; 0 for a puzzle without empty cells."""
    return right / empty if empty else 0.0
