"""`task.name=jsonl`: columns, held-out rows, prompts, leaks, and what is refused."""

import json

import pytest

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.tasks.grading import Call, Grader, grade_solutions, wrong_solutions
from agrpo_megatron.types import Chat, Message

ROWS = [{"question": f"{n}+1?", "answer": n + 1} for n in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(train, **options):
    tree = {"name": "jsonl", "options": {"train": train, **options}}
    return build_task(build(TaskSettings, tree, "task."))


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


COLUMNS = {  # columns of a row, the prompt and the answer that they give
    "prompt and answer": ({"prompt": "a", "answer": "b"}, "a", "b"),
    "question and target": ({"question": "a", "target": "b"}, "a", "b"),
    "problem and solution": ({"problem": "a", "solution": "b"}, "a", "b"),
    "instruction and completion": ({"instruction": "a", "completion": "b"}, "a", "b"),
    "another case": ({"Question": "a", "ANSWER": 2.0}, "a", "2"),
    "an answer comes first": ({"prompt": "a", "solution": "c", "answer": "b"}, "a", "b"),
    "the last reply is the answer": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Chat((Message("user", "a"),)),
        "b",
    ),
    "messages as a prompt": (
        {"prompt": [{"role": "user", "content": "a"}], "answer": "b"},
        Chat((Message("user", "a"),)),
        "b",
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_people_use_are_found_and_noted(tmp_path, name):
    row, prompt, answer = COLUMNS[name]
    source = write(tmp_path / "a.jsonl", [row])
    task = make("none", eval=source)
    (problem,) = task.problems("eval")
    assert task_prompts(task, [problem], split="eval") == [prompt]
    assert problem.fields["answer"] == answer
    (note,) = [note for note in task.notes if "columns" in note]
    assert note.startswith(f"task.options.eval={source}: 1 rows with the columns ")
    assert task.reward(problem, f" {answer}\n").score == 1.0


def test_a_solution_is_shown_and_the_answer_is_graded(tmp_path):
    row = {"problem": "a", "solution": "because #### 5", "answer": "5"}
    task = make("none", eval=write(tmp_path / "a.jsonl", [row]), reward="number")
    (problem,) = task.problems("eval")
    assert problem.solution == task.known_solution(problem, "eval") == "because #### 5"
    assert problem.fields["answer"] == "5" and task.reward(problem, "so 5.0").correct


def test_chosen_columns_template_and_system(tmp_path):
    row = {"ask": "1+1?", "a hint": "count", "gold": 2, "id": 7}
    source = write(tmp_path / "a.jsonl", [row])
    columns = {"prompt": "ask", "answer": "Gold", "key": "id"}
    task = make("none", eval=source, columns=columns, system="Be short.")
    (problem,) = task.problems("eval")
    asked = Chat((Message("system", "Be short."), Message("user", "1+1?")))
    assert (problem.key, task.prompt(problem)) == ("7", asked)
    task = make(
        "none", eval=source, columns={"answer": "gold"}, template="{A hint}: {ask} {{x}}", chat=True
    )
    (problem,) = task.problems("eval")
    assert task.prompt(problem) == Chat((Message("user", "count: 1+1? {x}"),))


def test_held_out_rows_are_the_same_in_any_order_and_in_no_other_split(tmp_path, rows):
    task = make(rows)
    held_out = {problem.key for problem in task.problems("eval")}
    assert len(held_out) == 4, "a tenth"
    assert not held_out & {problem.key for problem in task.problems("train")}
    turned = make(write(tmp_path / "turned.jsonl", ROWS[::-1]))
    assert {problem.key for problem in turned.problems("eval")} == held_out
    for asked, count in ((0.25, 10), (7, 7)):
        assert len(make(rows, held_out=asked).problems("eval")) == count
    said = f"task.options.train={rows}: 4 of 40 rows are held out (task.options.held_out)"
    assert said in task.notes


def test_repeats_and_leaks_are_left_out_and_counted(tmp_path):
    """Also under different keys: the text decides."""
    train = [{"prompt": t, "answer": "1", "id": n} for n, t in enumerate(["a", "b", " a ", "c"])]
    source = write(tmp_path / "train.jsonl", train)
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "c", "answer": "1", "id": 9}])
    task = make(source, eval=held_out, columns={"key": "id"})
    assert [problem.key for problem in task.problems("train")] == ["0", "1", "2"]
    assert "jsonl: 1 of 4 training problems are also held out; left out" in task.notes
    task = make(source, eval=held_out)
    assert [problem.key for problem in task.problems("train")] == ["a", "b"]
    assert any("1 repeated problems left out" in note for note in task.notes)


def test_a_problem_leaks_as_text_and_as_messages(tmp_path):
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a  b"}]
    train = [{"messages": said, "answer": "1"}, {"messages": said[1:], "answer": "1"}]
    train.append({"messages": [{"role": "user", "content": "c"}], "answer": "1"})
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "a b", "answer": "1"}])
    task = make(write(tmp_path / "train.jsonl", train), eval=held_out)
    assert [task.prompt(problem) for problem in task.problems("train")] == [
        Chat((Message("user", "c"),))
    ]


def test_a_function_finds_its_columns_in_both_splits(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(completion, depth):\n    return 1.0\n")
    train = write(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "1"}])
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "b", "answer": "1", "depth": 1}])
    task = make(train, eval=held_out, reward=f"{tmp_path / 'mine.py'}:mine")
    with pytest.raises(ValueError, match="mine takes depth, and the first row has no such field"):
        task.problems("train")


