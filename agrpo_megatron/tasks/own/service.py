"""A reward that an HTTP service computes: batches of completions, posted as JSON."""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.rewards.scores import RIGHT
from agrpo_megatron.types import Problem, Reward

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a retry; each is twice the one before
RETRIED = (408, 425, 429)  # of the statuses from 400 to 499, which are not retried
CHUNK = 1 << 16
MOST_BYTES = 1 << 26  # of a reply
FORM = "a list with a number, or {score, correct, parts}, for each completion"

type Item = dict[str, Any]  # prompt, completion, row
type Asked = tuple[Problem, str]  # with a completion


class Services(Protocol):
    """The services of a task."""

    def add(
        self, asked: Sequence[Asked], rewards: Sequence[Reward], *, closed: threading.Event
    ) -> list[Reward]:
        """Return rewards of completions with what the services add; blocks until they answer.

        Args:
            rewards: what the task's own `reward` found.
            closed: set when the caller no longer waits for the rewards.
        """
        ...

    def check(self) -> None:
        """Ask each service for one reward.

        Raises:
            ValueError: one does not answer, or its answer cannot be used.
        """
        ...


@dataclass(frozen=True)
class Service:
    """Options of a reward service."""

    url: str = setting("", "address that batches are posted to")
    weight: float = setting(1.0, "factor of its score in the sum")
    label: str | None = setting(None, "its name in the metrics; null: service")
    timeout: float = setting(30.0, "wall time of one request", unit="seconds", low=0.1)
    retries: int = setting(3, "further attempts after a failed request", low=0, high=20)
    batch_size: int = setting(32, "completions of a request, at most", low=1)
    headers_env: str | None = setting(
        None, "environment variable with headers, `Name: value`, one a line; null: none"
    )


class _Unusable(Exception):
    """A request failed; with `is_final` another attempt would fail too."""

    def __init__(self, reason: str, *, is_final: bool = False):
        super().__init__(reason)
        self.is_final = is_final


def ask(
    service: Service, items: Sequence[Item], *, workers: int, closed: threading.Event
) -> list[Reward]:
    """Return a service's rewards; one that failed has a `failure`, and the score 0.

    Batches are posted by a few threads at a time. Blocks until all are answered or given up.

    Args:
        workers: requests at one time.
        closed: set by another thread to end the waiting.

    Raises:
        RuntimeError: `closed` was set.
    """
    size = service.batch_size
    batches = deque(enumerate(items[at : at + size] for at in range(0, len(items), size)))
    found: dict[int, list[Reward]] = {}
    count, news = len(batches), threading.Condition()

    def post() -> None:
        """Post batches until none is left."""
        while not closed.is_set():
            try:
                place, batch = batches.popleft()
            except IndexError:
                return
            rewards = _ask_batch(service, batch, closed)
            with news:
                found[place] = rewards
                news.notify()

    for _ in range(min(workers, count)):  # a request in flight keeps no process from its end
        threading.Thread(target=post, name="reward-service", daemon=True).start()
    with news:
        while len(found) < count:
            news.wait(0.2)
            if closed.is_set():
                raise RuntimeError(f"{service.url}: the grader was closed")
    return [reward for place in range(count) for reward in found[place]]


def _ask_batch(service: Service, batch: Sequence[Item], closed: threading.Event) -> list[Reward]:
    """Post a batch until it is answered, or its attempts are used up."""
    pause, reason = FIRST_PAUSE, ""
    for attempt in range(service.retries + 1):
        if attempt and closed.wait(pause):
            break
        pause = min(2 * pause, LONGEST_PAUSE)
        try:
            return read_reply(_post(service, batch), len(batch))
        except _Unusable as error:
            reason = str(error)
            if error.is_final:
                break
        except Exception as error:  # a bug here must not leave the run waiting
            reason = f"{type(error).__name__}: {error}"
    return [Reward(0.0, False, failure=f"{service.url}: {reason}")] * len(batch)


