"""Prompts over the limit are refused or counted out, never cut; solutions have to be there."""

import json
from dataclasses import replace

import pytest

from agrpo_megatron.runs.resolve import check_prompt, check_prompts, resolve
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import Split
from tests.text.chat_tokenizers import write_llada
from tests.training.tiny import tiny

LONG = "x" * 70
SPLITS: tuple[Split, ...] = ("train", "eval")


@pytest.fixture
def gsm8k(tmp_path):
    """Return overrides of a GSM8K run on three training and two held-out problems.

    One of each is 70 characters longer than the others.
    """
    questions = {"train": ["one", "two", f"long {LONG}"], "eval": ["three", f"longer {LONG}"]}
    files = {}
    for split, texts in questions.items():
        rows = [{"question": text, "answer": f"So it is 5.\n#### {len(text)}"} for text in texts]
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "task.name=gsm8k",
        f"task.options={{train: {files['train']}, eval: {files['eval']}}}",
        "task.train_problems=null",
        "task.eval_problems=null",
        f"tokenizer.path={write_llada(tmp_path / 'llada')}",
        "model.vocab_size=null",
        "model.max_sequence_length=600",
    )


def resolved(overrides, *more):
    return resolve(tiny(*overrides, *more), world_size=1)


def prompt_lengths(found, split: Split):
    write = found.task.prompt if split == "train" else found.task.eval_prompt
    return [len(found.tokenizer.encode_prompt(write(p))) for p in found.task.problems(split)]


def first_prompt(found):
    """Return the text that the model reads first, control tokens written out."""
    prompt = found.task.prompt(found.task.problems("train")[0])
    return found.tokenizer.decode_raw(found.tokenizer.encode_prompt(prompt))


def test_prompts_are_chats_of_one_id_per_control_token(gsm8k):
    found = resolved(gsm8k)
    one, two, long = prompt_lengths(found, "train")
    assert one == two == long - len(f"long {LONG}") + len("one")
    assert first_prompt(found).startswith(
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou will "
    )
    assert found.settings.model.mask_token_id == found.tokenizer.mask_id
    assert found.task.notes == []


def test_long_prompts_are_refused_with_count_longest_limit_and_fix(gsm8k):
    train, held_out = (max(prompt_lengths(resolved(gsm8k), split)) for split in SPLITS)
    assert held_out == train + 2
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        resolved(gsm8k, f"task.prompt_tokens={train - 1}")
    assert str(caught.value) == (
        f"task.prompt_tokens={train - 1}: 1 of 3 training problems have prompts over it, the "
        f"longest of {train} tokens; use at least {train}, or leave them out by "
        "task.long_prompts=drop"
    )
    with pytest.raises(ValueError, match=f"1 of 2 held-out problems .* use at least {held_out}, "):
        resolved(gsm8k, f"task.prompt_tokens={train}")
    assert resolved(gsm8k, f"task.prompt_tokens={held_out}").task.notes == []


def test_without_a_limit_the_row_is_the_limit(gsm8k):
    held_out = max(prompt_lengths(resolved(gsm8k), "eval"))
    needed = held_out + 8
    assert resolved(gsm8k, f"model.max_sequence_length={needed}").task.notes == []
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        resolved(gsm8k, f"model.max_sequence_length={needed - 1}")
    assert str(caught.value) == (
        f"model.max_sequence_length={needed - 1} leaves {held_out - 1} tokens for prompts besides "
        "sampling.completion_length=8: 1 of 2 held-out problems have prompts over that, the "
        f"longest of {held_out} tokens; use at least {needed}, or leave them out by "
        "task.long_prompts=drop"
    )


def test_dropped_prompts_are_counted_and_no_other_changes(gsm8k):
    whole = resolved(gsm8k)
    limit = min(prompt_lengths(whole, "train")) + 10
    found = resolved(gsm8k, f"task.prompt_tokens={limit}", "task.long_prompts=drop")
    assert found.task.notes == [
        f"1 of 3 training problems have prompts over {limit} tokens; left out "
        "(task.long_prompts=drop)",
        f"1 of 2 held-out problems have prompts over {limit} tokens; left out "
        "(task.long_prompts=drop)",
    ]
    for split, count in zip(SPLITS, (2, 1), strict=True):
        assert found.task.problems(split) == whole.task.problems(split)[:count]
        assert max(prompt_lengths(found, split)) <= limit


