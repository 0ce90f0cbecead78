"""Problems from files and datasets: equal results for all formats, errors with row and column."""

import csv
import gzip
import json
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.benchmarks import PROTOCOLS
from tools.check_golds import check_file, main

DATA = Path(__file__).parents[1] / "fixtures" / "tasks" / "data"
ROWS = [
    {"nums": [3, 5, 7], "target": 22},
    {"nums": [30, 100, 93], "target": 23},
    {"nums": [1, 2, 3], "target": 6},
]


def build(name, *, protocol="agrpo", leaks="drop", eval_problems=None, **options):
    chosen = {"protocol": protocol, **options}
    return build_task(
        TaskSettings(name=name, options=chosen, leaks=leaks, eval_problems=eval_problems)
    )


def write_lines(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "output"])
        writer.writerows([",".join(map(str, row["nums"])), row["target"]] for row in rows)


WRITERS = {
    "x.jsonl": write_lines,
    "x.jsonl.gz": write_lines,
    "x.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "x.csv": write_csv,
    "x.parquet": lambda path, rows: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_alike(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    task = build("countdown", train=str(path), eval_problems=1)
    fields = [problem.fields for problem in task.problems("train")]
    assert fields == [{"numbers": row["nums"], "target": row["target"]} for row in ROWS]


def test_a_dataset_is_named_by_its_folder_and_split(tmp_path):
    folder = tmp_path / "problems"
    folder.mkdir()
    write_lines(folder / "train.jsonl", ROWS[:2])
    write_lines(folder / "test.jsonl", ROWS[2:])
    task = build("countdown", train=str(folder), eval=str(folder))
    assert [p.fields["target"] for p in task.problems("train")] == [22, 23]
    assert [p.fields["target"] for p in task.problems("eval")] == [6]
    swapped = build("countdown", train=f"{folder}@test", eval=f"{folder}:default@train[:1]")
    assert [p.fields["target"] for p in swapped.problems("train")] == [6]
    assert [p.fields["target"] for p in swapped.problems("eval")] == [22]


@pytest.mark.parametrize(
    "task, name, content, message",
    [
        ("countdown", "a.jsonl", None, "does not exist; give a .jsonl, .json, .csv or .parquet"),
        ("countdown", "a.jsonl", "", "holds no rows"),
        ("countdown", "a.jsonl", '{"nums": [1]}\n{"nums"', "is not readable as .jsonl (line 2: "),
        ("countdown", "a.jsonl", "[1]\n", "row 1: must hold one object with the columns"),
        ("countdown", "a.json", '{"nums": [1]}', "must hold a list of objects"),
        ("countdown", "a.parquet", "no parquet", "is not readable as .parquet"),
        ("countdown", "a.jsonl.gz", "no gzip", "is not readable as .jsonl"),
        (
            "countdown",
            "a.jsonl",
            '{"nums": [1, 2, 3], "target": 6}\n{"nums": [1, 2, 3]}\n',
            "row 2: no column target or output; it has nums",
        ),
        (
            "countdown",
            "a.jsonl",
            '{"nums": [1, "two", 3], "target": 6}\n',
            "row 1: column nums or numbers or input holds 'two', which is not a whole number",
        ),
        (
            "countdown",
            "a.jsonl",
            '{"nums": [1, 2, 3], "target": 6.5}\n',
            "row 1: column target or output holds 6.5, which is not a whole number",
        ),
        ("countdown", "a.jsonl", '{"nums": 5, "target": 6}\n', "holds 5, which is not a list"),
        (
            "sudoku",
            "a.csv",
            "Puzzle,Solution\n1000000000004000,1234341221434321\n10x0,1234341221434321\n",
            "row 2: column puzzle holds '00000000000010x0', which does not match [0-4]{16}",
        ),
        (
            "sudoku",
            "a.csv",
            "Puzzle,Solution\n2000000000004000,1234341221434321\n",
            "row 1: column solution holds 1234341221434321, which changes a clue of",
        ),
        (
            "gsm8k",
            "a.jsonl",
            '{"question": "1+1?", "answer": "2"}\n',
            "row 1: column answer has no",
        ),
        ("gsm8k", "a.jsonl", '{"question": 5, "answer": "#### 2"}\n', "column question holds 5"),
        ("gsm8k", "a.csv", "answer\n#### 2\n", "row 1: no column question; it has answer"),
        ("gsm8k", "a.csv", "question\n1+1?\n", "row 1: no column answer; it has question"),
        ("math", "a.jsonl", '{"problem": "?", "solution": "3"}\n', "no row has an answer; give"),
        ("math", "a.jsonl", '{"problem": "?", "solution": 5}\n', "row 1: column solution holds 5"),
        ("math", "a.jsonl", '{"problem": "?"}\n', "row 1: no column answer or solution; it has"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, task, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="task.options.eval=") as caught:
        build(task, train="none", eval=str(path)).problems("eval")
    assert str(caught.value).startswith(f"task.options.eval={path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, columns, row",
    [
        ("gsm8k", ("Question", "Answer"), ("1+1?", "1+1=2 #### 2")),
        ("math", ("Problem", "Solution", "Level"), ("1+1?", r"So \boxed{2}", "Level 4")),
    ],
)
def test_columns_are_found_in_any_letter_case(tmp_path, name, columns, row):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, row])
    task = build(name, protocol="d1", train="none", eval=str(path))
    (problem,) = task.problems("eval")
    assert problem.fields["answer"] == "2"
    assert problem.fields.get("level", 4) == 4
    assert task.verdict(problem, "", r"\boxed{2}").correct


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", sorted(DATA.glob("*.[jc]s*")), ids=lambda path: path.name)
def test_golds_are_right_and_others_wrong(path, protocol):
    name = path.name.split("_")[0].removesuffix("500")
    count = check_file(path, name, protocol=protocol)
    assert count.faults == []
    commas = sum(1 for line in path.read_text().splitlines() if "#### " in line and _comma(line))
    assert len(count.known) == (commas if protocol == "d1" else 0)
    assert (count.right, count.refused) == (40 - len(count.known), 40)


def test_checking_golds_of_no_folder_says_so(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    monkeypatch.setattr("sys.argv", ["check_golds.py", str(gone)])
    assert main() == 2
    said = capsys.readouterr().err
    assert said == f"{gone} is not a folder; give one with problem files\n"


def _comma(line):
    return "," in json.loads(line)["answer"].split("####")[1]


def test_leaks_are_dropped_refused_or_kept_and_always_told(tmp_path):
    held_out, train = tmp_path / "eval.jsonl", tmp_path / "train.jsonl"
    write_lines(held_out, ROWS[:2])
    write_lines(train, [{"nums": [7, 5, 3], "target": 15}, *ROWS[1:]])  # of both, the numbers
    sources = {"train": str(train), "eval": str(held_out)}
    task = build("countdown", **sources)
    assert [p.fields for p in task.problems("train")] == [{"numbers": [1, 2, 3], "target": 6}]
    said = "2 of 3 training problems are also held out"
    assert task.notes == [f"countdown: {said}; left out"]
    kept = build("countdown", leaks="keep", **sources)
    assert len(kept.problems("train")) == 3
    assert kept.notes == [f"countdown: {said}; KEPT (task.leaks=keep)"]
    with pytest.raises(ValueError, match=rf"task countdown: {said}; use task.leaks=drop"):
        build("countdown", leaks="refuse", **sources).problems("train")
    # What is held out but not drawn is no training problem either.
    assert len(build("countdown", eval_problems=1, **sources).problems("train")) == 1


def test_files_are_read_before_the_hub_is_asked(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("agrpo_megatron.tasks.row_sources._hub_failure", lambda: "")
    path = tmp_path / "train.jsonl"
    with pytest.raises(ValueError, match=r"^task.options.train=\S+ does not exist"):
        build("gsm8k", train=str(path)).problems("train")
    write_lines(path, [{"question": "1+1?", "answer": "#### 2"}])
    with pytest.raises(ValueError, match=r"^task.options.eval=madrylab/\S+ .*the hub was asked"):
        build("gsm8k", train=str(path)).problems("train")


def test_blanks_make_no_new_problem(tmp_path):
    path, train = tmp_path / "eval.jsonl", tmp_path / "train.jsonl"
    write_lines(path, [{"question": "How many?", "answer": "#### 2"}])
    write_lines(
        train,
        [{"question": q, "answer": "#### 2"} for q in (" How  many?\n", "How few?", "How few? ")],
    )
    task = build("gsm8k", train=str(train), eval=str(path))
    assert [p.fields["question"] for p in task.problems("train")] == ["How few?"]
    assert task.notes == [
        f"task.options.train={train}: 1 repeated problems left out",
        "gsm8k: 1 of 2 training problems are also held out; left out",
    ]


def test_puzzles_that_the_prompt_solves_are_told():
    held_out = build("sudoku", train="none", eval=str(DATA / "sudoku_4x4_test_d1.csv"))
    held_out.problems("eval")
    assert held_out.notes == [
        "sudoku: the prompt of protocol agrpo solves 3 held-out puzzles: do not report "
        "its accuracy on this file"
    ]
    spg = str(DATA / "sudoku_4x4_test_spg.csv")
    training = build("sudoku", train=str(DATA / "sudoku_4x4_test_d1.csv"), eval=spg)
    assert len(training.problems("train")) == 40
    assert training.notes == []


def test_rows_of_d1_come_in_its_order(tmp_path):
    path = tmp_path / "many.jsonl"
    write_lines(path, [{"nums": [1, 2, n], "target": n} for n in range(256)])
    task = build("countdown", protocol="d1", train="none", eval=str(path), eval_rows="d1")
    drawn = [problem.fields["target"] for problem in task.problems("eval")]
    assert sorted(drawn) == list(range(256))
    assert drawn[0] == 228  # d1's own first row of 256


def test_problems_are_made_apart_from_those_of_a_file():
    path = DATA / "countdown_cd3_test.jsonl"
    options = {"high": 99, "operators": "+-*/", "parentheses": True, "eval": str(path)}
    task = build_task(TaskSettings(name="countdown", train_problems=3000, options=options))
    held_out = {tuple(sorted(p.fields["numbers"])) for p in task.problems("eval")}
    train = {tuple(sorted(p.fields["numbers"])) for p in task.problems("train")}
    assert len(held_out) == 40
    assert len(task.problems("train")) == 3000
    assert not held_out & train


@pytest.mark.parametrize(
    "name, options",
    [
        ("countdown", {"high": 99, "operators": "+-*/", "parentheses": True}),
        ("sudoku", {"clues": 6}),
    ],
)
def test_twenty_thousand_problems_are_made_in_seconds(name, options):
    started = time.process_time()
    task = build_task(TaskSettings(name=name, options=options))
    assert (len(task.problems("train")), len(task.problems("eval"))) == (20_000, 256)
    assert time.process_time() - started < 10
