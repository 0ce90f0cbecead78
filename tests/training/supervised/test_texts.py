"""Continued pre-training: raw texts cut into rows, resumed to the same bits, at any layout."""

import gzip
import json
import math
import random
import shutil
from dataclasses import replace

import numpy
import pytest
import torch.distributed as dist

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import ModelSettings, Settings, SftSettings, TokenizerSettings
from agrpo_megatron.launch.forecast import forecast
from agrpo_megatron.launch.speed import Speed
from agrpo_megatron.runs.directory import plan_settings, progress, resolve_run
from agrpo_megatron.runs.progress import RUN_SETTINGS
from agrpo_megatron.runs.sizes import measure
from agrpo_megatron.tasks.supervised import text_ids, texts
from agrpo_megatron.text.tokenizer import load_tokenizer
from agrpo_megatron.training.run import train
from agrpo_megatron.training.supervised import loss
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import same_metrics, silent_view, tiny

TOKENIZER = load_tokenizer(TokenizerSettings())
LENGTH = 20
RUN = [
    "task.name=missing.py",  # is not read
    "sft.format=texts",
    f"sft.row_tokens={LENGTH}",
    "sft.epochs=1.5",
    "sft.batch_size=4",
    "sft.eval_interval=4",
    "checkpoint.interval=2",
    "train.token_budget=64",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write texts of all endings in a folder with a folder below it."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path, draw = tmp_path_factory.mktemp("data") / "texts", random.Random(0)
    (path / "more").mkdir(parents=True)
    rows = ["".join(draw.choices("abcde", k=draw.randint(1, 60))) for _ in range(24)]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in [*rows[:8], ""])
    (path / "a.jsonl").write_text(lines)
    with gzip.open(path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in rows[8:12]))
    parquet.write_table(pyarrow.table({"text": rows[12:23]}), path / "c.parquet")
    (path / "more" / "d.txt").write_text(rows[23])
    (path / "notes.md").write_text("is not read")
    return path, rows


def _read(folder, target, **changes):
    sft = SftSettings(data=str(folder), format="texts", row_tokens=LENGTH, **changes)
    return texts.read_texts(sft, TOKENIZER, model=ModelSettings(), folder=target)


def test_every_token_of_every_text_is_in_one_row(folder, tmp_path):
    path, rows = folder
    found = _read(path, tmp_path)
    whole = [i for text in rows for i in [*TOKENIZER.encode(text), TOKENIZER.eos_id]]
    ids = [example.rows[0].ids for example in found.train]
    assert numpy.concatenate(ids).tolist() == whole[: sum(map(len, ids))]
    assert {len(row) for row in ids[:-1]} == {LENGTH} and len(whole) - sum(map(len, ids)) <= 1
    ends = TOKENIZER.eos_id
    for row in (example.rows[0] for example in found.train):
        assert row.trained.tolist() == [False, *(row.ids[:-1] != ends).tolist()]
    seen = _read(path, tmp_path, document_mask=False).train
    assert all(example.rows[0].trained[1:].all() for example in seen)
    assert found.epoch == len(found.train) == len(ids)
    assert "1 of 5 files are left out, such as notes.md" in found.notes[0]
    assert f"24 texts of {len(whole)} tokens" in found.notes[1]


def test_ids_are_written_once_and_again_if_a_file_changes(folder, tmp_path, monkeypatch):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "abcdef" * 9}) + "\n")
    first = _read(path, tmp_path / "ids")
    written = []
    own = text_ids._write
    monkeypatch.setattr(text_ids, "_write", lambda *a, **k: written.append(1) or own(*a, **k))
    again = _read(path, tmp_path / "ids")
    assert not written and again.digests() == first.digests()
    path.write_text(json.dumps({"text": "abcdeg" * 9}) + "\n")
    changed = _read(path, tmp_path / "ids")
    assert written and changed.digests() != first.digests()


def test_what_a_kill_leaves_is_written_again(tmp_path):
    """Ids that were cut, or not finished; a partial file does not stay."""
    path, ids = tmp_path / "one.jsonl", tmp_path / "ids" / "0"
    path.write_text(json.dumps({"text": "abcdef" * 9}) + "\n")
    first = _read(path, tmp_path / "ids")
    whole = (ids / text_ids.TOKENS).read_bytes()
    (ids / text_ids.TOKENS).write_bytes(whole[:8])
    (ids / f".{text_ids.TOKENS}.1").write_bytes(whole)
    assert _read(path, tmp_path / "ids").digests() == first.digests()
    assert (ids / text_ids.TOKENS).read_bytes() == whole
    assert {file.name for file in ids.iterdir()} == {text_ids.TOKENS, text_ids.INDEX}


def test_a_rank_does_not_wait_for_ever(tmp_path, monkeypatch):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "abc"}\n')
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(text_ids, "PATIENCE", 0.3)
    with pytest.raises(RuntimeError, match="has written nothing to .* same run.dir"):
        _read(path, tmp_path / "ids")


