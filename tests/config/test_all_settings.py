"""Every setting of the schema, changed: the resolved settings have it, or one line says why not."""

import dataclasses
from typing import Any

import pytest

from agrpo_megatron.config.schema import describe, flatten, load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import dump_yaml
from agrpo_megatron.runs.resolve import resolve

SMALL = {
    "task": {"name": "countdown", "train_problems": 8, "eval_problems": 4},
    "model": {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 96},
    "sampling": {"completion_length": 12, "block_length": 4, "denoising_steps": 6},
    "algorithm": {"mc_samples": 2},
}
LINES = {line.key: line for line in describe(Settings)}
WHOLE = {key for key, line in LINES.items() if isinstance(line.default, dict)}
# Another value than a kind's usual one, where that one does not fit the small run.
CHANGED: dict[str, Any] = {
    "model.hidden_size": 48,
    "model.num_attention_heads": 2,
    "model.vocab_size": 97,
    "model.num_query_groups": 2,
    "model.head_dim": 6,
    "model.block_length": 6,
    "model.rope_factor": 4.0,
    "model.megatron": {"attention_dropout": 0.1},
    "tokenizer.chat_template": "plain",
    "model.moe.experts": 4,
    "model.moe.groups": 2,
    "model.moe.block_experts": 2,
    "model.rotary_fraction": 0.5,
    "parallel.virtual": 2,
    "parallel.layers": [3, 1],
    "rollout.parallel": "tp2",
    "task.name": "countdown",
    "task.options": {"numbers": 3},
    "task.mixture": {"sudoku": {"weight": 2.0}},
    "task.prompt_tokens": 90,
    "sft.data": "chats.jsonl",
    "sft.columns": {"messages": "chat"},
    "sft.block_schedule": ["2x1", "fullx3"],
    "sft.preferences.label_smoothing": 0.1,
    "optimizer.megatron": {"adam_eps": 1e-6},
    "sft.optimizer.megatron": {"adam_eps": 1e-6},
    "optimizer.min_learning_rate": 1e-5,
    "sft.optimizer.min_learning_rate": 1e-5,
    "sampling.completion_length": 24,
    "sampling.block_length": 6,
    "sampling.denoising_steps": 9,
    "evaluation.denoising_steps": 9,
    "evaluation.block_length": 6,
    "ddp": {"overlap_grad_reduce": True},
    "algorithm.name": "espo",
    "algorithm.mc_samples": "auto",
    "algorithm.auto_share": 0.5,
    "algorithm.loss": "reinforce",
    "algorithm.rollout_correction": 2.0,
    "train.async_steps": 1,
    "train.flops": 1e12,
    "train.stop_metric": "accuracy",
    "evaluation.tasks": {"sudoku": {}},
    "lora.modules": ["q_proj"],
    "checkpoint.best": "reward/mean",
    "resilience.timeouts": {"rollout": 5},
    "launch.time": "04:00:00",
}
USUAL = {"an integer": 3, "a number": 0.75, "text": "other", "a list of integers": [1, 2]}
USUAL["true or false"] = True
USUAL |= {"a list of texts": ["--reservation=x"]}
BY_CONFIDENCE = ["sampling.unmasking=low_confidence"]
EDITS = ["model.attention=block_causal", "model.block_length=4", "sampling.block_origin=row"]
EXPERTS = ["model.moe.experts=4", "model.moe.ffn_hidden_size=16"]
PAIRS = ["sft.loss=vrpo", "sft.data=pairs.jsonl", "sft.iterations=1"]
# What else a setting needs, by its key, or by key=value.
NEEDS = {
    **{
        f"model.moe.{name}": EXPERTS
        for name in (
            *("experts", "topk", "ffn_hidden_size", "shared_ffn_hidden_size", "dense_layers"),
            *("score", "normalise", "scaling_factor"),
        )
    },
    "model.moe.expert_bias": [*EXPERTS, "model.moe.score=sigmoid"],
    "model.moe.groups": [*EXPERTS, "model.moe.group_topk=2"],
    "model.moe.group_topk": [*EXPERTS, "model.moe.experts=12", "model.moe.groups=6"],
    "model.moe.block_experts": [
        *EXPERTS,
        "model.attention=block_causal",
        "model.block_length=4",
    ],
    "algorithm.rollout_experts": [*EXPERTS, "checkpoint.rollouts=false"],
    "parallel.expert": EXPERTS,
    "sft.data": ["sft.iterations=0"],
    "sft.loss": PAIRS[1:],
    **{
        f"sft.preferences.{name}": PAIRS
        for name in ("beta", "masks", "states", "shared_masks", "label_smoothing", "chosen_weight")
    },
    "sft.balance_loss": EXPERTS,
    "sft.format": ["sft.data=chats.jsonl", "sft.iterations=0"],
    "sft.anneal_iterations": ["sft.iterations=9"],
    "sft.block_schedule": ["sft.iterations=9"],
    "sft.expert_bias_rate": [*EXPERTS, "model.moe.score=sigmoid", "model.moe.expert_bias=true"],
    "parallel.expert_tensor": [*EXPERTS, "parallel.tensor=2", "parallel.sequence=true"],
    **{
        f"model.attention={kind}": ["model.block_length=4"]
        for kind in ("block_causal", "causal_context")
    },
    "model.block_length": ["model.attention=block_causal", "sampling.block_length=6"],
    "model.rope_scaling=llama3": ["model.rope_original_length=64", "model.rope_factor=4"],
    "model.tie_embeddings": ["model.family=llama"],
    "model.rope_original_length": ["model.query_scale_beta=0.5"],
    **{
        f"model.{name}": ["model.rope_original_length=64"]
        for name in ("rope_factor", "query_scale_beta")
    },
    **{
        f"model.rope_beta_{name}": ["model.rope_original_length=64", "model.rope_factor=4"]
        for name in ("fast", "slow")
    },
    "fp8.recipe": ["precision=fp8"],
    "fp8.recipe=delayed": ["precision=fp8", "train.iterations=0"],
    "fp8.bf16_first_layers": ["precision=fp8", "model.num_layers=6"],
    "fp8.bf16_last_layers": ["precision=fp8", "model.num_layers=6"],
    "fp8.primary_weights": ["precision=fp8", "optimizer.distributed=true"],
    "kernels.layer_spec=te": ["precision=bf16"],
    "sft.autoregressive_weight": ["model.attention=causal_context", "model.block_length=4"],
    **{
        f"lora.{name}": ["lora.rank=4"]
        for name in ("alpha", "rank_stabilised", "dropout", "modules", "load")
    },
    **{
        f"lora.{name}": ["lora.rank=4"]
        for name in ("train_embedding", "train_head", "merge_rollouts")
    },
    "train.async_steps": ["algorithm.rollout_correction=2"],
    "rollout.cached": ["model.attention=block_causal", "model.block_length=4"],
    "rollout.cache_memory": ["model.attention=block_causal", "model.block_length=4"],
    "kernels.block_attention": ["model.attention=block_causal", "model.block_length=4"],
    "kernels.batch_invariant": ["precision=bf16"],
    "kernels.cuda_graphs": ["precision=bf16"],
    "parallel.sequence": ["parallel.tensor=2"],
    "parallel.virtual": ["parallel.pipeline=2"],
    "parallel.layers": ["parallel.pipeline=2"],
    "task.mixture": ["task.name=mixture"],
    "sampling.schedule=dream": ["sampling.block_length=12"],
    "sampling.record_drawn": BY_CONFIDENCE,
    "sampling.position_temperature": ["sampling.unmasking=entropy"],
    "sampling.edit_threshold": EDITS,
    "sampling.edit_steps": [*EDITS, "sampling.edit_threshold=0.5"],
    "sampling.unmasking=bernoulli": ["sampling.schedule=dream", "sampling.block_length=12"],
    "evaluation.unmasking=bernoulli": ["sampling.schedule=dream", "sampling.block_length=12"],
    "train.stop_metric": ["train.stop_patience=2"],
    "train.stop_target": ["train.stop_metric=accuracy"],
    "train.stop_patience": ["train.stop_metric=accuracy"],
}
ON_MASKS, ALL_HIDDEN = (
    ["algorithm.mc_samples=null", f"algorithm.name={name}"] for name in ("unigrpo", "diffu_grpo")
)
DIVIDED = ["algorithm.scale_by_std=true"]
NEEDS |= {
    "algorithm.auto_share": ["algorithm.mc_samples=auto"],
    "algorithm.merge_steps": ["algorithm.mc_samples=null", "algorithm.name=tracerl"],
    "algorithm.scoring=augmented": [*BY_CONFIDENCE, "sampling.record_drawn=true"],
    "algorithm.scoring=positions": [
        "sampling.unmasking=entropy",
        "sampling.position_temperature=0.5",
    ],
    "algorithm.states": ON_MASKS,
    "algorithm.states=coupled_and_full": [*ON_MASKS, "algorithm.normaliser=tokens"],
    "algorithm.mask_low": ON_MASKS,
    "algorithm.mask_high": ON_MASKS,
    "algorithm.prompt_mask": ALL_HIDDEN,
    "algorithm.tail": ON_MASKS,
    "algorithm.cut_tail": ON_MASKS,
    "sampling.policy=approximate": ["algorithm.rollout_correction=2"],
    "algorithm.enumerate_short": ["algorithm.step_sampler=systematic"],
    "algorithm.least_probability": ["algorithm.name=rldf"],
    "algorithm.loss=preference": ["algorithm.name=vrpo"],
    "algorithm.length_scale": ["algorithm.level=sequence"],
    "algorithm.normaliser": ON_MASKS,
    "algorithm.normaliser=all_steps": [],
    "algorithm.normaliser_constant": ["algorithm.normaliser=constant"],
    **{f"algorithm.std_{key}": DIVIDED for key in ("degrees", "epsilon", "floor")},
    "algorithm.softmax_negative": ["algorithm.softmax=group"],
    "algorithm.preference_beta": ["algorithm.name=vrpo"],
    **{f"algorithm.bound{key}": ["algorithm.name=spg"] for key in ("", "_share", "_power")},
}
SHARDED = ["precision=bf16", "optimizer.distributed=true", "sft.optimizer.distributed=true"]
NEEDS |= {
    f"{section}.{name}": SHARDED
    for section in ("optimizer", "sft.optimizer")
    for name in ("moments", "main_gradients", "offload")
}
# Refused in the small run, with the reason.
REFUSED = {
    "model.load=other": "is not a directory",
    "tokenizer.path=other": "does not exist",
    "task.pass_rates=other": "cannot be read",
    "model.attention=causal": "a run decodes masked tokens; use full, or block_causal",
    "lora.load=other": "is not a directory",
}
RANKS = {f"parallel.{n}" for n in ("tensor", "pipeline", "context", "data", "expert")}
RANKS.add("parallel.expert_tensor")


