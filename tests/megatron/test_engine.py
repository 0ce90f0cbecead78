"""Settings of the optimizer become Megatron's, and its refusals are reported."""

import gc

import pytest
import torch

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron import engine as engine_module
from agrpo_megatron.megatron.engine import optimizer_config
from agrpo_megatron.megatron.layers.config import transformer_config
from tests.ranks import run_ranks
from tests.training.tiny import open_session


def _config(*overrides):
    settings = load(Settings, None, ["optimizer.distributed=true", *overrides])
    config = transformer_config(settings, settings.parallel, stage=0)
    return optimizer_config(settings.optimizer, config)


def test_nothing_is_short_or_moved_unless_asked_for():
    config = _config("precision=bf16")
    assert config.bf16 and config.params_dtype == torch.bfloat16
    assert not config.use_precision_aware_optimizer and not config.optimizer_cpu_offload
    assert config.exp_avg_dtype == config.exp_avg_sq_dtype == torch.float32
    assert config.main_grads_dtype == torch.float32 and config.fp8_recipe is None
    assert not _config().bf16 and _config().params_dtype == torch.float32


def test_a_share_is_moved_and_transfers_overlap():
    config = _config("precision=bf16", "optimizer.offload=0.25", "optimizer.main_gradients=bf16")
    assert config.optimizer_cpu_offload and config.optimizer_offload_fraction == 0.25
    assert config.use_precision_aware_optimizer and config.overlap_cpu_optimizer_d2h_h2d
    assert config.main_grads_dtype == torch.bfloat16
    assert config.pin_cpu_grads == config.pin_cpu_params == torch.cuda.is_available()


def test_what_is_passed_by_name_wins():
    given = "optimizer.megatron={adam_eps: 1.0e-6, overlap_cpu_optimizer_d2h_h2d: false}"
    config = _config("precision=bf16", "optimizer.offload=1", given)
    assert config.adam_eps == 1e-6 and not config.overlap_cpu_optimizer_d2h_h2d


def _weights_alive_as_another_begins():
    """Return how many weights there are with an engine, and as the next one begins to be built."""

    def count():
        return sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())

    alive, own = [], engine_module.build_network

    def counted(*arguments):
        alive.append(count())
        return own(*arguments)

    engine_module.build_network = counted
    gc.disable()
    kept = open_session()
    alive.append(count())
    del kept
    open_session()
    return alive


def test_an_engine_that_is_left_is_gone_before_another_comes():
    [(none, some, left)] = run_ranks(1, _weights_alive_as_another_begins)
    assert none == left == 0 < some


def _gradient_dtypes(overrides):
    _, engine = open_session("precision=bf16", *overrides)
    return {buffer.grad_dtype for ddp in engine.ddp for buffer in ddp.buffers}


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [([], torch.float32), (["ddp.grad_reduce_in_fp32=false"], torch.bfloat16)],
)
def test_gradients_are_summed_in_float32_unless_ddp_overrides_it(overrides, dtype):
    assert run_ranks(1, _gradient_dtypes, overrides) == [{dtype}]
