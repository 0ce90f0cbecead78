"""`agrpo serve`, asked by the openai client: chats, completions, streams, errors, and its end."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from agrpo_megatron.cli.main import main
from tests.cli.test_evaluate import HF
from tests.cli.test_main import ROOT, agrpo
from tests.serving.test_likelihood import SETTINGS

openai = pytest.importorskip("openai")
SERVED = [*SETTINGS, "evaluation.temperature=1", "model.max_sequence_length=80"]
ASK = "7 5=12:"
SECONDS = 120  # until the server is there


class Server:
    """A server in a process of its own."""

    def __init__(self):
        command = [sys.executable, "-m", "agrpo_megatron", "serve", str(HF), "--port", "0"]
        command += ["--name", "tiny", "--api-key-env", "TINY_KEY", *SERVED]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TINY_KEY": "secret"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        limit = threading.Timer(SECONDS, self.process.kill)  # a server that says nothing
        limit.start()
        line = self.process.stdout.readline()
        limit.cancel()
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)/v1 \(.*\)\n", line)
        assert found, line
        self.address = found[1]

    def client(self, key="secret"):
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.send_signal(signal.SIGINT)
    rest, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0 and rest == "no more requests: ended\n"


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def complete(client, **changes):
    return client.completions.create(**{"model": "tiny", "prompt": ASK, "seed": 0, **changes})


def chat(client, **changes):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": ASK}]
    asked = {"model": "tiny", "messages": messages, "seed": 0, **changes}
    return client.chat.completions.create(**asked)


def test_it_has_one_model_and_is_well(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "agrpo_megatron"
    with urllib.request.urlopen(f"{server.address}/health") as answer:
        assert answer.read() == b'{"status":"ok","model":"tiny","waiting":0}'


def test_seed_0_is_the_text_of_agrpo_sample(client, tmp_path):
    status, printed = agrpo(tmp_path, "sample", HF, "--prompt", ASK, *SERVED)
    sampled = re.search(r"^completion  (.*)$", printed, re.MULTILINE)
    found = complete(client)
    assert status == 0 and sampled[1].strip() == found.choices[0].text.strip() != ""


def test_a_seed_repeats_a_text_and_no_seed_draws_another(client):
    one, two = (complete(client, seed=5).choices[0].text for _ in range(2))
    assert one == two
    drawn = {complete(client, seed=None).choices[0].text for _ in range(3)}
    assert len(drawn) == 3
    ids = [int(i) for i in (10, 23, 8)]
    assert complete(client, prompt=ids).usage.prompt_tokens == 3


def test_counts_and_reasons_are_those_of_the_text(client):
    found = complete(client, max_tokens=12, n=2, prompt=[ASK, "12"])
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 9, "each prompt counts once"
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 4
    assert (found.usage.completion_tokens, found.usage.total_tokens) == (48, 9 + 48)
    assert found.choices[0].text != found.choices[1].text, "choices have noise of their own"
    alone = complete(client, max_tokens=12)
    assert alone.choices[0].text == found.choices[0].text, "what is sampled together is no matter"


def test_a_stop_text_ends_the_text_before_it(client):
    whole = complete(client, max_tokens=32).choices[0].text
    stop = whole[5:7]
    found = complete(client, max_tokens=32, stop=[stop, "zzzz"])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_chats_are_laid_out_and_block_by_block(client):
    several = {seed: chat(client, max_tokens=32, seed=seed) for seed in range(6)}
    seed = max(several, key=lambda seed: len(several[seed].choices[0].message.content))
    whole = several[seed]
    message = whole.choices[0].message
    assert message.role == "assistant" and len(message.content) > 8
    plain = complete(client, prompt=f"Add.\n\n{ASK}\n\n", max_tokens=32, seed=seed)
    assert plain.choices[0].text == message.content, "the template of this tokenizer is plain"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(client, max_tokens=32, seed=seed, **options))
    first, *middle, usage = chunks
    assert first.choices[0].delta.role == "assistant" and usage.choices == []
    assert usage.usage == whole.usage
    texts = [chunk.choices[0].delta.content for chunk in middle if chunk.choices[0].delta.content]
    assert "".join(texts) == message.content and len(texts) > 2
    assert middle[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_choices_of_a_stream_are_told_apart(client):
    whole = complete(client, n=3, max_tokens=24, stop="e")
    texts, ends = ["", "", ""], {}
    for chunk in complete(client, n=3, max_tokens=24, stop="e", stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}


def test_what_only_diffusion_models_have_goes_in_the_body(client):
    fine = {"denoising_steps": 16, "block_length": 4, "unmasking": "leftmost"}
    texts = {complete(client, extra_body=body).choices[0].text for body in ({}, fine)}
    assert len(texts) == 2
    same = {key: fine[key] for key in fine} | {"top_k": 1}
    greedy = complete(client, temperature=0, extra_body=fine).choices[0].text
    assert complete(client, temperature=1, extra_body=same).choices[0].text == greedy


def test_requests_at_once_get_what_each_gets_alone(client):
    asked = [{"seed": seed, "temperature": 1.0 if seed % 3 else 0.5} for seed in range(8)]
    alone = [complete(client, **changes).choices[0].text for changes in asked]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda c: complete(client, **c).choices[0].text, asked))
    assert together == alone and len(set(alone)) == 8


WRONG = {
    "another model": ({"model": "big"}, 404, "model_not_found", "this server has 'tiny'"),
    "a long prompt": (
        {"prompt": "1" * 70},
        400,
        "context_length_exceeded",
        "leaves 64 in addition to the completion's 16",
    ),
    "an empty prompt": ({"prompt": ""}, 400, "invalid_value", "the prompt is empty"),
    "an id": ({"prompt": [5, 160]}, 400, "invalid_value", "the model's ids are 0 to 159"),
    "log-probs": ({"logprobs": 3}, 400, "unsupported_parameter", "logprobs=3 is not supported"),
    "hot": ({"temperature": 3.0}, 400, "invalid_value", "temperature: Input should be less"),
    "steps": (
        {"extra_body": {"denoising_steps": 5}},
        400,
        "invalid_value",
        "denoising_steps=5 must be a multiple of the 2 blocks",
    ),
    "unknown": (
        {"extra_body": {"tempreature": 1}},
        400,
        "unknown_parameter",
        "Unrecognized request argument supplied: tempreature",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_an_error_of_openais_form(client, name):
    changes, status, code, said = WRONG[name]
    with pytest.raises(openai.APIStatusError) as raised:
        complete(client, **changes)
    error = raised.value
    assert (error.status_code, error.code) == (status, code)
    assert said in error.body["message"]


def test_a_wrong_key_is_refused(server):
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        server.client("other").models.list()
    request = urllib.request.Request(f"{server.address}/v1/completions", data=b"{", method="POST")
    request.add_header("Authorization", "Bearer secret")
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    assert raised.value.code == 400 and b"the body is not JSON" in raised.value.read()


def test_wrong_use_is_one_line_before_a_model_is_loaded(server, capsys):
    port = server.address.rpartition(":")[2]
    wrong = {
        ("--port", port): "Address already in use",
        ("--api-key-env", "NO_SUCH_KEY"): "this variable is empty or not set",
        ("--checkpoint", "best"): "is not a run directory; leave it out",
    }
    for words, said in wrong.items():
        assert main(["serve", str(HF), *words, *SERVED]) == 2
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1
