"""`agrpo evaluate --show-prompt` and `evaluation.few_shot`: what the model is asked, exactly."""

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.plan import plan_evaluation
from agrpo_megatron.text.tokenizer import load_tokenizer
from tests.cli.test_evaluate import HF, ON_HF

OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Chat, Message, Problem

class Doubling(Task):
    name = "doubling"

    def load(self):
        made = [Problem(str(n), {}, str(2 * n)) for n in (3, 6, 7)]
        return {"train": made[:1], "eval": made[1:]}

    def prompt(self, problem):
        return Chat((Message("user", f"2*{problem.key}"),), prefill="So ")
"""
TEMPLATE = "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}(assistant)"


@pytest.fixture
def chat(tmp_path):
    """Return the arguments of a task of chats with a template of its own."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    settings = [f"task.name={tmp_path / 'own.py'}"]
    return [*settings, f"tokenizer.chat_template={tmp_path / 'own.jinja'}", *ON_HF[3:]]


def evaluate(capsys, *arguments):
    """Return the status and what was printed; nothing is evaluated."""
    status = main(["evaluate", str(HF), *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_text_has_the_tokens_of_the_chat_and_the_ids_are_the_models(chat, capsys):
    status, printed, _ = evaluate(capsys, "--show-prompt", "evaluation.few_shot=1", *chat)
    text = "(user)2*3(assistant)So 6(user)2*6(assistant)So "
    assert status == 0 and printed.startswith("task doubling, problem 6, 47 tokens\n")
    assert text in printed.splitlines()
    ids = [int(word) for word in printed.splitlines()[-2].split()]
    settings = load(Settings, None, [s for s in chat if s.startswith("tokenizer")])
    assert ids == load_tokenizer(settings.tokenizer).encode(text) and len(ids) == 47


def test_another_prompt_is_chosen_by_its_number(chat, capsys):
    _, printed, _ = evaluate(capsys, *chat, "--show-prompt", "2")
    assert "(user)2*7(assistant)So " in printed.splitlines()
    status, _, said = evaluate(capsys, *chat, "--show-prompt", "3")
    assert status == 2
    assert "--show-prompt 3: task doubling has 2 problems; use 1 to 2" in said


def test_examples_belong_to_the_identity_of_an_evaluation():
    def planned(*changes):
        settings = load(Settings, None, [f"model.load={HF}", *ON_HF, *changes])
        plan = plan_evaluation(settings, checkpoint=None, label="", world_size=1)
        return plan.evaluation["evaluates"]

    without, with_two = planned(), planned("evaluation.few_shot=2")
    assert "few_shot" not in without, "directories of before stay what they are"
    assert with_two["few_shot"] == 2
    one, two = (found["tasks"]["countdown"]["asked"] for found in (without, with_two))
    assert one != two


WRONG = {
    "evaluation.few_shot=9": "evaluation.few_shot=9: task countdown has 8 training problems with a",
    "evaluation.split=train": "evaluation.few_shot=1 shows training problems, and evaluation.split",
    "model.max_sequence_length=40": "leaves 24 tokens for prompts besides",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_use_is_one_line(change, capsys):
    few = [] if "few_shot" in change else ["evaluation.few_shot=1"]
    status, _, said = evaluate(capsys, *ON_HF, *few, change, "--show-prompt")
    assert status == 2 and WRONG[change] in said and said.count("\n") == 1
