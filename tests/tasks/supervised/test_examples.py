"""The examples of sources: sizes, shares, held-out rows, long and empty ones, real data sets."""

import json
import re

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.tasks.base import task_prompts

ROOM = ["model.max_sequence_length=64", "sampling.completion_length=8", "sampling.block_length=4"]
ROOM += ["sampling.denoising_steps=4", "algorithm.mc_samples=2", "sft.batch_size=4"]


def messages(question: str, *more: str) -> dict:
    """Return a row of a user's question and of further turns, the assistant's first."""
    turns = [("user", question), *zip(["assistant", "user"] * len(more), more, strict=False)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(*overrides: str) -> Resolved:
    """Resolve a run of the supervised phase alone."""
    settings = load(Settings, None, [*ROOM, *overrides])
    return resolve(settings, world_size=1, needs=None, phases=("sft",))


def rows_of(tmp_path, count=10, name="chats.jsonl"):
    return write(tmp_path / name, [messages(f"ask {n}", f"say {n}") for n in range(count)])


def test_the_plan_tells_what_was_read(tmp_path):
    path = rows_of(tmp_path)
    resolved = read(f"sft.data={path}", "sft.epochs=3")
    assert resolved.settings.sft.iterations == 8  # 30 examples in batches of 4
    assert resolved.settings.sft.padding == "batch"
    assert resolved.task.notes == [
        f"{path}: 10 rows read as messages",
        "supervised rows: 10 to train on, 0 held out; 13 to 13 tokens, on average 13, of which 6 "
        "are trained",
        "sft.epochs=3 of 10 examples are 8 iterations",
    ]
    assert read(f"sft.data={path}", "sft.iterations=5").task.notes[-1] == (
        "sft.iterations=5 are 2 epochs"
    )
    again = [f"sft.data={path}", "sft.epochs=3", "sft.iterations=8", "sft.padding=batch"]
    assert read(*again).settings == resolved.settings


def test_the_replies_that_are_trained(tmp_path):
    talk = messages("a", "b", "c", "d", "e")
    path = write(tmp_path / "a.jsonl", [talk, messages("only a question"), messages("f", "g")])
    found = {}
    for turns in ("random", "last", "each", "all"):
        resolved = read(f"sft.data={path}", "sft.epochs=1", f"sft.turns={turns}")
        assert resolved.supervised is not None
        found[turns] = [len(example.rows) for example in resolved.supervised.train]
        note = f"sft.data={path}: 1 of 3 rows have no reply to train; left out"
        assert note in resolved.task.notes
        assert any("earlier reply" in n for n in resolved.task.notes) == (turns == "all")
    assert found == {"random": [2, 1], "last": [1, 1], "each": [1, 1, 1], "all": [1, 1]}


def test_long_rows_are_refused_or_left_out(tmp_path):
    rows = [messages("ask", "say"), messages("x" * 70, "y"), messages("ask", "say", "x" * 70, "y")]
    path = write(tmp_path / "a.jsonl", rows)
    said = "2 of 3 rows have over 64 tokens, the longest 84; leave them out by sft.long_rows=drop"
    with pytest.raises(ValueError, match=said):
        read(f"sft.data={path}", "sft.epochs=1")
    resolved = read(f"sft.data={path}", "sft.epochs=1", "sft.long_rows=drop")
    assert resolved.supervised is not None
    # The last row keeps its first reply.
    assert [len(example.rows) for example in resolved.supervised.train] == [1, 1]
    assert any("2 of 3 rows have over 64" in note for note in resolved.task.notes)


def test_padding_counts_for_the_length(tmp_path):
    path = write(tmp_path / "a.jsonl", [messages("x" * 54, "y")])  # 56 + 2 tokens
    read(f"sft.data={path}", "sft.epochs=1")
    read(f"sft.data={path}", "sft.epochs=1", "sft.padding=completion")  # 56 + 8
    path = write(tmp_path / "b.jsonl", [messages("x" * 55, "y")])
    with pytest.raises(ValueError, match="over 64 tokens, the longest 65"):
        read(f"sft.data={path}", "sft.epochs=1", "sft.padding=completion")


def test_held_out_rows_are_chosen_by_content(tmp_path):
    """A growing file keeps its held-out rows, equal rows stay together, none is trained on."""
    path = rows_of(tmp_path, 40)
    small = read(f"sft.data={path}", "sft.epochs=1", "sft.eval_fraction=0.1").supervised
    rows = [messages(f"ask {n}", f"say {n}") for n in range(40)]
    write(tmp_path / "twice.jsonl", rows + rows)
    twice = f"sft.data={tmp_path / 'twice.jsonl'}"
    double = read(twice, "sft.epochs=1", "sft.eval_fraction=0.1").supervised
    assert small is not None and double is not None
    assert (len(small.train), len(small.held_out)) == (36, 4)
    assert (len(double.train), len(double.held_out)) == (72, 8)
    talks = {example.talk for example in small.held_out}
    assert {example.talk for example in double.held_out} == talks
    assert not talks & {example.talk for example in double.train}


def test_what_any_source_holds_out_is_trained_in_none(tmp_path):
    """A row of the first source that the second one holds out is not trained either."""
    a, b = rows_of(tmp_path, 12), rows_of(tmp_path, 6, "b.jsonl")
    found = read(f"sft.data=[{a}, {b}]", "sft.epochs=1", "sft.eval_fraction=0.34").supervised
    assert found is not None and len(found.held_out) == 6
    held = {example.talk for example in found.held_out}
    assert not held & {example.talk for example in found.train}
    again = read(f"sft.data=[{b}, {a}]", "sft.epochs=1", "sft.eval_fraction=0.34").supervised
    assert again is not None and {e.talk for e in again.train} == {e.talk for e in found.train}


def test_no_turn_of_a_held_out_conversation_is_trained(tmp_path):
    rows = []
    for n in range(10):
        turns = messages(f"a {n}", f"b {n}")["messages"] + messages("c", "d")["messages"]
        rows.append({"messages": turns})
    path = write(tmp_path / "turns.jsonl", rows)
    words = ["sft.epochs=1", "sft.eval_fraction=0.2", "sft.turns=each"]
    found = read(f"sft.data={path}", *words).supervised
    assert found is not None and (len(found.train), len(found.held_out)) == (16, 4)
    held, kept = ({e.name for e in part} for part in (found.held_out, found.train))
    assert (len(held), len(kept)) == (2, 8) and not held & kept


def test_rows_that_are_also_held_out_are_not_trained(tmp_path):
    data, held = rows_of(tmp_path), rows_of(tmp_path, 3, "held.jsonl")
    resolved = read(f"sft.data={data}", "sft.epochs=1", f"sft.eval_data={held}")
    assert resolved.supervised is not None
    assert (len(resolved.supervised.train), len(resolved.supervised.held_out)) == (7, 3)
    assert f"sft.data={data}: 3 of 10 examples are held out" in resolved.task.notes


@pytest.mark.parametrize(
    "parts, shares, epoch",
    [
        ("[{a}, {b}]", [(10, 10.0), (4, 4.0)], 14),
        ("{{one: {a}, two: {b}}}", [(10, 10.0), (4, 4.0)], 14),
        ("{{one: {a}, two: {{data: {b}, epochs: 2}}}}", [(10, 10.0), (4, 8.0)], 18),
        (
            "{{one: {{data: {a}, weight: 1}}, two: {{data: {b}, weight: 3}}}}",
            [(10, 1.0), (4, 3.0)],
            14,
        ),
    ],
)
def test_a_mixture_weighs_its_parts(tmp_path, parts, shares, epoch):
    a = rows_of(tmp_path)
    rows = [{"q": f"ask {n}", "a": "say"} for n in range(4)]
    b = write(tmp_path / "b.jsonl", [{"question": row["q"], "answer": "b"} for row in rows])
    resolved = read("sft.data=" + parts.format(a=a, b=b), "sft.epochs=1")
    assert resolved.supervised is not None
    assert (resolved.supervised.shares, resolved.supervised.epoch) == (shares, epoch)
    assert f"{b}: 4 rows read as question and answer" in resolved.task.notes


@pytest.mark.parametrize(
    "overrides, said",
    {
        "no file": (["sft.data=none.jsonl"], "sft.data=none.jsonl does not exist; give a .jsonl"),
        "an ending": (["sft.data=a.txt"], "sft.data=a.txt has an unknown ending"),
        "no phase": (["sft.data=a.jsonl", "sft.epochs=null"], "sft.iterations=0 has none; set for"),
        "no data": (["sft.turns=last"], "sft.turns=last is for rows of sft.data, which is null"),
        "both": (["sft.data=a.jsonl", "sft.iterations=2"], "sft.iterations=2 and sft.epochs=1 dis"),
        "a part's key": (["sft.data={x: {path: a.jsonl}}"], "sft.data.x.path is not a setting"),
        "a part without data": (["sft.data={x: {weight: 1}}"], "sft.data.x has no data"),
        "a part is a number": (["sft.data={x: 3}"], "sft.data.x=3 must be a file or a section"),
        "some weights": (
            ["sft.data={x: {data: a.jsonl, weight: 1}, y: a.jsonl}"],
            "sft.data.y has no weight, and other parts have",
        ),
        "weight and epochs": (
            ["sft.data={x: {data: a.jsonl, weight: 1, epochs: 2}}"],
            "sft.data.x: weight=1 and epochs=2 both give its share",
        ),
        "no held-out rows": (["sft.data=a.jsonl", "sft.eval_interval=5"], "needs held-out rows"),
        "two held-out sets": (
            ["sft.data=a.jsonl", "sft.eval_data=a.jsonl", "sft.eval_fraction=0.1"],
            "both name held-out rows; use one of them",
        ),
        "too long": (["sft.data=a.jsonl", "sft.row_tokens=65"], "sft.row_tokens=65 is over model"),
        "all held out": (["sft.data=a.jsonl", "sft.eval_data=a.jsonl"], "leaves no row to train"),
        "problems": (["sft.data=a.jsonl", "sft.problems=3"], "sft.problems=3 selects solutions of"),
        "within a block": (
            ["sft.data=a.jsonl", "sft.padding=none", "model.attention=block_causal"]
            + ["model.block_length=4"],
            "sft.padding=none ends a row within a block",
        ),
    }.values(),
)
def test_a_wrong_setting_is_one_line_with_its_fix(tmp_path, monkeypatch, overrides, said):
    monkeypatch.chdir(tmp_path)
    rows_of(tmp_path, name="a.jsonl")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read("sft.epochs=1", *overrides)
    assert "\n" not in str(caught.value)


def test_parquet_and_saved_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [messages(f"ask {n}", f"say {n}") for n in range(10)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "two")
    table.to_json(tmp_path / "folder" / "a.jsonl")
    expected = read(f"sft.data={rows_of(tmp_path)}", "sft.epochs=1").supervised
    assert expected is not None
    for name in ("a.parquet", "one", "two", "two@train", "folder"):
        found = read(f"sft.data={tmp_path / name}", "sft.epochs=1").supervised
        assert found is not None and found.digests() == expected.digests()
    held = f"sft.eval_data={tmp_path / 'two'}"  # its test split
    found = read(f"sft.data={tmp_path / 'one'}", "sft.epochs=1", held).supervised
    assert found is not None and (len(found.train), len(found.held_out)) == (9, 1)
    with pytest.raises(ValueError, match=r"valid cannot be loaded \(it has no split valid, but t"):
        read(f"sft.data={tmp_path / 'two@valid'}", "sft.epochs=1")


def test_rows_that_ask_held_out_problems_follow_the_rule_for_leaks(tmp_path):
    """Twelve questions, of which the task holds out three, in any form that a row may have."""
    task = write(tmp_path / "task.jsonl", [{"q": f"ask  {n}", "answer": "1"} for n in range(12)])
    options = f"{{train: {task}, held_out: 3, columns: {{prompt: q}}, system: Be brief."
    own = ["task.name=jsonl", f"task.options={options}}}", "train.iterations=1"]
    rows = [messages(f"ask {n}", "say") for n in range(12)]  # one space, no system message
    rows += [messages("Hi", "Ho", f"ask {n}", "say") for n in range(12)]  # a later turn
    rows += [messages(f"ask {n} now", "say") for n in range(12)]  # other questions
    path = write(tmp_path / "chats.jsonl", rows)

    def resolved(*overrides):
        settings = [f"sft.data={path}", "sft.epochs=1", *own, *overrides]
        return resolve(load(Settings, None, [*ROOM, *settings]), world_size=1, phases=("sft", "rl"))

    found = resolved()
    said = f"sft.data={path}: 6 of 36 rows ask held-out problems of jsonl"
    assert f"{said}; left out" in found.task.notes
    assert found.settings.sft.iterations == 8  # 30 rows in batches of 4
    numbers = {problem.fields["q"].split()[1] for problem in found.task.problems("eval")}
    out = {int(n) + 1 for n in numbers} | {int(n) + 13 for n in numbers}
    kept = {int(example.name.rpartition(" ")[2]) for example in found.supervised.train}
    assert kept == set(range(1, 37)) - out
    # A template of the task stands around the question.
    assert f"{said}; left out" in resolved("task.options.template='Q: {q}, A:'").task.notes
    everything = resolved("task.leaks=keep")
    assert f"{said}; KEPT (task.leaks=keep)" in everything.task.notes
    assert len(everything.supervised.train) == 36
    with pytest.raises(ValueError, match=rf"{re.escape(said)}, the first in row {min(out)}; use"):
        resolved("task.leaks=refuse")
    few = "other: {name: countdown, train_problems: 9, eval_problems: 3}"
    parts = f"{{mine: {{name: jsonl, options: {options}}}, leaks: refuse}}, {few}}}"
    with pytest.raises(ValueError, match="6 of 36 rows ask held-out problems of mine, the first"):
        resolved("task.name=mixture", "task.options={}", f"task.mixture={parts}")
    # A chat that somebody wrote out as text is known by its tokens.
    (asked,) = task_prompts(found.task, found.task.problems("eval")[:1], split="eval")
    text = found.tokenizer.render(asked)
    plain = write(tmp_path / "plain.jsonl", [{"prompt": text, "completion": "1"}] * 2)
    with pytest.raises(ValueError, match="leaves no row to train on: .*2 of 2 rows ask held-out"):
        resolved(f"sft.data={plain}")


def test_epochs_that_fill_their_batches_add_none(tmp_path):
    """1.1 * 100 / 10 is above 11 in floating point."""
    path = rows_of(tmp_path, 100)
    for epochs, iterations in ((1.1, 11), (1.11, 12), (0.01, 1)):
        resolved = read(f"sft.data={path}", f"sft.epochs={epochs}", "sft.batch_size=10")
        assert resolved.settings.sft.iterations == iterations
