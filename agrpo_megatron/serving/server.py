"""An HTTP server with OpenAI's endpoints of chats and completions."""

import asyncio
import contextlib
import hmac
import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from agrpo_megatron.serving.api import ApiError, Ask, AskChat, AskText, read
from agrpo_megatron.serving.model import Model
from agrpo_megatron.serving.requests import CHANGES, check_room, noise_index, request_sampling
from agrpo_megatron.serving.texts import Completion
from agrpo_megatron.serving.worker import Delta, Queue, Waiting, on_interrupt, work
from agrpo_megatron.types import Prompt

LEAVE = 10.0  # seconds that the last answers have to be read


@dataclass
class Front:
    """The server's side of a model."""

    model: Model
    name: str
    key: str | None  # None: anyone may ask
    waiting: Queue = field(default_factory=queue.SimpleQueue)
    created: int = field(default_factory=lambda: int(time.time()))
    is_closing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Take no more requests; those that were taken are still answered."""
        with self._lock:
            self.is_closing = True
            self.waiting.put(None)

    def take(self, asked: Sequence[Waiting]) -> None:
        """Have the model answer; nothing is behind the mark that `close` leaves.

        Raises:
            ApiError: the server is closing.
        """
        with self._lock:
            if self.is_closing:
                raise ApiError("the server is closing", status=503, code="closing")
            for one in asked:
                self.waiting.put(one)


@dataclass(frozen=True)
class _Answer:
    """A request in progress: its choices, and their parts as they come."""

    ask: Ask
    name: str
    prompt_tokens: int
    choices: int
    parts: "asyncio.Queue[tuple[int, Delta]]"
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def is_chat(self) -> bool:
        return isinstance(self.ask, AskChat)

    def record(self, choices: list[dict], *, is_chunk: bool = False) -> dict[str, Any]:
        """Return a record of OpenAI's: of a whole answer, or of a part of it."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.number}", "object": kind}
        return {**head, "created": self.created, "model": self.name, "choices": choices}

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": message} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return a choice of a part."""
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def usage(self, done: list[Completion]) -> dict[str, int]:
        """Return the counts of tokens."""
        written = sum(one.tokens for one in done)
        total = self.prompt_tokens + written
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": written}
        return {**counts, "total_tokens": total}