def test_dropping_everything_is_refused(gsm8k):
    with pytest.raises(ValueError, match="leaves a task without problems of at most 5 prompt tok"):
        resolved(gsm8k, "task.prompt_tokens=5", "task.long_prompts=drop")


def test_dropping_a_whole_part_of_a_mixture_is_refused(gsm8k):
    found = resolved(gsm8k)
    mixture = replace(
        found.settings.task,
        name="mixture",
        options={},
        mixture={
            "sudoku": {"train_problems": 2, "eval_problems": 1},
            "gsm8k": {"options": found.settings.task.options},
        },
        long_prompts="drop",
        prompt_tokens=40,
    )
    settings = replace(found.settings, task=mixture)
    with pytest.raises(ValueError, match="leaves a task without problems"):
        check_prompts(settings, build_task(mixture), found.tokenizer)


def test_a_limit_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="task.prompt_tokens=57 and .* are together over .* 56$"):
        resolved((), "task.prompt_tokens=57")
    assert resolved((), "task.prompt_tokens=56").settings.task.prompt_tokens == 56


def test_text_that_the_tokenizer_lacks_is_counted():
    found = resolved(
        (),
        "task.options={protocol: agrpo}",
        "task.train_problems=5",
        "task.eval_problems=2",
        "model.max_sequence_length=2000",
    )
    assert found.task.notes == [
        "5 of 5 training prompts hold text that the tokenizer lacks",
        "2 of 2 held-out prompts hold text that the tokenizer lacks",
    ]


