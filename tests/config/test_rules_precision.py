"""Every rule of precision, kernels and optimizer states, broken once, in its exact words."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.rules.precision import optimizers, trained_phases, validate_precision
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

BF16, FP8, TE = "precision=bf16", "precision=fp8", "kernels.layer_spec=te"
LOCAL, GRAPHS = "kernels.layer_spec=local", "kernels.cuda_graphs=true"
INVARIANT, PRIMARY = "kernels.batch_invariant=true", "fp8.primary_weights=true"
DISTRIBUTED = "optimizer.distributed=true"
DELAYED, NO_RL = "fp8.recipe=delayed", "train.iterations=0"


def settings_of(*overrides):
    return load(Settings, None, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("fp8.recipe=blockwise",),
            "fp8.recipe=blockwise is for precision=fp8, and precision=fp32; set precision=fp8 or "
            "leave it out",
        ),
        (
            (PRIMARY, BF16),
            "fp8.primary_weights=true is for precision=fp8, and precision=bf16; set precision=fp8 "
            "or leave it out",
        ),
        (
            (FP8, DELAYED),
            "fp8.recipe=delayed scales by the values of earlier forwards, so a token's "
            "log-probability would depend on which rollouts came before it; use blockwise or "
            "tensorwise, or train.iterations=0 for a supervised phase only",
        ),
        (
            (FP8, DELAYED, NO_RL, "fp8.bf16_first_layers=1"),
            "fp8.bf16_first_layers=1: the recipe delayed has all layers in FP8 or none; use "
            "fp8.bf16_first_layers=0 or fp8.recipe=tensorwise",
        ),
        (
            (FP8, DELAYED, NO_RL, "fp8.bf16_last_layers=2"),
            "fp8.bf16_last_layers=2: the recipe delayed has all layers in FP8 or none; use "
            "fp8.bf16_last_layers=0 or fp8.recipe=tensorwise",
        ),
        (
            (TE,),
            "kernels.layer_spec=te has no attention in float32, and precision=fp32; use "
            "precision=bf16 or kernels.layer_spec=auto",
        ),
        (
            (FP8, LOCAL),
            "precision=fp8 needs Transformer Engine's layers, and kernels.layer_spec=local; use "
            "kernels.layer_spec=auto",
        ),
        (
            (BF16, LOCAL, INVARIANT),
            "kernels.batch_invariant=true needs Transformer Engine's layers, and "
            "kernels.layer_spec=local; use kernels.layer_spec=auto",
        ),
        (
            (INVARIANT,),
            "kernels.batch_invariant=true needs Transformer Engine's layers, which precision=fp32 "
            "does not use; set precision=bf16",
        ),
        (
            (FP8, INVARIANT),
            "kernels.batch_invariant=true has only bfloat16 products, and precision=fp8; use "
            "precision=bf16",
        ),
        (
            (BF16, INVARIANT, "parallel.context=2"),
            "kernels.batch_invariant=true needs whole rows on each rank, and parallel has "
            "context=2; use context=1",
        ),
        (
            (BF16, INVARIANT, "rollout.parallel=cp2"),
            "kernels.batch_invariant=true needs whole rows on each rank, and rollout.parallel has "
            "context=2; use context=1",
        ),
        (
            (BF16, GRAPHS, LOCAL),
            "kernels.cuda_graphs=true needs Transformer Engine's layers, and "
            "kernels.layer_spec=local; use kernels.layer_spec=auto",
        ),
        (
            (GRAPHS,),
            "kernels.cuda_graphs=true needs Transformer Engine's layers, which precision=fp32 does "
            "not use; set precision=bf16",
        ),
        (
            (BF16, GRAPHS, "parallel.pipeline=2"),
            "kernels.cuda_graphs=true replays forwards of a whole model, and the rollouts have "
            "pipeline=2; use pipeline=1 (rollout.parallel may set it)",
        ),
        (
            (BF16, GRAPHS, "rollout.parallel=cp2"),
            "kernels.cuda_graphs=true replays forwards of a whole model, and the rollouts have "
            "context=2; use context=1 (rollout.parallel may set it)",
        ),
        (
            (BF16, "optimizer.moments=fp8"),
            "optimizer.moments=fp8 is for the distributed optimizer; set "
            "optimizer.distributed=true",
        ),
        (
            (BF16, "optimizer.main_gradients=bf16"),
            "optimizer.main_gradients=bf16 is for the distributed optimizer; set "
            "optimizer.distributed=true",
        ),
        (
            ("optimizer.offload=0.5",),
            "optimizer.offload=0.5 is for the distributed optimizer; set "
            "optimizer.distributed=true",
        ),
        (
            ("sft.iterations=1", "sft.optimizer.offload=1"),
            "sft.optimizer.offload=1 is for the distributed optimizer; set "
            "sft.optimizer.distributed=true",
        ),
        (
            (DISTRIBUTED, "optimizer.moments=bf16"),
            "optimizer.moments=bf16 is for bf16 weights, and precision=fp32; use "
            "precision=bf16 or optimizer.moments=fp32",
        ),
        (
            (DISTRIBUTED, "optimizer.offload=1"),
            "optimizer.offload=1 is for bf16 weights, and precision=fp32; use "
            "precision=bf16 or optimizer.offload=0",
        ),
        (
            (BF16, DISTRIBUTED, "optimizer.moments=bf16", "optimizer.adam_beta2=0.999"),
            "optimizer.adam_beta2=0.999 changes the second moment by less than bf16 resolves, "
            "and optimizer.moments=bf16; use at most 0.996, or optimizer.moments=fp32",
        ),
        (
            (BF16, DISTRIBUTED, "optimizer.moments=bf16", "optimizer.offload=0.25"),
            "optimizer.moments=bf16: the CPU updates only fp32 moments, and "
            "optimizer.offload=0.25; use optimizer.moments=fp32 or optimizer.offload=0",
        ),
        (
            (FP8, PRIMARY),
            "fp8.primary_weights=true needs the distributed optimizer, the only one that "
            "casts its main weights to FP8; set optimizer.distributed=true",
        ),
        (
            (FP8, PRIMARY, DISTRIBUTED, "optimizer.offload=0.5"),
            "fp8.primary_weights=true needs main weights on the GPU, and optimizer.offload=0.5; "
            "use optimizer.offload=0 or fp8.primary_weights=false",
        ),
        (
            (FP8, PRIMARY, DISTRIBUTED, "rollout.parallel=tp2"),
            "fp8.primary_weights=true: FP8 weights cannot change their layout, and "
            "rollout.parallel=tp2; use rollout.parallel=null or fp8.primary_weights=false",
        ),
        (
            (FP8, PRIMARY, DISTRIBUTED, "fp8.recipe=mxfp8", "ddp.overlap_param_gather=true"),
            "ddp.overlap_param_gather=true: mxfp8 weights are gathered in the gradient "
            "buffer, so all of them before the next forward; use ddp.overlap_param_gather=false "
            "or fp8.primary_weights=false",
        ),
        (
            (FP8, "fp8.bf16_first_layers=3", "fp8.bf16_last_layers=1"),
            "fp8.bf16_first_layers=3 and fp8.bf16_last_layers=1 leave none of model.num_layers=4 "
            "in FP8; use fewer, or precision=bf16",
        ),
        (
            (FP8, "fp8.bf16_last_layers=3", "parallel.pipeline=2"),
            "fp8.bf16_last_layers=3 is more than a stage holds: model.num_layers=4 / parallel "
            "pipeline=2; use at most 2",
        ),
        (
            (FP8, "fp8.bf16_first_layers=2", "rollout.parallel=pp4"),
            "fp8.bf16_first_layers=2 is more than a stage holds: model.num_layers=4 / "
            "rollout.parallel pipeline=4; use at most 1",
        ),
        (
            (FP8, "model.hidden_size=136"),
            "precision=fp8 needs widths divisible by 16, and model.hidden_size=136 is 136; use a "
            "smaller tensor-parallel size, other widths, or precision=bf16",
        ),
        (
            (FP8, "parallel.tensor=4", "model.hidden_size=96"),
            "precision=fp8 needs widths divisible by 16, and the attention's output of 96 / "
            "parallel tensor=4 is 24; use a smaller tensor-parallel size, other widths, or "
            "precision=bf16",
        ),
        (
            (FP8, "parallel.tensor=2", "model.hidden_size=96", "model.num_query_groups=2"),
            "",
        ),
        (
            (FP8, "model.num_attention_heads=16", "model.num_query_groups=1"),
            "",
        ),
        (
            (
                FP8,
                "model.hidden_size=64",
                "model.num_attention_heads=8",
                "model.num_query_groups=2",
                "rollout.parallel=tp4",
            ),
            "precision=fp8 needs widths divisible by 16, and query, key and value of 96 / "
            "rollout.parallel tensor=4 is 24; use a smaller tensor-parallel size, other widths, or "
            "precision=bf16",
        ),
        (
            (FP8, "model.ffn_hidden_size=320", "rollout.parallel=tp4"),
            "",
        ),
        (
            (FP8, "model.ffn_hidden_size=352", "rollout.parallel=tp4"),
            "precision=fp8 needs widths divisible by 16, and model.ffn_hidden_size=352 / "
            "rollout.parallel tensor=4 is 88; use a smaller tensor-parallel size, other widths, or "
            "precision=bf16",
        ),
        (
            (FP8, "fp8.recipe=mxfp8", "model.ffn_hidden_size=400"),
            "precision=fp8 needs widths divisible by 32, and model.ffn_hidden_size=400 is 400; use "
            "a smaller tensor-parallel size, other widths, or precision=bf16",
        ),
    ],
)
def test_a_broken_rule_is_told_in_one_line_with_the_fix(overrides, message):
    said = ""
    try:
        validate_precision(settings_of(*overrides))
    except ValueError as error:
        said = str(error)
    assert said == message


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (BF16, TE, GRAPHS, INVARIANT, "kernels.deterministic=true"),
        (BF16, GRAPHS, "parallel.pipeline=2", "rollout.parallel=tp2"),
        (FP8, "fp8.bf16_first_layers=1", "fp8.bf16_last_layers=1", TE),
        (FP8, DELAYED, NO_RL),
        (FP8, PRIMARY, DISTRIBUTED, "optimizer.moments=bf16", "optimizer.main_gradients=bf16"),
        (BF16, DISTRIBUTED, "optimizer.offload=0.5", "optimizer.main_gradients=bf16"),
        # A phase that does not run is not looked at, and neither is an unread architecture.
        (BF16, "sft.optimizer.moments=bf16"),
        (BF16, NO_RL, "sft.iterations=5", "optimizer.moments=bf16"),
        (FP8, "model.load=somewhere", "model.hidden_size=136", "fp8.bf16_first_layers=40"),
    ],
)
def test_what_fits_together_passes(overrides):
    validate_precision(settings_of(*overrides))


def test_the_rules_are_checked_with_all_others():
    with pytest.raises(ValueError, match=r"^precision=fp8 needs Transformer Engine's layers"):
        validate(settings_of("model.vocab_size=64", FP8, LOCAL))


def test_optimizers_are_those_of_the_phases():
    settings = settings_of("sft.iterations=2", "sft.optimizer.offload=1")
    assert trained_phases(settings) == ("sft", "rl")
    assert trained_phases(settings_of(NO_RL)) == ()
    found = optimizers(settings, ("rl", "sft"))
    assert {key: each.offload for key, each in found.items()} == {
        "optimizer": 0,
        "sft.optimizer": 1,
    }
