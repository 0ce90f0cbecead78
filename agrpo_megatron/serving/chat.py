"""A chat in the terminal, block by block."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.reports.trace import Edit, trace
from agrpo_megatron.serving.model import Generation, Model, Part, lead
from agrpo_megatron.serving.requests import check_room, noise_index
from agrpo_megatron.serving.texts import completion, settled
from agrpo_megatron.text.tokenizer import Tokenizer
from agrpo_megatron.trajectories import edits_of
from agrpo_megatron.types import Chat, Message, Trajectory

HELP = """\
/reset   forget the conversation
/trace   show the order in which the last reply was written
/help    show this
Ctrl-D   end"""


def converse(
    model: Model,
    sampling: SamplingSettings,
    lines: Iterable[str],
    console: Console,
    *,
    system: str | None = None,
) -> None:
    """Answer lines, each a message of the user or a command; called by the main rank.

    Args:
        system: message before all others; None: the chat template decides.
    """
    start = () if system is None else (Message("system", system),)
    messages, last = start, None
    for number, line in enumerate(lines):
        text = line.strip()
        if text == "/reset":
            messages, last = start, None
            console.print("the conversation is forgotten", style="dim")
        elif text == "/trace" and last is not None:
            show_trace(model.run.tokenizer, last, 0, console)
        elif text == "/trace":
            console.print("there is no reply yet", style="dim")
        elif text.startswith("/"):
            console.print(HELP, style="dim", markup=False)
        elif text:
            asked = (*messages, Message("user", text))
            try:
                reply, last = _replied(model, sampling, Chat(asked), number, console)
            except ValueError as error:  # the message is not part of the conversation
                console.print(
                    f"{error}; /reset forgets the conversation", style="dim", markup=False
                )
                continue
            messages = (*asked, Message("assistant", reply))


def _replied(
    model: Model, sampling: SamplingSettings, chat: Chat, number: int, console: Console
) -> tuple[str, Trajectory]:
    """Write the reply to the console as its blocks end, and return it."""
    tokenizer, most, sent = model.run.tokenizer, sampling.completion_length, ""
    ids = tokenizer.encode_prompt(chat)
    check_room(model.settings, ids, sampling)
    if tokenizer.unknown_id in tokenizer.encode(chat.messages[-1].content):
        console.print("note: the message holds text that the tokenizer lacks", style="dim")

    def emit(part: Part) -> None:
        nonlocal sent
        text = settled(tokenizer, part.ids, most=most, stops=())
        _write(console, text[len(sent) :])
        sent = text

    job = Generation([ids], [noise_index(number, 0)], sampling, [()])
    found = lead(model, job, emit)
    done = completion(tokenizer, found.tokens[0].tolist(), most=most, stops=())
    _write(console, f"{done.text[len(sent) :]}\n")
    if done.reason == "length":
        console.print(f"(cut at {most} tokens)", style="dim", markup=False)
    return done.text, found


def _write(console: Console, text: str) -> None:
    """Write a part of a line as it is."""
    console.file.write(text)
    console.file.flush()


def show_trace(tokenizer: Tokenizer, trajectory: Trajectory, row: int, console: Console) -> None:
    """Print a completion with the order in which its tokens were unmasked, and edited."""
    ids, steps = trajectory.tokens[row].tolist(), trajectory.unmask_step[row].tolist()
    edits = [
        Edit(step, place, *tokenizer.pieces([old, new]))
        for step, place, old, new in edits_of(trajectory, row)
    ]
    count = int(trajectory.num_steps[row])
    trace(tokenizer.pieces(ids), steps, console, num_steps=count, edits=edits)


def prompted(console: Console) -> Iterable[str]:
    """Yield lines of the user until Ctrl-D; a terminal shows where to write."""
    while True:
        try:
            yield console.input(Text("> ", style="bold")) if console.is_terminal else input()
        except EOFError:
            return