def test_supervision_needs_solutions_that_are_there_and_fit(tmp_path):
    path = tmp_path / "countdown.jsonl"
    rows = [{"input": "1,2,3", "output": str(target)} for target in (6, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        f"task.options={{train: {path}}}",
        "task.train_problems=null",
        "task.eval_problems=2",
        "model.max_sequence_length=120",
    )
    assert resolved(overrides).settings.sft.iterations == 0
    with pytest.raises(
        ValueError, match="^sft.iterations=3 needs .* none of the 2 training problems of"
    ):
        resolved(overrides, "sft.iterations=3")
    generated = ("sampling.completion_length=2", "sampling.block_length=2")
    generated += ("sampling.denoising_steps=2",)
    assert resolved(generated).settings.sft.iterations == 0
    with pytest.raises(ValueError, match="completion_length=2 is shorter than the longest soluti"):
        resolved(generated, "sft.iterations=3")


def test_a_run_directory_brings_its_tokenizer_and_template(tmp_path, gsm8k):
    (tmp_path / "config.yaml").write_text(
        "model: {num_layers: 2, hidden_size: 16, ffn_hidden_size: 32, num_query_groups: 2, "
        f"vocab_size: 300}}\ntokenizer: {{{gsm8k[4].replace('tokenizer.path=', 'path: ')}"
        ", chat_template: plain}\n"
    )
    more = (f"model.load={tmp_path}", "model.vocab_size=null")
    kept = [text for text in gsm8k if not text.startswith("tokenizer.path")]
    found = resolve(tiny(*kept, *more, "sampling.completion_length=8"), world_size=1)
    assert first_prompt(found).startswith("You will be given a math problem.")
    chosen = resolve(tiny(*kept, *more, "tokenizer.chat_template=llada"), world_size=1)
    assert first_prompt(chosen).startswith("<|startoftext|>")


OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem, Reward


class Own(Task):
    def load(self):
        made = {s: [Problem(s, {}, "1")] for s in ("train", "eval")}
        return {**made, "%s": []}

    def prompt(self, problem):
        return "1="

    def reward(self, problem, completion):
        return Reward(0.0, False)
"""


@pytest.mark.parametrize("empty, word", [("train", "training"), ("eval", "held-out")])
def test_training_needs_problems_in_both_splits_of_every_part(tmp_path, empty, word):
    path = tmp_path / "own.py"
    path.write_text(OWN % empty)
    own = (f"task.name={path}", "task.options={}")
    with pytest.raises(ValueError, match=f"^task {path} has no {word} problems; give it some"):
        resolved(own)
    parts = f"task.mixture={{countdown: {{}}, mine: {{name: {path}}}}}"
    mixture = ("task.name=mixture", "task.options={}", parts)
    with pytest.raises(ValueError, match=f"^task mine has no {word} problems; give it some"):
        resolved(mixture)
    assert resolve(tiny(*own), world_size=1, needs=()).task.problems(empty) == []


def test_training_on_none_is_refused_and_evaluating_alone_is_not(gsm8k):
    eval_file = gsm8k[1].rpartition("eval: ")[2]
    alone = [*gsm8k, f"task.options={{train: none, eval: {eval_file}"]
    with pytest.raises(
        ValueError, match="gsm8k has no training problems; .*train=none is only for"
    ):
        resolved(alone)
    for phase in ("train.iterations=0", "sft.iterations=0"):
        with pytest.raises(ValueError, match="has no training problems"):
            resolved(alone, "train.iterations=1", "sft.iterations=1", phase)
    assert len(resolved(alone, "train.iterations=0").task.problems("eval")) == 2


def test_dropping_prompts_refuses_only_what_became_empty(gsm8k):
    limit = min(prompt_lengths(resolved(gsm8k), "train")) + 10
    eval_file = gsm8k[1].rpartition("eval: ")[2]
    alone = [*gsm8k, f"task.options={{train: none, eval: {eval_file}", "train.iterations=0"]
    drop = ("task.long_prompts=drop", f"task.prompt_tokens={limit}")
    assert len(resolved(alone, *drop).task.problems("eval")) == 1
    with pytest.raises(ValueError, match="leaves a task without problems of at most 5 prompt tok"):
        resolved(alone, *drop, "task.prompt_tokens=5")


NOTED = {  # a training question, and the notes on it
    "plain": ("one", []),
    "angle brackets": ("is 1 <| 2 |> 3?", []),
    "the end of a turn": ("one<|eot_id|>two", ["<|eot_id|>"]),
    "the mask token": ("<|mdm_mask|> + 1 = 2", ["<|mdm_mask|>"]),
    "end of text": ("one<|endoftext|>", ["<|endoftext|>"]),
    "another role": ("<|start_header_id|>system<|end_header_id|>", ["<|start_header_id|>"]),
    "what no family uses": ("one [gMASK]", ["[gMASK]"]),
}


@pytest.mark.parametrize("name", NOTED)
def test_control_tokens_in_the_text_of_problems_are_counted(gsm8k, tmp_path, name):
    question, tokens = NOTED[name]
    rows = [{"question": text, "answer": "#### 5"} for text in ("plain", question)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert resolved(gsm8k).task.notes == [
        f"1 of 2 training prompts hold control tokens such as {token}" for token in tokens
    ]


def test_control_tokens_and_unknown_text_in_solutions_are_counted(gsm8k, tmp_path):
    rows = [{"question": str(n), "answer": f"{n}<|eot_id|>\n#### 5"} for n in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = ["sampling.completion_length=200", "sampling.block_length=200"]
    lengths += ["sampling.denoising_steps=4", "model.max_sequence_length=900"]
    notes = resolved(gsm8k, "sft.iterations=1", *lengths).task.notes
    assert notes == ["3 of 3 solutions hold control tokens such as <|eot_id|>"]


def test_a_template_with_todays_date_is_noted(gsm8k, tmp_path):
    file = tmp_path / "dated.jinja"
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file.write_text("{{ strftime_now('%d %B %Y') }} " + text)
    (note,) = resolved(gsm8k, f"tokenizer.chat_template={file}").task.notes
    assert note.startswith(f"the chat template of {file} prints today's date, so prompts change")
    file.write_text("28 July 2026 " + text)
    assert resolved(gsm8k, f"tokenizer.chat_template={file}").task.notes == []


PROMPTS = {  # of `agrpo sample --prompt`, and the error or the notes; 56 tokens fit
    "short": ("1+1=", []),
    "the longest that fits": ("1" * 56, []),
    "one too long": (
        "1" * 57,
        "--prompt has 57 tokens, and model.max_sequence_length=64 leaves 56",
    ),
    "far too long": ("1" * 5000, "has 5000 tokens"),
    "empty": ("", "--prompt is empty"),
    "blank": (" \n\t", "--prompt is empty"),
    "not Unicode": ("1\udcff", "--prompt holds a lone surrogate"),
    "unknown text": ("1\u4e8c", ["1 of 1 prompts hold text that the tokenizer lacks"]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_by_hand_is_checked_as_those_of_problems_are(name):
    text, said = PROMPTS[name]
    found = resolved(())
    if isinstance(said, list):
        assert check_prompt(found, text) == said
        return
    with pytest.raises(ValueError, match="^--prompt ") as error:
        check_prompt(found, text)
    assert said in str(error.value) and "\n" not in str(error.value)
