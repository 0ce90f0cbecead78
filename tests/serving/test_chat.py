"""`agrpo chat`: history, commands, and use in a pipe."""

import io
import os
import sys

from agrpo_megatron.cli.main import main
from tests.cli.test_evaluate import HF
from tests.ranks import run_ranks
from tests.serving.test_likelihood import SETTINGS

LINES = ["/trace", "7 5=12:", "7 5=12:", "/trace", "/reset", "7 5=12:", "/what", "1" * 200, "12"]


def _chatted(lines, *settings):
    """Return the status and what is printed for lines from a pipe."""
    os.environ["COLUMNS"] = "200"
    sys.stdin, sys.stdout = io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO()
    status = main(["chat", str(HF), "--system", "Add.", *SETTINGS, *settings])
    return status, sys.stdout.getvalue()


def test_a_conversation_in_a_pipe():
    limits = ["model.max_sequence_length=120", "evaluation.unmasking=leftmost"]
    status, printed = run_ranks(1, _chatted, LINES, *limits)[0]
    assert status == 0
    first, *rest = printed.splitlines()
    assert first == "there is no reply yet"
    assert rest[1] == rest[3] == "(cut at 16 tokens)"
    again = rest[rest.index("the conversation is forgotten") + 1]
    assert again == rest[0] != rest[2], "the second reply saw the first; after /reset none did"
    assert sum(line.startswith("denoising step  0") for line in rest) == 1
    assert "/trace   show the order in which the last reply was written" in rest
    refused = next(line for line in rest if "tokens, and model.max_sequence_length=120" in line)
    assert refused.endswith("; /reset forgets the conversation")
    assert rest[-2] != refused, "it went on after that"
