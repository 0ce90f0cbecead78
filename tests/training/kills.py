"""Runs that kill themselves with SIGKILL at a chosen moment."""

import os
import signal

import torch.distributed as dist

from agrpo_megatron.checkpoint import saving
from agrpo_megatron.runs.log import RunLog


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_line(number):
    """Kill the process once it has written so many metric lines."""
    own, written = RunLog.metrics, []

    def metrics(self, record):
        own(self, record)
        written.append(record)
        if len(written) == number:
            _die()

    RunLog.metrics = metrics


def kill_in_save(number, moment):
    """Kill the process in its so-many-th save, before a function of `saving` is called."""
    kill_in_call(number, saving, moment)


def kill_in_call(number, module, moment):
    """Kill the process before the so-many-th call of a function of a module."""
    own, calls = getattr(module, moment), []

    def stand_in(*args, **kwargs):
        calls.append(moment)
        if len(calls) == number and dist.get_rank() == 0:
            _die()
        return own(*args, **kwargs)

    setattr(module, moment, stand_in)
