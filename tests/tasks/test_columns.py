"""Columns by type, damaged text and archives, endings of files, contradictions."""

import gzip
import json

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task

KNOWN = '{"problem": "What is 40 + 1?", "answer": "41"}\n'
LEFT_OUT = "1 rows without an answer left out"


def build(path, name="math", *, protocol="agrpo", split="eval", **options):
    other = {"train": "none"} if split == "eval" else {"eval": str(path)}
    chosen = {"protocol": protocol, **other, split: str(path), **options}
    return build_task(TaskSettings(name=name, options=chosen, leaks="keep"))


def refusal(path, name="math", **options):
    with pytest.raises(ValueError, match=r"^task\.options\.eval=") as caught:
        build(path, name, **options).problems("eval")
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("protocol", ["agrpo", "d1"])
@pytest.mark.parametrize(
    "cell, gold",
    {
        "text": ('"\\\\frac{1}{2}"', r"\frac{1}{2}"),
        "text is kept as written": ('" 42 "', " 42 "),
        "whole number": ("42", "42"),
        "negative number": ("-3", "-3"),
        "zero": ("0", "0"),
        "float that is whole": ("42.0", "42"),
        "float with decimals": ("2.50", "2.5"),
        "small float": ("1e-7", "0.0000001"),
        "large float": ("1e22", "1" + "0" * 22),
        "one answer in a list": ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"),
        "one number in a list": ("[42.0]", "42"),
        "null": ("null", None),
        "empty": ('""', None),
        "blank": ('"  "', None),
        "NaN": ("NaN", None),
        "empty list": ("[]", None),
        "list of an empty text": ('[""]', None),
        "list of null": ("[null]", None),
    }.values(),
)
def test_the_answer_of_a_math_row(tmp_path, cell, gold, protocol):
    path = tmp_path / "a.jsonl"
    path.write_text(KNOWN + f'{{"problem": "6 times 7?", "answer": {cell}}}\n')
    task = build(path, protocol=protocol)
    golds = [problem.fields["answer"] for problem in task.problems("eval")]
    assert golds == (["41"] if gold is None else ["41", gold])
    assert task.notes == ([f"task.options.eval={path}: {LEFT_OUT}"] if gold is None else [])


