"""The examples that anyone can run: a task of one's own, and a mixture of tasks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings, TaskSettings
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.tasks import build_task
from agrpo_megatron.types import Problem
from tests.cli.test_main import agrpo
from tests.text.chat_tokenizers import FIRST_ADDED, LLADA_TOKENS, write_llada

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# One supervised and one reinforcement-learning iteration, each of a second.
SHORT = [
    "run.threads=1",
    "task.train_problems=32",
    "task.eval_problems=8",
    "sft.iterations=1",
    "sft.batch_size=8",
    "train.iterations=1",
    "algorithm.prompts_per_iteration=2",
    "algorithm.group_size=2",
    "evaluation.interval=0",
    "logging.wandb=disabled",
    "logging.live=false",
]


def train(file, run_dir, *overrides):
    """Run `agrpo train` from the root of the project; return the records of its metrics."""
    words = ["train", EXAMPLES / file, *SHORT, f"run.dir={run_dir}", *overrides]
    status, printed = agrpo(run_dir.parent, *words)
    assert status == 0, printed
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


OWN = EXAMPLES / "own_task.jsonl"
OWN_ROWS = (
    "2,000 rows with the columns prompt=question, answer=answer",
    "256 of 2,000 rows are held out (task.options.held_out)",
)
SETTINGS = sorted(path for path in EXAMPLES.glob("*.yaml") if path.stem != "sweep")  # a grid


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_examples_resolve_without_a_note_but_of_their_columns(path, monkeypatch):
    """No problem is left out, and the tokenizer has every character that is written."""
    monkeypatch.chdir(ROOT)
    settings = load(Settings, path, ["model.load=null"])  # that run comes first
    validate(settings)
    found = resolve(settings, world_size=1)
    rows = OWN_ROWS if found.settings.task.name == "jsonl" else ()
    assert found.task.notes == [f"task.options.train={OWN}: {row}" for row in rows]
    assert found.task.problems("train")
    assert found.task.problems("eval")


@pytest.mark.parametrize("name", ["my_task.py", "my_task.py:SortDigits"])
def test_the_task_of_a_file_grades_right_and_wrong(name):
    settings = TaskSettings(str(EXAMPLES / name), train_problems=50, eval_problems=10)
    task = build_task(settings)
    problems = [*task.problems("train"), *task.problems("eval")]
    assert len({problem.key for problem in problems}) == 60
    for problem in problems:
        assert task.prompt(problem) == problem.fields["number"] + "="
        assert task.reward(problem, f" {problem.solution}\n").correct
        assert task.reward(problem, problem.solution).score == 1.0
    problem = Problem("50213", {"number": "50213"}, "01235")
    scores = {
        answer: task.reward(problem, answer).score
        for answer in ("01235", "01253", "01234", "50213", "53210", "0123", "", "x" * 10**5)
    }
    assert scores == {
        "01235": 1.0,
        "01253": 0.25 + 0.25 * 3 / 4,  # one pair of four is out of order
        "01234": 0.25,  # in order, but not the digits given
        "50213": 0.25 + 0.25 * 2 / 4,
        "53210": 0.25,
        "0123": 0.25,
        "": 0.0,
        "x" * 10**5: 0.25,
    }
    assert [answer for answer in scores if task.reward(problem, answer).correct] == ["01235"]


def test_options_of_the_task_are_checked():
    def build(**options):
        return build_task(TaskSettings(str(EXAMPLES / "my_task.py"), options=options))

    assert len(build(digits=7).prompt(build(digits=7).make_problem(12))) == 8  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="task.options.digit is not an option .* mean digits?"):
        build(digit=7)
    with pytest.raises(ValueError, match="task.options.digits=1 must be at least 2"):
        build(digits=1)
    with pytest.raises(ValueError, match="yields 100 with these options; .*raise task.options.di"):
        build(digits=2).problems("train")


def test_the_task_trains(tmp_path):
    records = train("my_task.yaml", tmp_path / "run")
    rewards = [record for record in records if "reward/in_order" in record]
    assert rewards
    assert all(0 <= record["reward/same_digits"] <= 1 for record in rewards)


def test_rows_without_code_train(tmp_path):
    records = train("own_task.yaml", tmp_path / "run")
    assert any("reward/format" in record for record in records)


def test_chats_are_learned_before_rl(tmp_path):
    short = ("sft.epochs=null", "sft.eval_interval=0")
    records = train("sft.yaml", tmp_path / "run", *short)
    assert [record["phase"] for record in records] == ["sft", "eval", "rl", "eval"]
    assert records[0]["held_out_loss"] > 0


def test_the_mixture_trains_and_tells_its_tasks_apart(tmp_path):
    short = "task.mixture.countdown.train_problems=32"
    records = train("mixture.yaml", tmp_path / "run", short, "algorithm.prompts_per_iteration=3")
    names = {name for record in records for name in record}
    for label in ("countdown", "sudoku"):
        assert any(label in name for name in names), names


def test_both_answers_of_a_pair_are_right_and_pairs_train(tmp_path):
    subprocess.run([sys.executable, EXAMPLES / "preferences.py", tmp_path], check=True, cwd=ROOT)
    task = build_task(load(Settings, EXAMPLES / "tiny.yaml").task)
    problems = {task.prompt(problem): problem for problem in task.problems("eval")}
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["chosen"] != row["rejected"]
        for answer in (row["chosen"], row["rejected"]):
            assert task.reward(problems[row["prompt"]], answer).correct
        sums = [pair.split("+") for pair in row["chosen"].split() if "+" in pair]
        assert all(first <= second for first, second in sums)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    files = [f"sft.data={tmp_path}/train.jsonl", f"sft.eval_data={few}"]
    own = ["model.load=null", "sft.preferences.masks=1", "train.iterations=0"]
    records = train("preferences.yaml", tmp_path / "run", *own, *files)
    assert 0 <= records[0]["held_out_preference/accuracy"] <= 1


def test_characters_train_on_a_published_protocol(tmp_path):
    """Their prompts are chats with text that the characters lack: counted, and no crash."""
    wider = ("model.max_sequence_length=2000", "train.token_budget=4000", "sft.iterations=0")
    options = "task.options={protocol: agrpo, numbers: 3, high: 9}"
    records = train("tiny.yaml", tmp_path / "run", options, *wider)
    assert any("reward/mean" in record for record in records)


def test_a_chat_template_reaches_the_model(tmp_path):
    """GSM8K from files, laid out by the template of a directory such as LLaDA's."""
    row = json.dumps({"question": "What is 6 x 7?", "answer": "6 x 7 = 42.\n#### 42"})
    (tmp_path / "train.jsonl").write_text(row)
    (tmp_path / "eval.jsonl").write_text(row.replace("6", "7"))
    files = f"{{train: {tmp_path / 'train.jsonl'}, eval: {tmp_path / 'eval.jsonl'}}}"
    overrides = ("task.name=gsm8k", f"task.options={files}", "model.max_sequence_length=600")
    tokenizer = f"tokenizer.path={write_llada(tmp_path / 'tokenizer')}"
    train("tiny.yaml", tmp_path / "run", *overrides, tokenizer, "sft.iterations=0")
    saved = load(Settings, tmp_path / "run" / "config.yaml")
    assert saved.model.vocab_size == FIRST_ADDED + len(LLADA_TOKENS)
    assert saved.model.mask_token_id == FIRST_ADDED + LLADA_TOKENS.index("<|mdm_mask|>")


