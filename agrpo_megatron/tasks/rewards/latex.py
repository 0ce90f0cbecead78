r"""d1's comparison of LaTeX answers: strings, after the normalisation of the MATH benchmark.

Source: the MATH data set's published `strip_string` rules, as d1 uses them. Their oddities are
kept, since published accuracies depend on them: if a rule cannot handle a text, the raw strings
are compared.
"""

from agrpo_megatron.tasks.rewards.extract import closing_brace

_REPLACED = (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_REMOVED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")


class _Unhandled(Exception):
    """A rule cannot handle a text."""


def is_equivalent(first: str, second: str) -> bool:
    """Return whether two answers are the same string after normalisation."""
    try:
        return normalise(first) == normalise(second)
    except _Unhandled:
        return first == second


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last box; without a box the whole text; None if it is not closed.

    `\boxed x` without braces has priority over all others, and ends at the next dollar sign.
    """
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return text
    end = closing_brace(text, start)
    if end is None:
        return None
    box = text[start : end + 1]
    return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else box


def normalise(text: str) -> str:
    """Return an answer in its normal form."""
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for old in _REMOVED:
        text = text.replace(old, "")
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise _Unhandled
    for old, new in ((r"\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # such as `x = `
        text = sides[1]
    text = _with_braces(text, "\\sqrt", arguments=1).replace(" ", "")
    text = _with_braces(text, "\\frac", arguments=2)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _slash_as_fraction(text)


def _with_braces(text: str, command: str, *, arguments: int) -> str:
    r"""Put one-letter arguments into braces: `\frac12` becomes `\frac{1}{2}`."""
    head, *tails = text.split(command)
    fixed = [head]
    for tail in tails:
        if not tail:
            raise _Unhandled
        if tail[0] == "{":
            fixed.append(tail)
        elif arguments == 1:
            fixed.append(f"{{{tail[0]}}}{tail[1:]}")
        elif len(tail) < 2:
            return text
        else:
            second = tail[1] if tail[1] == "{" else f"{{{tail[1]}}}"
            fixed.append(f"{{{tail[0]}}}{second}{tail[2:]}")
    return command.join(fixed)


def _slash_as_fraction(text: str) -> str:
    sides = text.split("/")
    if len(sides) != 2:
        return text
    try:
        top, bottom = map(int, sides)
    except ValueError:
        raise _Unhandled from None
    return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text