@pytest.mark.parametrize(
    "cell, shown",
    [
        ('["3", "4"]', "['3', '4'], which is not one answer"),
        ('{"value": "42"}', "{'value': '42'}, which is not one answer"),
        ("true", "True, which is not one answer"),
        ("[true]", "True, which is not one answer"),
        ('[["3"]]', "['3'], which is not one answer"),
        ("Infinity", "inf, which is not one answer"),
        (r'"\ud83e 5"', r"'\ud83e' at character 1, half of a character"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_row(tmp_path, cell, shown):
    path = tmp_path / "a.jsonl"
    path.write_text(KNOWN + f'{{"problem": "6 times 7?", "answer": {cell}}}\n')
    assert f"row 2: column answer holds {shown}" in refusal(path)


@pytest.mark.parametrize("protocol", ["agrpo", "d1"])
@pytest.mark.parametrize(
    "rows, golds",
    [
        ('"6 x 7?","So \\boxed{42}.",', ["42"]),
        ('"6 x 7?","So \\boxed{42}."," "', ["42"]),
        ('"6 x 7?",,42', ["42"]),
        ('"6 x 7?","So \\boxed{}.",\n"5?","\\boxed{5}",', ["5"]),
        ('"6 x 7?","no box",\n"5?",,5', ["5"]),
        ('"6 x 7?",,\n"5?",,5', ["5"]),
    ],
)
def test_an_empty_cell_hides_no_box(tmp_path, rows, golds, protocol):
    path = tmp_path / "a.csv"
    path.write_text(f"problem,solution,answer\n{rows}\n")
    task = build(path, protocol=protocol)
    assert [problem.fields["answer"] for problem in task.problems("eval")] == golds
    left_out = rows.count("\n") + 1 - len(golds)
    assert task.notes == [f"task.options.eval={path}: {LEFT_OUT}"] * left_out


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("gsm8k", '{"question": "", "answer": "#### 2"}', "column question is empty"),
        ("gsm8k", '{"question": "?", "answer": null}', "column answer is empty"),
        ("gsm8k", '{"question": "?", "answer": 2}', "column answer holds 2, which is not text"),
        ("gsm8k", '{"question": ["?"], "answer": "#### 2"}', "column question holds ['?']"),
        ("gsm8k", r'{"question": "?", "answer": "\udc80#### 2"}', r"column answer holds '\udc80'"),
        ("gsm8k", '{"question": "?", "answer": "#### 2", "Answer": ""}', "differ only in letter"),
        ("gsm8k", '{"question": "?", "question": "!"}', "line 2: a column occurs twice: question"),
        ("gsm8k", '{"quest\\u001b\\nion": "?"}', r"no column question; it has quest\x1b ion"),
        ("gsm8k", "null", "row 2: must hold one object"),
        ("math", '{"problem": "?", "answer": "5", "level": true}', "column level holds True"),
        ("math", '{"problem": "?", "answer": "5", "level": [4]}', "column level holds [4]"),
        ("math", '{"problem": "?", "answer": "5", "solution": [5]}', "column solution holds [5]"),
        ("countdown", '{"nums": [1, true, 3], "target": 6}', "holds True, which is not a whole"),
        ("countdown", '{"nums": [1, 2, 3], "target": null}', "column target or output is empty"),
        ("countdown", '{"nums": {"1": 2}, "target": 6}', "holds {'1': 2}, which is not a list"),
        ("countdown", '{"nums": [1, 2, 3], "target": Infinity}', "holds inf, which is not a"),
        ("countdown", '{"nums": [[1], 2, 3], "target": 6}', "holds [1], which is not a whole"),
        ("sudoku", '{"puzzle": true, "solution": "1"}', "column puzzle holds '000000000000True'"),
        ("sudoku", '{"puzzle": "1", "solution": ""}', "column solution is empty"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_with_its_row(tmp_path, name, row, message):
    good = {
        "gsm8k": '{"question": "1+1?", "answer": "#### 2"}',
        "math": KNOWN.strip(),
        "countdown": '{"nums": [1, 2, 3], "target": 6}',
        "sudoku": '{"puzzle": "1000000000004000", "solution": "1234341221434321"}',
    }
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good[name]}\n{row}\n")
    said = refusal(path, name)
    assert message in said
    assert "row 2: " in said or "line 2: " in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("question,answer\nTom, has 5,#### 5\n", "row 1 has more cells than the header"),
        ('question,answer\n"Tom has 5,#### 5\n', "unexpected end of data"),
        ('question,answer\n"Tom" has 5,#### 5\n', "',' expected after"),
        ("question,answer,answer\n?,#### 5,#### 6\n", "a column occurs twice"),
        ("question,answer\nHow many?\n", "row 1: column answer is empty"),
    ],
)
def test_cells_of_a_csv_that_shift_are_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert message in refusal(path, "gsm8k")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_byte_that_is_not_utf8_is_refused_with_its_row(tmp_path, name):
    rows = [{"question": q, "answer": "#### 2"} for q in ("fine?", "caf\udce9?")]
    text = json.dumps(rows, ensure_ascii=False)
    if name == "a.csv":
        text = "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows)
    elif name != "a.json":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path, data = tmp_path / name, text.encode("utf-8", "surrogateescape")
    assert b"caf\xe9" in data
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    said = refusal(path, "gsm8k")
    assert r"row 2: column question holds '\udce9' at character 4, half of a" in said


def test_what_no_task_reads_may_be_damaged(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "1+1?", "answer": "#### 2", "note": "caf\xe9 \\ud83e"}\n')
    assert len(build(path, "gsm8k").problems("eval")) == 1


def test_every_damaged_byte_of_an_archive_names_the_file(tmp_path):
    whole = "".join(f'{{"question": "{n}+{n}?", "answer": "#### {2 * n}"}}\n' for n in range(40))
    data, path = gzip.compress(whole.encode(), mtime=0), tmp_path / "a.jsonl.GZ"
    path.write_bytes(data)
    problems = build(path, "gsm8k").problems("eval")
    said = set()
    for place in range(len(data)):
        for bits in (0xFF, 0x06):
            path.write_bytes(data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])
            try:
                assert build(path, "gsm8k").problems("eval") == problems
            except ValueError as error:
                said.add(str(error))
    assert all(text.startswith(f"task.options.eval={path} is not readable") for text in said)
    assert any("while decompressing" in text for text in said)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_cut_archive_or_table_names_the_file(tmp_path, cut):
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(50)]
    import pyarrow
    import pyarrow.parquet

    tables = {"a.PARQUET": tmp_path / "whole.parquet", "a.jsonl.gz": tmp_path / "whole.gz"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tables["a.PARQUET"])
    tables["a.jsonl.gz"].write_bytes(gzip.compress(json.dumps(rows[0]).encode() * 9))
    for name, whole in tables.items():
        data, path = whole.read_bytes(), tmp_path / name
        path.write_bytes(data[: int(cut * len(data))])
        assert "is not readable as ." in refusal(path, "gsm8k")


