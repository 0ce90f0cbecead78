"""The CUDA replacement: explicit, once, and without effect before its call or on a GPU."""

import subprocess
import sys

import pytest
import torch

from tests.ranks import run_ranks


def _cuda_functions():
    from megatron.core.tensor_parallel import random as tracker

    functions = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
    functions["_get"], functions["_set"] = tracker._get_cuda_rng_state, tracker._set_cuda_rng_state
    return functions


def _changed(before):
    return sorted(k for k, v in _cuda_functions().items() if v is not before.get(k))


def _modes():
    return torch._C._len_torch_function_stack()


def _import_everything():
    import importlib.util
    import pkgutil

    import agrpo_megatron

    optional = () if importlib.util.find_spec("transformer_engine") else (".te",)
    for module in pkgutil.walk_packages(agrpo_megatron.__path__, "agrpo_megatron."):
        if not module.name.endswith(("__main__", *optional)):
            importlib.import_module(module.name)


def _import_then_prepare():
    before, modes = _cuda_functions(), _modes()
    _import_everything()
    by_import = (_changed(before), _modes() - modes)

    from agrpo_megatron.megatron.platform import prepare_platform

    prepare_platform(threads=1)
    once, by_call = _cuda_functions(), (len(_changed(before)) > 0, _modes() - modes)
    prepare_platform(threads=1)
    by_second_call = (_changed(once), _modes() - modes)
    return by_import, by_call, by_second_call


def _use_cuda_names(local_ranks):
    import os

    from agrpo_megatron.megatron.platform import prepare_platform

    os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
    device = prepare_platform()
    threads = torch.get_num_threads()
    tensor = torch.ones(2, device="cuda")
    moved = torch.zeros(3).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        state = torch.cuda.get_rng_state()
        first = torch.rand(2)
        torch.cuda.set_rng_state(state)
        again = torch.rand(2)
    return {
        "devices": {str(device), str(tensor.device), str(moved.device)},
        "type": tensor.type(),
        "cast": tensor.type(torch.float64).dtype,
        "available": torch.cuda.is_available(),
        "repeats": torch.equal(first, again),
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
    }


def test_imports_change_nothing_and_a_second_call_changes_nothing_more():
    by_import, by_call, by_second_call = run_ranks(1, _import_then_prepare)[0]
    assert by_import == ([], 0)
    assert by_call == (True, 1)
    assert by_second_call == ([], 1)


