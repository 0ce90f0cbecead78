"""Any rows of a file are read as written, or refused in one line with file, row and column."""

import json
import os
import re
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task

EXAMPLES = int(os.environ.get("AGRPO_EXAMPLES", "300"))  # of each task
FRAGMENTS = (
    *("5", "-3", "1,200", ".5", " ", "\n", "####", "\\boxed{", "}", "[", "]", "1000000000004000"),
    *("\ud83e", "\udcff", "\0", "\x1b[31m", "\u202e", "\ufeff", "\u2028", "nan", "null", "1_0"),
)
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=6).map("".join)
PLAIN = st.text("abc 5?", min_size=1, max_size=9).map(lambda text: f"q{text}")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just("x" * 50_000)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=2), max_leaves=6
)
NUMBER = st.integers(-999, 999)
NUMBERS = st.lists(NUMBER, min_size=3, max_size=3)
ANSWERS = NUMBER | NUMBER.map(str) | NUMBER.map(float) | NUMBER.map(lambda n: [str(n)])
GRIDS = st.sampled_from(
    [
        ("1000000000004000", "1234341221434321"),
        (1000000000004000, 1234341221434321),
        ("40", "1234341243212143"),
    ]
)
GOOD = {
    "gsm8k": st.builds(
        lambda text, gold: {"question": text, "answer": f"{text}\n#### {gold}"}, PLAIN, NUMBER
    ),
    "math": st.builds(lambda text, gold: {"problem": text, "answer": gold}, PLAIN, ANSWERS)
    | st.builds(lambda t, n: {"Problem": t, "Solution": f"So \\boxed{{{n}}}."}, PLAIN, NUMBER),
    "countdown": st.builds(lambda nums, n: {"nums": nums, "target": n}, NUMBERS, NUMBER)
    | st.builds(lambda n, t: {"input": str(n)[1:-1], "output": str(t)}, NUMBERS, NUMBER),
    "sudoku": GRIDS.map(lambda grids: {"puzzle": grids[0], "Solution": grids[1]}),
}
NOISE = st.sampled_from(
    [
        *("null", "[1]", '"text"', "7", "{", "{}", "}{", "\ufeff{}", "\0", "\udcff", "[" * 3000),
        *('{"question": ' + "[" * 900 + "]" * 900 + "}", '{"answer": ' + "9" * 5000 + "}"),
    ]
)
WHERE = re.compile(
    r", row \d+: .*(column|object)|\(line \d+: |holds no rows|no row has an answer"
    r"|the options select none of its problems"
)


def write_object(pairs):
    """Return a JSON object; a name may occur twice."""
    return "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "}"


@st.composite
def changed_rows(draw, name):
    """Return the text of a good row after a few changes."""
    pairs = list(draw(GOOD[name]).items())
    for _ in range(draw(st.integers(0, 2))):
        place, value = draw(st.integers(0, len(pairs) - 1)), draw(VALUES)
        column = pairs[place][0]
        change = draw(st.sampled_from(["value", "name", "case", "extra", "twice", "gone"]))
        if change in ("value", "twice"):
            pairs[place : place + (change == "value")] = [(column, value)]
        elif change in ("name", "case"):
            other = column.upper() if change == "case" else draw(TEXT | st.just(f"{column}s"))
            pairs[place] = (other, pairs[place][1])
        elif change == "extra":
            pairs.append((draw(TEXT), value))
        elif len(pairs) > 1:
            del pairs[place]
    return write_object(pairs)


def lines_of(name):
    """Return lists of (line, whether it is a good row)."""
    good = GOOD[name].map(lambda row: (write_object(row.items()), True))
    blank = st.sampled_from([("", True), ("  \t", True)])
    bad = (changed_rows(name) | NOISE).map(lambda line: (line, False))
    return st.lists(good | blank, max_size=5) | st.lists(good | blank | bad, max_size=5)


def cell(row, *names):
    """Return the first value in a row's columns that is not missing."""
    values = (value for name in names for column, value in row.items() if column.casefold() == name)
    return next((v for v in values if v not in (None, [], "") and v == v and str(v).strip()), None)


def is_as_written(name, fields, row):
    """Return whether the fields of a problem are the columns of a row."""
    if name == "gsm8k":
        answer = cell(row, "answer")
        same = isinstance(answer, str) and answer.partition("####")[2].strip() == fields["answer"]
        return same and cell(row, "question") == fields["question"]
    if name == "math":
        answer = cell(row, "answer")
        answer = cell({"answer": answer[0]}, "answer") if isinstance(answer, list) else answer
        if answer is None:
            same = f"{{{fields['answer']}}}" in str(cell(row, "solution"))
        elif isinstance(answer, str):
            same = answer == fields["answer"]
        else:
            same = Fraction(str(answer)) == Fraction(fields["answer"])  # in decimals, as written
        return same and cell(row, "problem", "question") == fields["question"]
    if name == "countdown":
        numbers = cell(row, "nums", "numbers", "input")
        numbers = re.findall(r"[^\s,\[\]]+", numbers) if isinstance(numbers, str) else numbers
        same = [int(number) for number in numbers] == fields["numbers"]
        return same and int(cell(row, "target", "output")) == fields["target"]
    puzzle, solution = (str(cell(row, column)) for column in ("puzzle", "solution"))
    return (puzzle.zfill(16), solution) == (fields["puzzle"], fields["solution"])


def identity(name, row):
    """Return the values in which the problems of two good rows differ."""
    if name == "countdown":
        numbers, target = cell(row, "nums", "input"), cell(row, "target", "output")
        numbers = numbers.split(",") if isinstance(numbers, str) else numbers
        return *sorted(map(int, numbers)), int(target)
    text = cell(row, *{"gsm8k": ["question"], "math": ["problem"], "sudoku": ["puzzle"]}[name])
    return str(text).zfill(16) if name == "sudoku" else " ".join(text.split())


@pytest.mark.parametrize("name", GOOD)
def test_rows_are_read_as_written_or_refused_with_their_place(name, tmp_path):
    path = tmp_path / "any.jsonl"

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        written=lines_of(name),
        protocol=st.sampled_from(("agrpo", "d1")),
        start=st.sampled_from(("", "\ufeff")),
        end=st.sampled_from(("\n", "\r\n")),
    )
    def check(written, protocol, start, end):
        text = start + "".join(line + end for line, _ in written)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        options = {"protocol": protocol, "train": "none", "eval": str(path)}
        try:
            problems = build_task(TaskSettings(name=name, options=options)).problems("eval")
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"task.options.eval={path}")
            assert message.isprintable() and len(message) < 800
            assert WHERE.search(message), message
            assert not all(good for _, good in written) or "holds no rows" in message
            return
        rows = [json.loads(line) for line, _ in written if line.strip()]
        for problem in problems:
            assert any(is_as_written(name, problem.fields, row) for row in rows), problem.fields
            json.dumps(problem.fields, ensure_ascii=False).encode()  # no half of a character
        if all(good for _, good in written):
            assert len(problems) == len({identity(name, row) for row in rows}), "a row is lost"

    check()
