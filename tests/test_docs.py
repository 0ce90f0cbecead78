"""Pages: links lead somewhere, every command is understood, and the index has every page."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from agrpo_megatron.cli.main import _parser
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/README.md"]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
COMMAND = re.compile(r"(?:for .*; do )?(?:\S*/agrpo|agrpo|torchrun .*-m agrpo_megatron) ([a-z].*)")
REMARK = re.compile(r" {2,}\S.*| # .*|; done.*")
OPTIONAL = re.compile(r"\[(-[^]]*|FILE|section[^]]*)\]")
PLACEHOLDERS = {"...", "section.key=value", "KEY=VALUE"}
VALUES = re.compile(r"^N$|\$\w+")


def anchors(page):
    """Return the anchors that a page's headings have on GitHub."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name):
    page = ROOT / name
    broken = []
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def commands(page):
    """Return the commands `agrpo` in a page's code, as lists of words: of blocks, and of spans."""
    text = page.read_text(encoding="utf-8")
    blocks = [re.sub(r" *\\\n *", " ", block) for block in FENCED.findall(text)]
    lines = [REMARK.sub("", line.strip()) for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    found = [
        [match[1] for code in codes if (match := COMMAND.match(code))] for codes in (lines, spans)
    ]
    return [[shlex.split(OPTIONAL.sub(r"\1", command)) for command in part] for part in found]


def refusal(words):
    """Return why a command is not understood; None if it is."""
    words = [VALUES.sub("2", word) for word in words if word not in PLACEHOLDERS]
    try:
        arguments, rest = _parser().parse_known_args(words)
    except SystemExit:
        return "argparse"
    if strange := [word for word in rest if "=" not in word or word.startswith("-")]:
        return f"not understood: {strange}"
    name = str(getattr(arguments, "file", None))
    if name.startswith("examples/") and not (ROOT / name).exists():
        return f"{name} does not exist"
    file = ROOT / name if name.startswith("examples/") else None
    try:
        load(Settings, file, [*getattr(arguments, "overrides", []), *rest])
    except ValueError as error:
        return str(error)
    return None


def unknown_options(words):
    """Return the options that a part of a command has and its sub-command lacks."""
    chosen = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    known = chosen.choices[words[0]]._option_string_actions
    return [word for word in words if word.startswith("-") and word not in known]


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name, capsys):
    whole, parts = commands(ROOT / name)
    refused = {shlex.join(words): why for words in whole if (why := refusal(words))}
    refused |= {shlex.join(words): why for words in parts if (why := unknown_options(words))}
    assert not refused, capsys.readouterr().err


def test_commands_are_found_and_wrong_ones_refused():
    readme = [shlex.join(words) for words in commands(ROOT / "README.md")[0]]
    assert "train examples/tiny.yaml parallel=tp2-sp-pp2" in readme
    assert "report runs/seed0 runs/seed1 runs/seed2" in readme
    assert refusal(["train", "examples/tiny.yaml", "run.seed=1"]) is None
    assert refusal(["train", "examples/tiny.yaml", "run.sed=1"])
    assert refusal(["train", "examples/missing.yaml"])
    assert refusal(["trian", "examples/tiny.yaml"]) == "argparse"
    assert refusal(["sample", "RUN", "--traces"])
    assert unknown_options(["launch", "--dry-run", "--dryrun"]) == ["--dryrun"]


def test_the_index_has_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    listed = {link.partition("#")[0] for link in LINK.findall(index)}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= listed
