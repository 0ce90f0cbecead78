"""Whatever settings files and overrides hold: it is resolved as written, or refused in one line.

AGRPO_EXAMPLES sets how many are tried.
"""

import contextlib
import io
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import describe
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import parse_yaml

EXAMPLES = int(os.environ.get("AGRPO_EXAMPLES", "300"))
BASE = """
task: {name: countdown, train_problems: 8, eval_problems: 4, options: {numbers: 2}}
model: {num_layers: 2, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2}
sampling: {completion_length: 8, block_length: 4, denoising_steps: 4}
"""
REFUSED = object()  # no setting can be this
WRITTEN: dict[str, Any] = {
    "010": 10,
    "08": 8,
    "-007": -7,
    "0x1F": 31,
    "0b101": 5,
    "1_000": 1000,
    "0": 0,
    "-1": -1,
    "1": 1,
    "2": 2,
    "4": 4,
    "+8": 8,
    "2147483647": 2**31 - 1,
    "2147483648": 2**31,
    "20260131094500": 20260131094500,
    "9223372036854775807": 2**63 - 1,
    "9223372036854775808": 2**63,
    "-" + 30 * "9": 1 - 10**30,
    400 * "9": 10**400 - 1,
    500 * "9": REFUSED,
    "0.0": 0.0,
    "0.5": 0.5,
    "1.5": 1.5,
    "-2.5": -2.5,
    "1e-4": "1e-4",
    "1.0e+30": 1e30,
    "1.0e-320": 1e-320,
    "1e400": "1e400",
    ".nan": REFUSED,
    "nan": "nan",
    ".inf": REFUSED,
    "-.inf": REFUSED,
    "yes": True,
    "off": False,
    "true": True,
    "null": None,
    "~": None,
    "": None,
    "2026-01-31": "2026-01-31",
    "2026-13-45": "2026-13-45",
    "10:00:00": "10:00:00",
    "0o17": "0o17",
    "text": "text",
    "'010'": "010",
    "'08'": "08",
    '"a\\nb"': "a\nb",
    '"\\u00e9 \\U0001F600"': "\u00e9 \U0001f600",
    '"\\0"': REFUSED,
    '"\\ud800"': REFUSED,
    "'" + 300 * "n" + ".model'": 300 * "n" + ".model",
    "!!int x": REFUSED,
    "!!float x": REFUSED,
    "!!timestamp x": REFUSED,
    "!!timestamp 2026-01-31": REFUSED,
    "!!set {a}": REFUSED,
    "!!binary aGk=": REFUSED,
    "!!python/object:os.system {}": REFUSED,
    "*nowhere": REFUSED,
    "&loop [*loop]": REFUSED,
    "&loop {a: *loop}": REFUSED,
    80 * "[" + 80 * "]": REFUSED,
    "{a: 1, a: 2}": REFUSED,
    "[1, ": REFUSED,
    "[1, 2]": [1, 2],
    "[010, 08]": [10, 8],
    "[2]": [2],
    "[]": [],
    "[text]": ["text"],
    "[[1]]": [[1]],
    "[.nan]": REFUSED,
    "{}": {},
    "{a: 1}": {"a": 1},
    "{a: {b: [1e-4, 010, null]}}": {"a": {"b": [1e-4, 10, None]}},
    "{1: 2}": {1: 2},
    "{a: .inf}": REFUSED,
    "{a: 2026-01-31}": {"a": "2026-01-31"},
}
KNOWN = {line.key: line for line in describe(Settings)}
SECTIONS = sorted({key.rpartition(".")[0] for key in KNOWN} - {""})
# A task makes as many problems as it is asked for, which may take hours.
COUNTS = ("task.train_problems", "task.eval_problems", "sft.problems")
FILLED = ("model.vocab_size", "model.mask_token_id", "model.eos_token_id")  # where they are null


@st.composite
def entries(draw):
    """Return a place, a dotted key, and a value as it is written."""
    place = draw(st.sampled_from(["base", "file", "override"]))
    key = draw(st.sampled_from(sorted(KNOWN)))
    kind = draw(st.integers(0, 19))
    if kind == 0:
        wrong = [f"{key}s", key[:-1], key.upper(), f"{key}.x", f"modle.{key}", f"{key} ", "0"]
        key = draw(st.sampled_from(wrong))
    elif kind == 1:
        key = draw(st.sampled_from(SECTIONS))
        return place, key, draw(st.sampled_from(["", "null", "{}", "text", "4", "tp1", "tp0-x"]))
    if kind > 9 and key in KNOWN and (plausible := _plausible(KNOWN[key])):
        return place, key, draw(st.sampled_from(plausible))
    usual = [text for text, value in WRITTEN.items() if key not in COUNTS or _is_small(value)]
    return place, key, draw(st.sampled_from(usual))


def _is_small(value):
    return not isinstance(value, int) or value < 100


def _plausible(line):
    """Return values that a setting may have, as they are written."""
    if line.choices:
        return [str(choice) for choice in line.choices]
    kinds = {"an integer": "1 2 3 08", "a number": "0.5 1 1e-4", "true or false": "yes no"}
    kinds["an integer or auto"] = "1 2 08 auto"
    return kinds.get(line.type.removesuffix(" or null"), "").split()


def _file(written, *, is_flow, base=None):
    """Return the text of a settings file, and its entries; a key that is there is left out."""
    tree, kept = {}, {}
    for key, text in written:
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict) and name not in node:
            node[name] = kept[key] = text
    head = {} if base is None else {"base": base}
    return _flow({**head, **tree}) if is_flow else _block({**head, **tree}, ""), kept


def _flow(tree):
    if not isinstance(tree, dict):
        return tree
    return "{" + ", ".join(f"{key}: {_flow(part)}" for key, part in tree.items()) + "}"


def _block(tree, indent):
    lines = []
    for key, part in tree.items():
        is_section = isinstance(part, dict)
        lines.append(f"{indent}{key}:{'' if is_section else ' ' + part}\n")
        lines.append(_block(part, f"{indent}  ") if is_section else "")
    return "".join(lines)


def _same(found, written):
    """Return whether a resolved value is what was written; numbers may be written as text."""
    if isinstance(found, float) and isinstance(written, int | str):
        return found == float(written) and not isinstance(written, bool)
    return found == written and isinstance(found, bool) == isinstance(written, bool)


def _config(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["config", *arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings")
    with contextlib.chdir(path):
        yield path


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.lists(entries(), min_size=1, max_size=4), st.booleans())
def test_settings_are_resolved_as_written_or_refused_in_one_line(folder, written, is_flow):
    at = {place: [e[1:] for e in written if e[0] == place] for place in ("base", "file")}
    (folder / "lowest.yaml").write_text(BASE)
    lower, wanted = _file(at["base"], is_flow=False, base="lowest.yaml")
    text, upper = _file(at["file"], is_flow=is_flow, base="base.yaml")
    (folder / "base.yaml").write_text(lower, encoding="utf-8")
    (folder / "file.yaml").write_text(text, encoding="utf-8")
    overrides = [e[1:] for e in written if e[0] == "override"]
    status, out, err = _config("file.yaml", *(f"{key}={text}" for key, text in overrides))
    # YAML and overrides drop the blanks after a key.
    every = [(key.strip(), text) for key, text in (*wanted.items(), *upper.items(), *overrides)]
    if status:
        assert (status, out) == (2, "")
        assert err.startswith("agrpo: error: ") and err.count("\n") == 1 and err.endswith("\n")
        names = [name.strip() for key, _ in every for name in key.split(".")]
        assert any(name in err for name in (*names, "file.yaml", "base.yaml", "override ")), err
        return
    assert all(line.startswith("warning: ") for line in err.splitlines()), err
    assert "not possible" not in out
    resolved = parse_yaml(out)
    has_sections = any(key in SECTIONS for key, _ in every)
    for key, text in dict(every).items() if not has_sections else ():
        value = WRITTEN[text] if text in WRITTEN else parse_yaml(text)
        found: Any = resolved
        for part in key.split("."):
            found = found[part]
        is_merged = isinstance(value, dict) and [name for name, _ in every].count(key) > 1
        if not is_merged and not (value is None and key in FILLED) and key != "task.options":
            assert _same(found, value), f"{key}={text} became {found!r}"
