"""The model's side of a server: completions that wait are sampled together, block by block."""

import contextlib
import queue
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.serving.model import Generation, Model, Part, lead
from agrpo_megatron.serving.texts import Completion, completion, settled


@dataclass(frozen=True)
class Delta:
    """A further part of a completion's text."""

    text: str
    done: Completion | None = None  # with the last part
    failure: str | None = None  # it will not be completed


@dataclass(frozen=True)
class Waiting:
    """A completion that is asked for."""

    prompt: list[int]
    noise: int
    sampling: SamplingSettings
    most: int  # tokens
    stops: tuple[str, ...]
    send: Callable[[Delta], object]  # from the thread of the model


type Queue = "queue.SimpleQueue[Waiting | None]"


def work(model: Model, waiting: Queue) -> None:
    """Complete what waits, until None comes and all that was asked before is done.

    Completions of one sampler are sampled together, those that have waited longest first.
    """
    held: list[Waiting] = []
    is_closing = False
    while held or not is_closing:
        arrived = [] if held else [waiting.get()]
        arrived += _drained(waiting)
        is_closing |= None in arrived
        held += [one for one in arrived if one is not None]
        if held:
            together = [one for one in held if one.sampling == held[0].sampling]
            held = [one for one in held if one.sampling != together[0].sampling]
            _complete(model, together)


def _drained(waiting: Queue) -> list[Waiting | None]:
    """Return all that waits now."""
    found: list[Waiting | None] = []
    while True:
        try:
            found.append(waiting.get_nowait())
        except queue.Empty:
            return found


def _complete(model: Model, together: Sequence[Waiting]) -> None:
    """Sample completions of one sampler; send their blocks as they end."""
    tokenizer, sent, open_rows = (
        model.run.tokenizer,
        [""] * len(together),
        set(range(len(together))),
    )

    def emit(part: Part) -> None:
        """Send what a part adds to what was sent."""
        one = together[part.row]
        if part.is_whole:
            done = completion(tokenizer, part.ids, most=one.most, stops=one.stops)
            open_rows.discard(part.row)
            one.send(Delta(done.text[len(sent[part.row]) :], done))
            return
        text = settled(tokenizer, part.ids, most=one.most, stops=one.stops)
        if len(text) > len(sent[part.row]):
            one.send(Delta(text[len(sent[part.row]) :]))
            sent[part.row] = text

    prompts, noise = [one.prompt for one in together], [one.noise for one in together]
    stops = [one.stops for one in together]
    try:
        found = lead(model, Generation(prompts, noise, together[0].sampling, stops), emit)
        for row in sorted(open_rows):  # other replicas sampled these
            emit(Part(row, found.tokens[row].tolist(), is_whole=True))
    except Exception as error:
        for row in open_rows:
            together[row].send(Delta("", failure=f"{type(error).__name__}: {error}"))
        if model.control is not None:
            raise  # the other ranks would do something else than this one
        traceback.print_exc(file=sys.stderr)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object]):
    """Call a function at the first interrupt or stop signal, and raise at the second."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(*_: object) -> None:
        restore()
        act()

    for number in signals:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()
