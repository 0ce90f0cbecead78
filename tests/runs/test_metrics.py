"""The registry of metrics: it names what the code logs, and nothing else."""

import ast
import re
from pathlib import Path

import pytest

import agrpo_megatron
from agrpo_megatron.runs.metrics import METRICS, chosen_metrics, find_metric

PACKAGE = Path(agrpo_megatron.__file__).parent
EVERY = [metric for members in METRICS.values() for metric in members]
LOGGING = (
    "training",
    "rollout",
    "estimators",
    "evaluation/evaluate.py",
    "resilience/stragglers.py",
)
SLASHED = r'"([a-z_]+/[a-z0-9_]+)"'
NO_METRICS = {"ratio/mean_error", "tokens/s"}  # of a report's own


def shape(name):
    """Return a name with a mark where text is filled in, as in `reward/<part>`."""
    return re.sub(r"<\w+>", "<>", name)


def sources(*places):
    """Return the code of files and folders of the package, without the registry's."""
    paths = [path for place in places for path in (PACKAGE / place).rglob("*.py")]
    paths += [PACKAGE / place for place in places if place.endswith(".py")]
    return [path.read_text() for path in paths if "runs/metrics" not in path.as_posix()]


def keys(node):
    """Yield the keys that a display or comprehension of a dict or an assignment writes."""
    if isinstance(node, ast.Dict):
        yield from (key for key in node.keys if key is not None)
    if isinstance(node, ast.DictComp):
        yield node.key
    if isinstance(node, ast.Assign):
        yield from (target.slice for target in node.targets if isinstance(target, ast.Subscript))


def test_every_name_of_the_registry_occurs_in_the_source():
    texts = {text for source in sources("") for text in re.findall(r'"([^"\n]*)"', source)}
    written = {re.sub(r"{[^{}]*}", "<>", text) for text in texts}
    assert not [metric.name for metric in EVERY if shape(metric.name) not in written]


def test_every_name_with_a_slash_that_the_loops_log_is_registered():
    nodes = [node for text in sources(*LOGGING) for node in ast.walk(ast.parse(text))]
    names = {ast.unparse(key).strip("f'") for node in nodes for key in keys(node)}
    logged = {re.sub(r"{[^{}]*}", "<>", name) for name in names if "/" in name}
    assert {"ratio/max_error", "section/<>", "auto/signal/<>"} <= logged
    assert logged <= {shape(metric.name) for metric in EVERY}


def test_every_name_with_a_slash_that_reports_read_is_registered():
    read = {name for text in sources("reports") for name in re.findall(SLASHED, text)}
    assert "ratio/max_error" in read
    assert not {name for name in read - NO_METRICS if find_metric(name) is None}


def test_a_phase_has_a_name_once():
    names = [(phase, metric.name) for metric in EVERY for phase in metric.phases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "phase", "found"),
    [
        ("reward/mean", "rl", "reward/mean"),
        ("reward/format", "eval", "reward/<part>"),
        ("reward/gsm8k/mean", "rl", "reward/<label>/mean"),
        ("auto/draw_noise", "rl", "auto/draw_noise"),
        ("auto/draw_noise/8", "rl", "auto/draw_noise/<draws>"),
        ("straggler/update_rank", "sft", "straggler/<name>_rank"),
        ("straggler/update", "sft", "straggler/<name>"),
        ("reward/mean", "sft", None),
        ("reward/", "rl", None),
        ("los", None, None),
    ],
)
def test_a_logged_name_is_found_with_its_phase(name, phase, found):
    metric = find_metric(name, phase=phase)
    assert (metric and metric.name) == found


def test_a_prefix_chooses_metrics():
    assert [m.name for m in chosen_metrics("ratio/")["Loss and policy"]] == [
        "ratio/mean",
        "ratio/max_error",
        "ratio/p99_error",
    ]
    assert list(chosen_metrics("auto/signal/4")) == ["Number of draws"]
    assert chosen_metrics("").keys() == METRICS.keys()
    with pytest.raises(ValueError, match="no metric begins with acuracy; did you mean accuracy"):
        chosen_metrics("acuracy")