def _others(line):
    """Return values that differ from the default: every choice, or one value."""
    if line.key in CHANGED:
        return [CHANGED[line.key]]
    if line.choices:
        return [choice for choice in line.choices if choice != line.default]
    if isinstance(line.default, bool):
        return [not line.default]
    if line.key in RANKS:
        return [2]
    if isinstance(line.default, int | float) and line.default > 1:
        return [line.default + 1]
    return [USUAL[line.type.removesuffix(" or null")]]


@pytest.mark.parametrize("key", LINES)
def test_a_changed_setting_is_resolved_as_written_or_refused(tmp_path, key):
    for value in _others(LINES[key]):
        said = f"{key}={value}"
        tree = {name: dict(section) for name, section in SMALL.items()}
        path = tmp_path / "settings.yaml"
        path.write_text(dump_yaml(tree))
        more = NEEDS.get(said, NEEDS.get(key, []))
        override = f"{key}={dump_yaml(value)}"
        if said in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[said]) as error:
                resolve(load(Settings, path, [*more, override]), world_size=2)
            assert said in str(error.value) and "\n" not in str(error.value)
            continue
        settings = resolve(load(Settings, path, [*more, override]), world_size=2).settings
        found = flatten(dataclasses.asdict(settings), whole=WHOLE)
        assert value != LINES[key].default and found[key] == value
        path.write_text(dump_yaml(dataclasses.asdict(settings)))
        assert resolve(load(Settings, path), world_size=2).settings == settings