def _post(service: Service, batch: Sequence[Item]) -> bytes:
    """Return the body of one reply.

    Raises:
        _Unusable: the request failed.
    """
    import requests
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    deadline = time.monotonic() + service.timeout
    # Dates and the like, of parquet files, become text.
    data = json.dumps({"items": list(batch)}, default=str).encode()
    headers = {"Content-Type": "application/json", **_headers(service)}
    try:
        with requests.post(
            service.url,
            data=data,
            headers=headers,
            timeout=service.timeout,
            stream=True,
            allow_redirects=False,
        ) as reply:
            status, body = reply.status_code, _body(reply.raw, deadline)
    except (requests.Timeout, ReadTimeoutError, TimeoutError):
        raise _Unusable(f"no answer within {service.timeout:g} seconds") from None
    except (requests.RequestException, OSError, HTTPError) as error:
        raise _Unusable(_cause(error)) from None
    if status == 200:
        return body
    is_final = status < 500 and status not in RETRIED
    said = " ".join(body[:80].decode(errors="replace").split())
    raise _Unusable(f"status {status}{f' ({said})' if said else ''}", is_final=is_final)


def _body(stream: Any, deadline: float) -> bytes:
    """Read a reply to its end; urllib3's other methods wait for whole chunks, however slow.

    Raises:
        TimeoutError: it is not over by the deadline.
        _Unusable: it is too long.
    """
    body = b""
    while part := stream.read1(CHUNK, decode_content=True):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > MOST_BYTES:
            raise _Unusable(f"the reply is over {MOST_BYTES >> 20} MiB; it must be {FORM}")
    return body


def read_reply(body: bytes, count: int) -> list[Reward]:
    """Return the rewards in a reply to a request of `count` completions.

    Raises:
        _Unusable: it has another form.
    """
    try:
        made = json.loads(body)
    except (ValueError, RecursionError):
        said = " ".join(body[:40].decode(errors="replace").split())
        raise _Unusable(f"the reply is not JSON: {said!r}; it must be {FORM}") from None
    if not isinstance(made, list) or len(made) != count:
        what = f"{len(made)} values" if isinstance(made, list) else f"{made!r:.40}"
        raise _Unusable(f"the reply to {count} completions is {what}; it must be {FORM}")
    return [_reward(one) for one in made]


def _reward(made: Any) -> Reward:
    if not isinstance(made, dict):
        score = _number(made, "score")
        return Reward(score, score >= RIGHT)
    score, parts = _number(made.get("score"), "score"), made.get("parts") or {}
    correct = made.get("correct", score >= RIGHT)
    if not isinstance(correct, bool) or not isinstance(parts, dict):
        raise _Unusable(f"the reply has {made!r:.80}; correct is true or false, parts are numbers")
    return Reward(score, correct, {name: _number(part, name) for name, part in parts.items()})


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _Unusable(f"the reply has the {name} {value!r:.40}, which is not a finite number")
    return float(value)


def _headers(service: Service) -> dict[str, str]:
    """Return the headers of the environment.

    Raises:
        ValueError: the variable is not set, or has another form.
    """
    name = service.headers_env
    if name is None:
        return {}
    said = f"headers_env={name} of {service.url}"
    lines = [line for line in os.environ.get(name, "").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{said}: the environment has no {name}; export it, as `Name: value`")
    pairs = [line.partition(":") for line in lines]
    if not all(colon for _, colon, _ in pairs):
        raise ValueError(f"{said}: {name} must have lines `Name: value`")  # its value is a secret
    return {header.strip(): value.strip() for header, _, value in pairs}


def _cause(error: BaseException) -> str:
    """Return the innermost cause of an error of requests: its text repeats address and pool."""
    while inner := getattr(error, "reason", None) or error.__cause__ or error.__context__:
        error = inner if isinstance(inner, BaseException) else OSError(inner)
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"[:200]