@pytest.mark.parametrize(
    "name, said",
    [
        ("EVAL.JSONL", None),
        ("Eval.Json", None),
        ("eval.CSV", None),
        ("eval.jsonl.GZ", None),
        ("eval.JsonL.Gz", None),
        ("eval.ndjson", "has an unknown ending; give a .jsonl, .json, .csv or .parquet file"),
        ("eval.txt", "has an unknown ending"),
        ("eval.tsv", "has an unknown ending"),
        ("eval.jsonl.bz2", "has an unknown ending"),
        ("eval", "has an unknown ending"),
    ],
)
def test_an_ending_is_known_in_any_case_or_refused_at_once(tmp_path, monkeypatch, name, said):
    def unreachable(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    text = '{"question": "1+1?", "answer": "#### 2"}'
    if name.lower().endswith(".json"):
        text = f"[{text}]"
    if name.endswith("CSV"):
        text = "question,answer\n1+1?,#### 2\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.lower()[-2:] == "gz" else text.encode())
    monkeypatch.chdir(tmp_path)
    for source in (name, f"./{name}", str(path)):
        if said is None:
            assert len(build(source, "gsm8k").problems("eval")) == 1
        else:
            assert said in refusal(source, "gsm8k")


@pytest.mark.parametrize("source", ["/gone/eval", "./eval.ndjson", "../a@train", "~/eval"])
def test_a_path_that_is_missing_is_no_dataset_of_the_hub(monkeypatch, source):
    monkeypatch.setattr("datasets.load_dataset", None)
    assert f"={source} does not exist; give" in refusal(source, "gsm8k")


def test_rows_that_d1_draws_keep_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"nums": [1, 2, n], "target": n}) for n in range(300)]
    rows[228] = '{"nums": [1, 2, 228]}'  # d1 draws it early
    path.write_text("\n".join(rows))
    said = refusal(path, "countdown", protocol="d1", eval_rows="d1")
    assert ", row 229: no column target or output" in said


@pytest.mark.parametrize(
    "golds, contradicted",
    [
        (["2", "3"], "1 of them contradict the row kept, such as rows 1 and 2: '2' and '3'"),
        (["2", "2"], None),
        (["2", " 2"], None),
        ([r"\frac12", "1/2"], None),
        ([".5", "0.5"], None),
        (["2", "3", "2", "4"], "2 of them contradict the row kept, such as rows 1 and 2"),
        ([None, "3", "2"], "1 of them contradict the row kept, such as rows 2 and 3: '3' and '2'"),
    ],
)
def test_rows_of_one_question_with_unlike_answers_are_counted(tmp_path, golds, contradicted):
    path = tmp_path / "a.jsonl"
    rows = [{"problem": f"One{' ' * n} half?", "answer": gold} for n, gold in enumerate(golds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build(path)
    kept = [gold for gold in golds if gold is not None]
    assert [problem.fields["answer"] for problem in task.problems("eval")] == kept[:1]
    assert any(f"{len(kept) - 1} repeated problems left out" in note for note in task.notes)
    said = [note for note in task.notes if "contradict" in note]
    assert len(said) == (contradicted is not None)
    assert contradicted is None or contradicted in said[0]


def test_grids_of_one_puzzle_contradict_too(tmp_path):
    path = tmp_path / "a.jsonl"
    grids = ("1234341221434321", "1243341221344321")
    rows = [{"puzzle": "1000000000004000", "solution": grid} for grid in grids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build(path, "sudoku", protocol="d1")
    assert len(task.problems("eval")) == 1
    assert "1 of them contradict the row kept, such as rows 1 and 2" in task.notes[-1]