def test_rewards_add_up_by_weight_and_the_first_says_what_is_right(rows):
    reward = [
        {"name": "number", "weight": 2},
        {"name": "regex", "pattern": "^<a>", "weight": 0.5, "label": "format"},
    ]
    task = make(rows, reward=reward)
    (problem, *_) = task.problems("eval")
    gold = problem.fields["answer"]
    for text, score, correct, parts in (
        (f"<a>{gold}", 2.5, True, {"number": 1.0, "format": 1.0}),
        (gold, 2.0, True, {"number": 1.0, "format": 0.0}),
        ("<a>999", 0.5, False, {"number": 0.0, "format": 1.0}),
    ):
        made = task.reward(problem, text)
        assert (made.score, made.correct, made.parts) == (score, correct, parts)


@pytest.mark.parametrize("reward", ["exact", "number", "math", "contains"])
def test_answers_are_right_by_their_own_reward(rows, reward):
    task = make(rows, reward=reward, held_out=30)
    grader = Grader(task, task.settings)
    graded = grade_solutions(task, grader, "eval")
    grader.close()
    assert len(graded) == 30 and wrong_solutions(task, graded, "eval") == []
    assert grader.has_workers == (reward == "math")


def test_a_pattern_that_never_ends_costs_its_completion_alone(tmp_path):
    row = {"prompt": "a", "answer": "b"}
    tree = {"name": "jsonl", "grader": {"seconds": 3.0}}
    options = {"train": "none", "eval": write(tmp_path / "a.jsonl", [row])}
    tree["options"] = {**options, "reward": {"name": "regex", "pattern": "^(a+)+$"}}
    task = build_task(build(TaskSettings, tree, "task."))
    grader, (problem,) = Grader(task, task.settings), task.problems("eval")
    good, bad = grader.grade([Call(problem, text) for text in ("aaa", "a" * 60 + "!")])
    grader.close()
    assert (good.failure, bad.failure) == (None, "timeout")


def test_a_part_of_a_mixture(tmp_path, rows):
    part = {"name": "jsonl", "options": {"train": rows, "reward": "number"}}
    task = build_task(TaskSettings(name="mixture", mixture={"mine": part, "sudoku": {}}))
    problem = task.problems("eval")[0]
    assert problem.task == "mine"
    assert task.reward(problem, problem.fields["answer"]).parts == {"number": 1.0}
    part["options"]["reward"] = "nubmer"
    with pytest.raises(ValueError, match=r"^task\.mixture\.mine\.options\.reward\.name=nubmer"):
        build_task(TaskSettings(name="mixture", mixture={"mine": part}))


WRONG = {
    "no source": ({"train": None}, "task.options.train is empty; give a file with your rows"),
    "no rows to hold out": ({"held_out": 40}, "task.options.held_out=40 of 40 rows: both splits"),
    "half a row": ({"held_out": 1.5}, "task.options.held_out=1.5 of 40 rows: both splits"),
    "an unknown role": ({"columns": {"reply": "answer"}}, "columns.reply='answer': give a column"),
    "an unknown column": (
        {"columns": {"prompt": "ask"}},
        "task.options.columns.prompt=ask: there is no such column, but question, answer",
    ),
    "no prompt": ({"train": ["a", "b"]}, "the columns are a, b; none is a prompt; name it, as"),
    "two prompts": ({"train": ["prompt", "question"]}, "prompt and question could be the prompt"),
    "a placeholder": ({"template": "{query}"}, "row 1: no column query; it has question, answer"),
    "no answer": ({"train": ["prompt", "text"]}, "reward exact needs an answer, and the columns"),
    "an unknown reward": ({"reward": "exakt"}, "reward.name=exakt is not a reward; did you mean"),
    "another reward": ({"reward": "f1"}, "reward.name=f1 is not a reward; use one of exact, num"),
    "no reward": ({"reward": []}, "task.options.reward=[] names no reward; give one of exact"),
    "an option of another": (
        {"reward": {"name": "exact", "pattern": "a"}},
        "reward.pattern is not a setting; section task.options.reward has name, weight, label",
    ),
    "a misspelt option": (
        {"reward": [{"name": "regex", "patern": "a"}]},
        "task.options.reward[0].patern is not a setting; did you mean task.options.reward[0].patt",
    ),
    "no pattern": ({"reward": "regex"}, "task.options.reward.pattern is empty; give one such as"),
    "a broken pattern": ({"reward": {"name": "regex", "pattern": "(a"}}, "is not a pattern of"),
    "a list as a name": (
        {"reward": [{"name": ["exact"], "weight": 0.5}]},
        "task.options.reward[0].name=['exact'] is not a reward; did you mean exact?",
    ),
    "one label twice": (
        {"reward": ["exact", "exact"]},
        "task.options.reward[1]: the label exact is taken; give it another",
    ),
    "a taken label": ({"reward": {"name": "exact", "label": "mean"}}, "label mean is taken"),
    "no address": ({"reward": {"url": "localhost:1"}}, "reward.url=localhost:1 is no address"),
    "a number": ({"reward": 3}, "task.options.reward=3 has the wrong type; it must be text or a"),
    "an unknown option": ({"rewards": "exact"}, "rewards is not an option of jsonl; did you mean"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_with_what_is_known(tmp_path, rows, name):
    changes, said = WRONG[name]
    options = {"train": rows, **changes}
    if isinstance(options["train"], list):
        row = dict.fromkeys(options["train"], "1")
        options["train"] = write(tmp_path / "other.jsonl", [row] * 3)
    with pytest.raises(ValueError, match=r"task\.options\.") as error:
        make(**options).problems("train")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