def test_an_estimator_and_a_loss_of_ones_own_train(tmp_path):
    """At most 40 lines; its own metrics are logged, and so are those of every loss."""
    path = EXAMPLES / "my_estimator.py"
    assert len(path.read_text().splitlines()) <= 40
    own = ["name=examples/my_estimator.py:suffixes", "loss=examples/my_estimator.py:soft_clip"]
    changed = ["algorithm.mc_samples=null", *(f"algorithm.{word}" for word in own)]
    records = train("tiny.yaml", tmp_path / "run", *changed)
    (record,) = [record for record in records if record["phase"] == "rl"]
    assert record["rows"] == record["scoring_rows"] == 4  # one suffix of each, scored twice
    assert record["ratio/max_error"] == 0


def test_adapters_start_from_the_supervised_phase_of_the_demo(tmp_path):
    train("tiny.yaml", tmp_path / "sft", "train.iterations=0")
    load = f"model.load={tmp_path / 'sft'}"
    records = train("lora.yaml", tmp_path / "run", load, "sft.iterations=0")
    assert [record["phase"] for record in records] == ["eval", "rl", "eval"]
    sampled = []
    for target in ("run", "run/checkpoints/rl-000001"):
        status, printed = agrpo(tmp_path, "sample", tmp_path / target, "-n", "1")
        assert status == 0, printed
        sampled.append(printed.partition("checkpoint")[0])
    assert sampled[0] == sampled[1] and "completion" in sampled[0]
    for way, name in (("to-peft", "adapter_model.safetensors"), ("to-hf", "model.safetensors")):
        status, printed = agrpo(tmp_path, "convert", way, tmp_path / "run", tmp_path / way)
        assert status == 0 and (tmp_path / way / name).is_file(), printed
    status, printed = agrpo(tmp_path, "convert", "to-peft", tmp_path / "sft", tmp_path / "no")
    assert status == 2 and "holds all weights of a model, and no adapters" in printed
    lora = f"lora.load={tmp_path / 'to-peft'}"
    train("lora.yaml", tmp_path / "again", load, lora, "sft.iterations=0", "lora.dropout=0.1")
    words = ["config", EXAMPLES / "lora.yaml", load, lora, "lora.rank=4"]
    status, printed = agrpo(tmp_path, *words)
    assert status == 2 and "differs from lora.rank=4; set lora.rank=8" in printed
