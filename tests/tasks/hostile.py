"""A custom task with misbehaving rewards: the name of a problem says what its reward does."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.base import Splits, Task
from agrpo_megatron.types import Problem, Reward

FAILING = ("raise", "hang", "allocate", "kill", "exit", "nan", "text")


@dataclass(frozen=True)
class HostileOptions:
    """The kinds of rewards."""

    deeds: list[str] | None = setting(None, "what the rewards do; null: everything")
    seconds: float = setting(0.05, "time of a slow reward", unit="seconds", low=0)
    folder: str = setting(".", "for the process ids of hung rewards")


class Hostile(Task):
    """Scores the length of a text, unless the problem asks for something else."""

    name = "hostile"
    options_type = HostileOptions

    def load(self) -> Splits:
        deeds = self.options.deeds or ["answer", *FAILING]
        return {
            split: [Problem(f"{deed} {split}", {"deed": deed}, "1") for deed in deeds]
            for split in ("train", "eval")
        }

    def prompt(self, problem: Problem) -> str:
        return f"{problem.fields['deed']}:"

    def reward(self, problem: Problem, completion: str) -> Reward:
        if problem.fields["deed"] not in ("answer", "slow"):
            return self._misbehave(problem.fields["deed"])
        if problem.fields["deed"] == "slow":
            time.sleep(self.options.seconds)
        return Reward(len(completion) / 10, len(completion) > 3, {"long": float(len(completion))})

    def _misbehave(self, deed: str):
        if deed == "raise":
            raise KeyError("no such thing")
        if deed == "print":
            print("printed by a reward", flush=True)
            return Reward(1.0, True)
        if deed == "start and hang":
            started = subprocess.Popen(["sleep", "600"])
            (Path(self.options.folder) / f"hung-{started.pid}").touch()
        if deed in ("hang", "start and hang"):
            (Path(self.options.folder) / f"hung-{os.getpid()}").touch()
            while True:
                time.sleep(60)
        if deed == "allocate":
            held = []
            while True:
                held.append(numpy.empty(1 << 24, numpy.uint8))  # takes no time to fill
        if deed in ("kill", "kill the server"):
            process = os.getpid() if deed == "kill" else os.getppid()
            os.kill(process, signal.SIGKILL)
            time.sleep(60)
        if deed == "exit":
            sys.exit(3)
        return Reward(math.nan, True) if deed == "nan" else "1.0"