def test_hidden_files_folders_and_marks_of_the_byte_order_are_no_texts(tmp_path):
    """A folder may be named as a file, as those that Spark writes."""
    for name, content in ((".cache/a.txt", b"x"), (".b.txt", b"x"), ("c.parquet/d.txt", b"abc")):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_bytes(content)
    (tmp_path / "t" / "e.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    (tmp_path / "t" / "f.txt").write_bytes(b"\xef\xbb\xbfabc")
    found = _read(tmp_path / "t", tmp_path / "ids")
    assert found.train[0].rows[0].ids.tolist() == [*TOKENIZER.encode("abc"), TOKENIZER.eos_id] * 3


def test_notes_count_texts_that_the_tokenizer_lacks(tmp_path):
    rows = ["abc", "a\u00e9", "\u6f22"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    notes = _read(tmp_path / "a.jsonl", tmp_path / "ids").notes
    assert any(note.startswith("2 of 3 texts of ") and note.endswith("lacks") for note in notes)


def test_control_tokens_are_counted_and_texts_without_ids_left_out(tmp_path):
    mask = TOKENIZER.mask_id
    ids = {"x": [5, mask], "y": [6], "z": []}
    tokenizer = replace(TOKENIZER, to_ids=lambda found: [ids[text] for text in found])
    index = text_ids.ids_of(iter("xyz"), tmp_path, key="k", tokenizer=tokenizer, said="s")
    assert (index.texts, index.tokens, index.control) == (2, 5, 1)
    assert index.named == TOKENIZER.decode_raw([mask])


def test_other_weights_of_a_mixture_are_other_data(folder, tmp_path):
    """The rows of an iteration follow from them, so such a run does not resume."""
    parts = {
        name: {"data": str(folder[0] / name), "weight": 1} for name in ("a.jsonl", "b.jsonl.gz")
    }
    first = _read_mixture(parts, tmp_path).digests()
    assert _read_mixture(parts, tmp_path).digests() == first
    parts["a.jsonl"]["weight"] = 2
    assert _read_mixture(parts, tmp_path).digests() != first


def test_a_mixture_has_its_parts_one_after_the_other(folder, tmp_path):
    path, _ = folder
    parts = {"a": {"data": str(path / "a.jsonl"), "weight": 3}, "c": str(path / "c.parquet")}
    with pytest.raises(ValueError, match=r"sft.data.c has no weight"):
        _read_mixture(parts, tmp_path)
    parts["c"] = {"data": str(path / "c.parquet"), "weight": 1}
    found = _read_mixture(parts, tmp_path)
    counts = [count for count, _ in found.shares]
    assert [weight for _, weight in found.shares] == [3, 1]
    assert len(found.train) == sum(counts) and min(counts) > 2
    assert found.train[counts[0]].name.endswith("c.parquet, row 1")
    assert found.train[counts[0] - 1].name.endswith(f"a.jsonl, row {counts[0]}")
    assert found.train[-1].name.endswith(f"c.parquet, row {counts[1]}")


def _read_mixture(parts, target):
    sft = SftSettings(data=parts, format="texts", row_tokens=LENGTH)
    return texts.read_texts(sft, TOKENIZER, model=ModelSettings(), folder=target)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": 3}\n', "row 1 has a int, not a text"),
        ("a.jsonl", '{"body": "x"}\n', "has no column text; name the column of the texts by"),
        ("a.jsonl", "\n{\n", "a.jsonl cannot be read .line 2: "),
        ("a.jsonl", '["x"]\n', "row 1 is a list, not an object"),
        ("a.jsonl", '{"text": "a\\ud800"}\n', "row 1 holds half of a character"),
        ("a.txt", b"ab\xff", "row 1 holds half of a character, or is not UTF-8"),
        ("a.jsonl", '{"text": ""}\n', "holds no texts"),
        ("a.csv", "text\nx\n", "names no texts; give a .jsonl, .jsonl.gz, .parquet, .txt file"),
        ("a.parquet", "no parquet", "a.parquet cannot be read"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        _read(tmp_path / name, tmp_path / "ids")
    assert str(error.value).startswith("sft.data") and "\n" not in str(error.value)
    assert not (tmp_path / "ids" / text_ids.INDEX).exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.turns=all", "sft.turns=all is for replies, and sft.format=texts has none; use"),
        ("sft.padding=batch", "sft.padding=batch is for replies"),
        ("sft.eval_fraction=0.1", "sft.eval_fraction=0.1 is for replies"),
        ("sft.columns={messages: talk}", "sft.columns.messages is of replies"),
        ("sft.data={a: {data: x.jsonl, chat: true}}", "sft.data.a.chat=true is for replies"),
        ("sft.loss=vrpo", "sft.loss=vrpo compares replies"),
        ("sft.data=null", "sft.format=texts is for rows of sft.data"),
        ("sft.format=replies; sft.document_mask=false", "sft.document_mask=false is for raw texts"),
    ],
)
def test_settings_of_replies_are_refused(override, said):
    given = ["sft.data=x.jsonl", "sft.format=texts", "sft.iterations=1"]
    validate(load(Settings, None, given))
    with pytest.raises(ValueError, match=said):
        validate(load(Settings, None, [*given, *override.split("; ")]))


def test_a_plan_reads_no_texts(folder, tmp_path):
    own = [f"run.dir={tmp_path / 'run'}", f"sft.data={folder[0]}", *RUN[1:], "sft.eval_interval=0"]
    settings = tiny(*own)
    found = plan_settings(settings, world_size=1)
    assert found.missing == () and "raw texts are read when the run starts" in found.notes[0]
    assert not (tmp_path / "run").exists()
    read = _read(folder[0], tmp_path / "ids", epochs=1.5, batch_size=4)
    sizes, iterations = measure(found), math.ceil(1.5 * read.epoch / 4)
    assert sizes.texts is not None and sizes.rows == [(1, LENGTH - 1)]
    tokens = sum(len(example.rows[0].ids) for example in read.train)
    assert sizes.texts.tokens == pytest.approx(tokens, rel=0.02)
    assert sizes.texts.iterations == pytest.approx(iterations, abs=1)
    lines = forecast(found.settings, sizes, Speed(1e9, 1e9, "assumed"), world_size=1)
    said = f"about {sizes.texts.tokens} tokens; {sizes.texts.iterations} supervised iterations"
    assert f"texts     {said}" in lines
    assert any(line.startswith("disk ") and "texts 3." in line for line in lines), lines


def _train(run_dir, folder, overrides=(), line=None):
    if dist.get_world_size() > 1:
        loss.SOME = 2  # held-out rows that are laid out at a time
    if line is not None:
        kill_after_line(line)
    given = [f"run.dir={run_dir}", f"sft.data={folder}", f"sft.eval_data={folder / 'b.jsonl.gz'}"]
    settings = tiny(*given, *RUN, *overrides)
    resolved = resolve_run(settings, world_size=dist.get_world_size(), phases=("sft",))
    progress(resolved.settings)
    train(resolved, silent_view(), phases=("sft",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ranks(1, _train, directory, folder[0])
    return directory


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path, folder):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", folder[0], (), 7)
    run_ranks(1, _train, tmp_path / "run", folder[0])
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert same_metrics(metrics, read(whole / "metrics.jsonl"))
    assert metrics[-1]["epoch"] >= 1.5 and len(metrics) > 10
    assert metrics[-1]["held_out_loss"] < metrics[3]["held_out_loss"]


def test_other_data_ranks_learn_the_same_rows(whole, tmp_path, folder):
    """Killed on one rank, resumed on two, which share the ids that the first one wrote."""
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", folder[0], (), 7)
    run_ranks(2, _train, tmp_path / "run", folder[0], ["parallel=dp2"])
    metrics, expected = read(tmp_path / "run" / "metrics.jsonl"), read(whole / "metrics.jsonl")
    for name in ("loss", "held_out_loss", "epoch", "scored_tokens"):
        ours, theirs = ([m.get(name) for m in records] for records in (metrics, expected))
        assert ours == [None if t is None else pytest.approx(t, rel=1e-4) for t in theirs]


def test_a_plan_of_a_run_that_resumes_neither_needs_nor_writes_texts(
    whole, tmp_path, folder, monkeypatch
):
    """Of the same run with a task, which only a plan reads."""
    monkeypatch.setattr(text_ids, "_write", None)
    run = shutil.copytree(whole, tmp_path / "run")
    saved = run / RUN_SETTINGS
    saved.write_text(saved.read_text().replace("missing.py", tiny().task.name))
    gone = tmp_path / "gone"
    for source, lacks in ((folder[0], ()), (gone, (f"sft.data={gone} names no texts",))):
        words = [f"run.dir={run}", f"sft.data={source}"]
        words.append(f"sft.eval_data={folder[0] / 'b.jsonl.gz'}")
        planned = plan_settings(tiny(*words, *RUN[1:]), world_size=1)
        assert len(planned.missing) == len(lacks)
        assert all(map(str.startswith, planned.missing, lacks))
        assert planned.settings.sft.iterations == len(read(whole / "metrics.jsonl"))
        done = progress(planned.settings)
        assert done is not None and done.phase == "sft"


def test_a_run_whose_texts_changed_does_not_resume(whole, tmp_path, folder):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "abc" * 200}) + "\n")
    with pytest.raises(AssertionError, match="holds a run whose texts changed; restore them"):
        run_ranks(1, _resume, whole, folder[0], tmp_path / "other.jsonl")


def _resume(run_dir, folder, other):
    _train(run_dir, folder, [f"sft.data={other}", "sft.epochs=null", "sft.iterations=50"])