def test_what_megatron_asks_of_cuda_runs_on_the_cpu():
    seen = run_ranks(1, _use_cuda_names, 2)[0]
    assert seen["devices"] == {"cpu"}
    assert seen["type"] == "torch.cuda.FloatTensor"
    assert seen["cast"] == torch.float64
    assert not seen["available"]
    assert seen["repeats"]
    assert seen["threads"] == max(1, seen["cores"] // 2)


def _threads(local_ranks):
    import os

    from agrpo_megatron.megatron.platform import prepare_platform

    os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
    os.sched_getaffinity = lambda _: set(range(12))
    torch.set_num_threads(3)  # as torch itself does under the variable
    prepare_platform()
    return torch.get_num_threads()


@pytest.mark.parametrize(("local_ranks", "threads"), [(1, 3), (2, 6)])
def test_a_single_rank_follows_omp_num_threads(local_ranks, threads):
    """Launchers set it for several ranks, whatever the machine has."""
    assert run_ranks(1, _threads, local_ranks, environment={"OMP_NUM_THREADS": "3"}) == [threads]


def _switch(*overrides):
    """Set the switches of a run on a GPU; returns what they are then."""
    import os

    from agrpo_megatron.megatron.platform import prepare_kernels
    from tests.training.tiny import tiny

    prepare_kernels(tiny(*overrides).kernels, torch.device("cuda"))
    return {
        "register": os.environ.get("NCCL_GRAPH_REGISTER"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
    }


def _choose_device():
    """Return the device of local rank 3, which sees one GPU, and what was made current."""
    import os

    from agrpo_megatron.megatron.platform import prepare_platform

    os.environ["LOCAL_RANK"], current = "3", []
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = current.append
    return str(prepare_platform(threads=1)), [str(device) for device in current]


def test_graphs_do_not_register_buffers_with_nccl():
    graphs = "kernels.cuda_graphs=true"
    assert run_ranks(1, _switch)[0]["register"] is None
    assert run_ranks(1, _switch, graphs)[0]["register"] == "0"


def test_a_deterministic_run_fills_no_memory():
    plain, deterministic = run_ranks(1, _switch)[0], run_ranks(1, _switch, DETERMINISTIC)[0]
    assert not plain["deterministic"] and plain["fills"]  # torch's default, without effect
    assert deterministic["deterministic"] and not deterministic["fills"]


def test_a_rank_that_sees_one_gpu_uses_it():
    assert run_ranks(1, _choose_device) == [("cuda:0", ["cuda:0"])]


DETERMINISTIC = "kernels.deterministic=true"

ON_A_GPU = """
import torch
from megatron.core.tensor_parallel import random as tracker
names = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
own = tracker._get_cuda_rng_state
from agrpo_megatron.megatron.platform import prepare_platform
device = prepare_platform(threads=1)
changed = [name for name, value in names.items() if getattr(torch.cuda, name) is not value]
assert changed == [], changed
assert tracker._get_cuda_rng_state is own
assert torch._C._len_torch_function_stack() == 0
assert str(device) == "cuda:0" and torch.ones(1, device="cuda").device == device
"""


@pytest.mark.gpu
def test_nothing_is_replaced_where_there_is_a_gpu():
    subprocess.run([sys.executable, "-c", ON_A_GPU], check=True, timeout=300)


def _suspended():
    """Return the depth of modes before, within (in three ways) and after a suspension."""
    from torch.overrides import TorchFunctionMode

    from agrpo_megatron.megatron.platform import plain_torch, prepare_platform

    depths = []
    with plain_torch():  # there is no replacement yet
        depths.append(_modes())
    prepare_platform(threads=1)
    depths.append(_modes())
    with plain_torch(), plain_torch():
        depths.append(_modes())
    with plain_torch(names_cuda=True):
        depths.append(_modes())
    with TorchFunctionMode(), plain_torch():
        depths.append(_modes())
    try:
        with plain_torch():
            raise KeyError
    except KeyError:
        depths.append(_modes())
    return depths, str(torch.ones(1, device="cuda").device)


def test_the_replacement_is_suspended_where_no_other_mode_is_active():
    first = _modes()
    depths, device = run_ranks(1, _suspended)[0]
    assert [depth - first for depth in depths] == [0, 1, 0, 1, 2, 1] and device == "cpu"


def _depth_of_a_forward():
    from tests.training.tiny import open_session

    session, engine = open_session()
    chunk, depths = engine.network.chunks[0], []
    chunk.decoder.register_forward_pre_hook(lambda *_: depths.append(_modes()))
    from agrpo_megatron.training.rl import collect_rollout, update_policy

    rollout, _ = collect_rollout(session, engine, 0)
    update_policy(session, engine, rollout, None)
    return set(depths)


def test_rollouts_and_updates_run_without_the_replacement():
    assert run_ranks(1, _depth_of_a_forward)[0] == {0}


def _page_faults():
    """Return the pages that the system handed out for the same 8 MiB, 20 times over."""
    import resource

    from agrpo_megatron.megatron.platform import prepare_platform

    def used():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            parts = [torch.zeros(2**18) for _ in range(8)]
            del parts
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    before = used()
    prepare_platform(threads=1)
    used()
    return before, used()


def test_memory_of_freed_tensors_is_reused():
    pages = 8 * 2**20 // 4096
    before, after = run_ranks(1, _page_faults)[0]
    assert after < pages / 2 < before
