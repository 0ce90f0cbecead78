"""The helper of multi-rank tests: results by rank, failures named, nothing left running."""

import importlib.util
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import PRELOADED, run_ranks

PRESENT = set(sys.modules)  # in a rank: what its server had imported, and tests.ranks


def _sum_on_every_rank(values):
    mine = values[dist.get_rank()].clone()
    dist.all_reduce(mine)
    return dist.get_rank(), mine, torch.get_num_threads()


def _environment():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "EXTRA")
    return [os.environ[name] for name in names]


def _fail_on_rank_one(folder):
    Path(folder, f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    if dist.get_rank() == 1:
        print("about to fail")
        raise ZeroDivisionError("rank one cannot divide")
    dist.barrier()


def _hang_on_rank_one():
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def _die_on_rank_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()


def _leave_global_state():
    seen, torch.left_behind = hasattr(torch, "left_behind"), True
    return seen


def test_all_reduce_over_two_ranks_returns_results_by_rank():
    results = run_ranks(2, _sum_on_every_rank, [torch.tensor([1.0]), torch.tensor([2.0])])
    assert results == [(0, torch.tensor([3.0]), 1), (1, torch.tensor([3.0]), 1)]


def test_ranks_see_the_variables_of_a_launcher():
    assert run_ranks(2, _environment, environment={"EXTRA": "x"}) == [
        ["0", "0", "2", "2", "x"],
        ["1", "1", "2", "2", "x"],
    ]


def test_a_failing_rank_is_named_first_and_the_others_are_killed(tmp_path):
    with pytest.raises(AssertionError, match="rank one cannot divide") as failure:
        run_ranks(2, _fail_on_rank_one, str(tmp_path))
    message = str(failure.value)
    assert message.startswith("rank 1 of 2: Traceback")
    assert "rank 1 printed: about to fail" in message
    for rank in range(2):
        pid = int((tmp_path / f"pid-{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_hanging_rank_shows_where_it_stands():
    started = time.monotonic()
    with pytest.raises(AssertionError, match="_hang_on_rank_one"):
        run_ranks(2, _hang_on_rank_one, timeout=3.0)
    assert time.monotonic() - started < 30


def test_a_killed_rank_is_told_by_its_signal():
    with pytest.raises(AssertionError, match="rank 1 of 2: was killed by signal 9"):
        run_ranks(2, _die_on_rank_one)


def test_no_state_survives_between_calls():
    assert run_ranks(1, _leave_global_state) == [False]
    assert run_ranks(1, _leave_global_state) == [False]


def _what_was_there():
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    threads, is_compiled = threading.enumerate(), hasattr(swiglu, "_torchdynamo_orig_callable")
    return [name for name in PRELOADED if name not in PRESENT], len(threads), is_compiled


def test_a_rank_starts_with_the_package_imported_and_one_thread():
    """It compiles no kernel, like a run without a GPU."""
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("with Transformer Engine, ranks import the package themselves")
    assert run_ranks(1, _what_was_there) == [([], 1, False)]