def serve(model: Model, *, name: str, listener: socket.socket, key: str | None) -> None:
    """Answer requests until the process is interrupted; called by the main rank's main thread.

    The first interrupt finishes accepted requests and refuses new ones; the second ends at once.
    """
    front = Front(model, name, key)
    config = uvicorn.Config(make_app(front), log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with on_interrupt(front.close):
        work(model, front.waiting)
    server.should_exit = True
    thread.join(LEAVE)


def make_app(front: Front) -> FastAPI:
    """Return the web application; its handlers run in the server's thread."""
    app = FastAPI(openapi_url=None)

    @app.exception_handler(ApiError)
    async def failed(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status)

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "closing" if front.is_closing else "ok"
        body = {"status": status, "model": front.name, "waiting": front.waiting.qsize()}
        return JSONResponse(body, status_code=503 if front.is_closing else 200)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _check_key(front, request)
        return {"object": "list", "data": [_model(front)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        _check_key(front, request)
        _check_model(front, name)
        return _model(front)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        ask = read(AskText, await _body(front, request))
        return await _answered(front, ask, ask.prompts)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        ask = read(AskChat, await _body(front, request))
        return await _answered(front, ask, [ask.chat])

    return app


def _model(front: Front) -> dict[str, Any]:
    fixed = {"object": "model", "owned_by": "agrpo_megatron"}
    return {"id": front.name, "created": front.created, **fixed}


def _check_key(front: Front, request: Request) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if front.key is not None and not hmac.compare_digest(given.encode(), front.key.encode()):
        raise ApiError("Incorrect API key provided", status=401, code="invalid_api_key")


def _check_model(front: Front, name: str) -> None:
    if name != front.name:
        message = f"The model {name!r} does not exist; this server has {front.name!r}"
        raise ApiError(message, status=404, code="model_not_found", param="model")


async def _body(front: Front, request: Request) -> Any:
    _check_key(front, request)
    try:
        return json.loads(await request.body())
    except ValueError:
        raise ApiError("the body is not JSON") from None


async def _answered(front: Front, ask: Ask, prompts: Sequence[Prompt | list[int]]) -> Response:
    """Send a request's completions to the model, and return what comes of them."""
    _check_model(front, ask.model)
    waiting, loop, parts = [], asyncio.get_running_loop(), asyncio.Queue()
    try:
        settings = front.model.settings
        changes = {key: getattr(ask, key) for key in CHANGES}
        sampling = request_sampling(settings, most=ask.most, **changes)
        encoded = [_encoded(front, prompt) for prompt in prompts]
        for ids in encoded:
            check_room(settings, ids, sampling)
    except ValueError as error:
        is_long = "tokens, and model.max_sequence_length" in str(error)
        code = "context_length_exceeded" if is_long else "invalid_value"
        raise ApiError(str(error), code=code) from None
    most = min(ask.most or sampling.completion_length, sampling.completion_length)
    for index in range(len(encoded) * ask.n):
        ids, noise = encoded[index // ask.n], noise_index(ask.seed, index % ask.n)

        def send(delta: Delta, index: int = index) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(parts.put_nowait, (index, delta))

        waiting.append(Waiting(ids, noise, sampling, most, ask.stops, send))
    front.take(waiting)
    used = sum(map(len, encoded))
    answer = _Answer(ask, front.name, used, len(waiting), parts)
    if ask.stream:
        return StreamingResponse(_streamed(answer), media_type="text/event-stream")
    return JSONResponse(await _whole(answer))


def _encoded(front: Front, prompt: Prompt | list[int]) -> list[int]:
    """Return the ids of a prompt."""
    if not isinstance(prompt, list):
        return front.model.run.tokenizer.encode_prompt(prompt)
    size = front.model.settings.model.vocab_size or 0
    if wrong := [token for token in prompt if token >= size]:
        raise ValueError(f"prompt has the id {wrong[0]}; the model's ids are 0 to {size - 1}")
    return prompt


async def _arriving(answer: _Answer) -> AsyncIterator[tuple[int, Delta]]:
    """Yield the parts of all choices until each is done.

    Raises:
        ApiError: one of them failed.
    """
    left = answer.choices
    while left:
        index, delta = await answer.parts.get()
        if delta.failure is not None:
            raise ApiError(delta.failure, status=500)
        left -= delta.done is not None
        yield index, delta


async def _whole(answer: _Answer) -> dict[str, Any]:
    """Return an answer once it is whole."""
    done: dict[int, Completion] = {}
    async for index, delta in _arriving(answer):
        if delta.done is not None:
            done[index] = delta.done
    choices = [answer.choice(index, one.text, one.reason) for index, one in sorted(done.items())]
    return {**answer.record(choices), "usage": answer.usage(list(done.values()))}


async def _streamed(answer: _Answer) -> AsyncIterator[str]:
    """Yield an answer as server-sent events: block by block, then the reasons of their ends."""
    done: list[Completion] = []
    wants_usage = answer.ask.stream_options is not None and answer.ask.stream_options.include_usage
    if answer.is_chat:
        for index in range(answer.choices):
            start = {**answer.delta(index, "", None), "delta": {"role": "assistant", "content": ""}}
            yield _event(answer.record([start], is_chunk=True))
    try:
        async for index, delta in _arriving(answer):
            if delta.text:
                part = answer.delta(index, delta.text, None)
                yield _event(answer.record([part], is_chunk=True))
            if delta.done is not None:
                done.append(delta.done)
                end = answer.delta(index, "", delta.done.reason)
                if answer.is_chat:
                    end["delta"] = {}
                yield _event(answer.record([end], is_chunk=True))
    except ApiError as error:
        yield _event(error.body)
        return
    if wants_usage:
        yield _event({**answer.record([], is_chunk=True), "usage": answer.usage(done)})
    yield "data: [DONE]\n\n"


def _event(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record)}\n\n"
