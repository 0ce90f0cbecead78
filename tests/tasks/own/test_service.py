"""Rewards of an HTTP service: a real local server that is slow, errs, recovers and babbles."""

import contextlib
import http.server
import json
import re
import threading
import time
from pathlib import Path

import pytest

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader
from agrpo_megatron.tasks.own import service
from tests.tasks.own.test_jsonl import write

ROWS = [{"prompt": f"{n}", "answer": n, "level": n % 2} for n in range(10)]


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(service, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve():
    """Yield a function that starts a server; `answer` gets the items and the request's number.

    It returns a reply, or (status, body), or (status, parts of a body).
    """
    servers = []

    def start(answer):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
                seen.append((asked, dict(self.headers)))
                made = answer(asked, len(seen))
                status, body = made if isinstance(made, tuple) else (200, json.dumps(made).encode())
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # the client has given up
                    for part in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(part)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def opened(tmp_path):
    """Yield a function that opens a grader with one reward, or several."""
    graders = []

    def start(reward):
        rows = write(tmp_path / "rows.jsonl", ROWS)
        options = {"train": "none", "eval": rows, "reward": reward}
        tree = {"name": "jsonl", "options": options, "grader": {"failed_score": -1.0}}
        settings = build(TaskSettings, tree, "task.")
        task = build_task(settings)
        graders.append(Grader(task, settings))
        return graders[-1], task

    yield start
    for grader in graders:
        grader.close()


def calls(task, text="1"):
    return [Call(problem, text) for problem in task.problems("eval")]


def test_batches_have_prompt_completion_and_row_and_rewards_keep_their_order(serve, opened):
    url, seen = serve(lambda items, _: [int(item["prompt"]) / 10 for item in items])
    grader, task = opened({"url": url, "batch_size": 4})
    rewards = grader.grade(calls(task, "text"))
    assert [reward.score for reward in rewards] == [n / 10 for n in range(10)]
    assert not any(reward.correct for reward in rewards) and rewards[3].parts == {"service": 0.3}
    assert sorted(len(items) for items, _ in seen) == [2, 4, 4]
    item = next(i for items, _ in seen for i in items if i["prompt"] == "7")
    assert item["completion"] == "text"
    row = {"answer": "7", "level": 1, "solution": "7"}
    assert item == {"prompt": "7", "completion": "text", "row": row}


def test_objects_have_score_verdict_and_parts(serve, opened):
    made = {"score": 0.5, "correct": True, "parts": {"style": 0.25}}
    url, _ = serve(
        lambda items, _: [made, 1, True, {"score": 2}][: len(items)] * (len(items) // 4 or 1)
    )
    grader, task = opened({"url": url, "label": "judge", "weight": 2.0})
    first, second, third, fourth = grader.grade(calls(task)[:4])
    assert (first.score, first.correct) == (1.0, True)
    assert first.parts == {"judge": 0.5, "judge/style": 0.25}
    assert [(r.score, r.correct) for r in (second, third, fourth)] == [
        (2, True),
        (2, True),
        (4, True),
    ]


def test_a_service_adds_to_other_rewards(serve, opened):
    url, _ = serve(lambda items, _: [0.5] * len(items))
    grader, task = opened([{"name": "number"}, {"url": url, "weight": 0.1}])
    rewards = grader.grade(calls(task))
    assert [reward.correct for reward in rewards] == [n == 1 for n in range(10)]
    assert rewards[1].score == 1.05 and rewards[1].parts == {"number": 1.0, "service": 0.5}


def test_an_error_and_nonsense_are_retried_until_the_service_recovers(serve, opened):
    replies = [(500, b"sorry"), (200, b"<html>"), [1.0], {"scores": []}, (503, b"")]

    def answer(items, number):
        return replies[number - 1] if number <= len(replies) else [1.0] * len(items)

    url, seen = serve(answer)
    grader, task = opened({"url": url, "retries": 5})
    rewards = grader.grade(calls(task))
    assert [reward.failure for reward in rewards] == [None] * 10
    assert len(seen) == len(replies) + 1 and seen[0][0] == seen[-1][0]


FAILURES = {  # what the server answers, what the completions are told, requests
    "an error": ((500, b"out of\nmemory"), "status 500 (out of memory)", 3),
    "refused": ((401, b"no key"), "status 401 (no key)", 1),
    "too many requests": ((429, b""), "status 429", 3),
    "another place": ((302, b""), "status 302", 1),
    "no JSON": ((200, b"<html>"), "the reply is not JSON: '<html>'; it must be a list with", 3),
    "nothing": ((200, b""), "the reply is not JSON: ''", 3),
    "too few": ([1.0] * 2, "the reply to 10 completions is 2 values; it must be a list with", 3),
    "no list": ({"rewards": 1}, "the reply to 10 completions is {'rewards': 1}; it must be", 3),
    "a text": (["1"] * 10, "the reply has the score '1', which is not a finite number", 3),
    "no score": ([{"reward": 1}] * 10, "the reply has the score None, which is not a finite", 3),
    "not a number": ([float("nan")] * 10, "the reply has the score nan, which is not a finite", 3),
    "a verdict": ([{"score": 1, "correct": "yes"}] * 10, "correct is true or false", 3),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_after_all_attempts_is_a_failure_with_its_reason(serve, opened, name):
    made, said, requests = FAILURES[name]
    url, seen = serve(lambda items, _: made)
    grader, task = opened({"url": url, "retries": 2})
    rewards = grader.grade(calls(task))
    assert {(reward.score, reward.correct) for reward in rewards} == {(-1.0, False)}
    assert rewards[0].failure.startswith(f"{url}: ") and said in rewards[0].failure
    assert len(seen) == requests
    assert grader.first_failure.reason == rewards[0].failure
    with pytest.raises(ValueError, match=r"^task\.options\.reward: the service http.*; start it"):
        task.services.check()


def test_a_reply_over_the_limit_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr(service, "MOST_BYTES", 1 << 20)

    class Endless:
        def read1(self, size, *, decode_content):
            return bytes(size)

    with pytest.raises(service._Unusable, match="^the reply is over 1 MiB; it must be a list with"):
        service._body(Endless(), time.monotonic() + 60)


def test_a_slow_service_costs_its_time_limit(serve, opened):
    """Also if it sends something now and then."""
    over = threading.Event()
    dribble = iter(lambda: over.wait(0.1) or b" ", True)
    for answer in (lambda items, _: over.wait(60) and [1.0], lambda items, _: (200, dribble)):
        url, _ = serve(answer)
        grader, task = opened({"url": url, "retries": 0, "timeout": 0.2})
        started = time.monotonic()
        assert grader.grade(calls(task))[0].failure == f"{url}: no answer within 0.2 seconds"
        assert time.monotonic() - started < 10
    over.set()


def test_one_batch_that_fails_costs_no_other(serve, opened):
    url, _ = serve(lambda items, _: (500, b"") if items[0]["prompt"] == "0" else [1.0] * len(items))
    grader, task = opened({"url": url, "batch_size": 5, "retries": 1})
    rewards = grader.grade(calls(task))
    assert [reward.failure is None for reward in rewards] == [False] * 5 + [True] * 5


def test_a_service_that_is_down_is_refused_at_the_start(opened):
    _, task = opened({"url": "http://127.0.0.1:9/", "retries": 1})
    with pytest.raises(
        ValueError, match=r"127\.0\.0\.1:9/: ConnectionRefusedError.*start it before"
    ):
        task.services.check()


def test_grading_goes_on_while_others_are_handed_in_and_ends_when_it_is_closed(serve, opened):
    release = threading.Event()
    url, _ = serve(lambda items, _: release.wait(30) and [1.0] * len(items))
    grader, task = opened({"url": url})
    started = time.monotonic()
    batch = grader.start(calls(task))
    assert grader.has_workers and not batch.done()
    grader.close()
    with pytest.raises(RuntimeError, match="the grader was closed"):
        batch.result(timeout=5)
    assert time.monotonic() - started < 10
    release.set()


def test_headers_come_from_the_environment(serve, opened, monkeypatch):
    url, seen = serve(lambda items, _: [1.0] * len(items))
    grader, task = opened({"url": url, "headers_env": "MY_HEADERS", "retries": 0})
    assert "the environment has no MY_HEADERS; export it" in grader.grade(calls(task))[0].failure
    monkeypatch.setenv("MY_HEADERS", "Authorization: Bearer a:b\nX-Team: c\n")
    assert grader.grade(calls(task))[0].failure is None
    sent = seen[-1][1]
    assert (sent["Authorization"], sent["X-Team"]) == ("Bearer a:b", "c")


def test_the_service_of_the_documents_grades(opened):
    """As docs/tasks.md has it, on another port."""
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names = {"__name__": "docs"}
    exec(code, names)
    names["Handler"].log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), names["Handler"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    grader, task = opened(f"http://127.0.0.1:{server.server_port}/")
    task.services.check()
    rewards = grader.grade(calls(task, " 7\n"))
    server.shutdown()
    server.server_close()
    assert [reward.correct for reward in rewards] == [n == 7 for n in range(10)]
