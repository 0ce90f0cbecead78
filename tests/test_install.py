"""The install page and the container recipe say what the project asks for."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from agrpo_megatron.hardware.machine import TE_OLDEST

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/install.md").read_text()
RECIPE = (ROOT / "tools/Dockerfile").read_text().replace("\\\n", "")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_recipe_copies_what_is_there():
    copied = [line.split()[1:-1] for line in RECIPE.splitlines() if line.startswith("COPY ")]
    sources = [source for line in copied for source in line]
    assert "agrpo_megatron" in sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_recipe_installs_all_but_torch():
    """What it takes from pyproject.toml is asked for by its own line of Python."""
    (code,) = re.findall(r"python -c '(import tomllib[^']*)'", RECIPE)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["resilience"]]
    assert done.stdout.splitlines() == [each for each in wanted if not each.startswith("torch")]
    assert len(wanted) - len(done.stdout.splitlines()) == 1


def test_the_recipe_ends_as_a_user_who_asks_the_doctor():
    lines = [line for line in RECIPE.splitlines() if line and not line.startswith("#")]
    assert lines[-1] == 'CMD ["agrpo", "doctor"]'
    assert [line for line in lines if line.startswith("USER")] == ["USER agrpo"]


def test_the_page_names_the_pinned_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for name in ("megatron-core", "nvidia-resiliency-ext"):
        assert re.search(rf"^\| {name} \| {re.escape(pins[name])} \|$", PAGE, re.MULTILINE), name
    assert f"pins {pins['torch']}" in PAGE


def test_the_oldest_transformer_engine_is_the_same_everywhere():
    oldest = ".".join(map(str, TE_OLDEST))
    assert f"Transformer Engine | {oldest} or newer" in PAGE
    (extra,) = PROJECT["optional-dependencies"]["te"]
    assert extra.startswith(f"transformer-engine[pytorch]>={oldest},")


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE)
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []
