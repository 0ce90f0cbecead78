"""Rules of mixtures of experts: of the model alone, of its layout, and of the rest of the run."""

from dataclasses import fields

from agrpo_megatron.config.settings import ModelSettings, MoeSettings, ParallelSettings, Settings
from agrpo_megatron.config.values import text

# Settings of Megatron's that this project has itself, or whose computation it replaces.
_OURS = {
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    "num_moe_experts": "model.moe.experts",
    "moe_aux_loss_coeff": "sft.balance_loss",
    "moe_ffn_hidden_size": "model.moe.ffn_hidden_size",
    "moe_layer_freq": "model.moe.dense_layers",
    "moe_router_bias_update_rate": "sft.expert_bias_rate",
    "moe_router_enable_expert_bias": "model.moe.expert_bias",
    "moe_router_group_topk": "model.moe.group_topk",
    "moe_router_load_balancing_type": "sft.balance_loss",
    "moe_router_num_groups": "model.moe.groups",
    "moe_router_pre_softmax": "model.moe.normalise",
    "moe_router_score_function": "model.moe.score",
    "moe_router_topk": "model.moe.topk",
    "moe_router_topk_scaling_factor": "model.moe.scaling_factor",
    "moe_shared_expert_intermediate_size": "model.moe.shared_ffn_hidden_size",
}
_NOT_BUILT = {
    "moe_enable_routing_replay": "algorithm.rollout_experts replays experts",
    "moe_expert_capacity_factor": "no token is dropped",
    "moe_pad_expert_input_to_capacity": "no token is dropped",
    "moe_router_fusion": "the router is torch's",
    "moe_token_dropping": "no token is dropped",
    "moe_z_loss_coeff": "its loss would count by tokens, and not by examples",
}


def validate_moe(model: ModelSettings) -> None:
    """Check that experts have what they need, and that nothing is set without them.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    moe, default = model.moe, MoeSettings()
    for key, value in model.megatron.items():
        said = f"model.megatron.{key}={text(value)}"
        if key in _OURS:
            raise ValueError(f"{said} is not passed on; use {_OURS[key]}")
        if key in _NOT_BUILT:
            raise ValueError(f"{said} has no effect here: {_NOT_BUILT[key]}; leave it out")
    if moe.experts is None:
        for field in fields(MoeSettings):
            value, usual = getattr(moe, field.name), getattr(default, field.name)
            if value != usual:
                raise ValueError(
                    f"model.moe.{field.name}={text(value)} is for experts, and model.moe.experts "
                    f"is null; set it, or use model.moe.{field.name}={text(usual)}"
                )
        return
    if moe.ffn_hidden_size is None:
        raise ValueError(
            f"model.moe.experts={moe.experts} needs model.moe.ffn_hidden_size, the width of one "
            "expert; use for example 768"
        )
    if moe.topk > moe.experts:
        raise ValueError(
            f"model.moe.topk={moe.topk} is more than model.moe.experts={moe.experts}; use at most "
            f"{moe.experts}"
        )
    if moe.dense_layers >= model.num_layers:
        raise ValueError(
            f"model.moe.dense_layers={moe.dense_layers} leaves none of model.num_layers="
            f"{model.num_layers} layers for experts; use at most {model.num_layers - 1}"
        )
    _check_score(moe)
    _check_groups(moe)
    if moe.block_experts is not None:
        _check_block_experts(model, moe.block_experts)


def _check_score(moe: MoeSettings) -> None:
    if moe.expert_bias and moe.score == "softmax":
        raise ValueError(
            "model.moe.expert_bias=true is for independent scores, and model.moe.score=softmax; "
            "use sigmoid, or model.moe.expert_bias=false"
        )
    if moe.scaling_factor == 0:
        raise ValueError("model.moe.scaling_factor=0 makes every output zero; use 1.0")


def _check_groups(moe: MoeSettings) -> None:
    """Check that groups split the experts, and that a token's groups hold its experts."""
    groups, chosen, experts = moe.groups, moe.group_topk, moe.experts
    assert experts is not None
    if (groups is None) != (chosen is None):
        name, lacks = ("group_topk", "groups") if groups is None else ("groups", "group_topk")
        raise ValueError(
            f"model.moe.{name}={getattr(moe, name)} needs model.moe.{lacks}; set both, or neither"
        )
    if groups is None or chosen is None:
        return
    if experts % groups or experts // groups < 2:
        raise ValueError(
            f"model.moe.groups={groups} does not split model.moe.experts={experts} into groups of "
            "two or more; use a divisor of at most half"
        )
    if chosen > groups or chosen * (experts // groups) < moe.topk:
        raise ValueError(
            f"model.moe.group_topk={chosen} must be at most model.moe.groups={groups}, and hold "
            f"model.moe.topk={moe.topk} experts; use {groups}"
        )


def _check_block_experts(model: ModelSettings, admitted: int) -> None:
    moe = model.moe
    assert moe.experts is not None
    if not moe.topk <= admitted <= moe.experts:
        raise ValueError(
            f"model.moe.block_experts={admitted} must be from model.moe.topk={moe.topk} to "
            f"model.moe.experts={moe.experts}; use {moe.experts}, or null"
        )
    if model.attention != "block_causal":
        raise ValueError(
            f"model.moe.block_experts={admitted} is of the tokens of a block, and model.attention="
            f"{model.attention}; use null, or model.attention=block_causal"
        )
    if moe.groups is not None:
        raise ValueError(
            f"model.moe.block_experts={admitted} and model.moe.groups={moe.groups} both restrict "
            "the choice; use null for one of them"
        )


def expert_misfit(model: ModelSettings, parallel: ParallelSettings, *, at: str = "") -> str:
    """Return the broken rule between experts and layout, after its key's prefix; empty if none."""
    moe, expert, split = model.moe, parallel.expert, parallel.expert_tensor
    if moe.experts is None or moe.ffn_hidden_size is None:
        if expert > 1:
            return f"expert={expert} shares experts, and model.moe.experts is null"
        if split > 1:
            return f"expert_tensor={split} splits experts, and model.moe.experts is null"
        return ""
    if moe.experts % expert:
        return f"expert={expert} does not divide model.moe.experts={moe.experts}"
    if split not in (1, parallel.tensor):
        return f"expert_tensor={split} is neither 1 nor {at}tensor={parallel.tensor}"
    if moe.ffn_hidden_size % split:
        return (
            f"expert_tensor={split} does not divide model.moe.ffn_hidden_size={moe.ffn_hidden_size}"
        )
    shared = moe.shared_ffn_hidden_size
    if shared is not None and shared % parallel.tensor:
        return f"tensor={parallel.tensor} does not divide model.moe.shared_ffn_hidden_size={shared}"
    if parallel.tensor > 1 and not parallel.sequence:
        return (
            f"sequence=false with {at}tensor={parallel.tensor}: Megatron's experts need sequence "
            "parallelism next to tensor parallelism (sp)"
        )
    if expert > 1 and parallel.virtual > 1:
        return (
            f"expert={expert} with {at}virtual={parallel.virtual}: ranks of different replicas "
            "would meet in different layers"
        )
    return ""


def expert_rank_misfit(parallel: ParallelSettings, world_size: int) -> str:
    """Return the broken rule between expert parallelism and the ranks; empty if none."""
    ranks = world_size // parallel.pipeline
    size = parallel.expert * parallel.expert_tensor
    if ranks % size:
        return (
            f"expert={parallel.expert} x expert_tensor={parallel.expert_tensor} does not divide "
            f"the {ranks} ranks of a pipeline stage"
        )
    return ""


def validate_experts(settings: Settings) -> None:
    """Check that the rest of the run fits experts.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    if settings.algorithm.rollout_experts is not None:
        _check_rollout_experts(settings)
    if settings.model.is_known:
        _check_balance(settings)
    if settings.model.moe.experts is None:
        return
    if settings.kernels.cuda_graphs:
        raise ValueError(
            "kernels.cuda_graphs=true repeats the shapes of one forward pass, and the counts of an "
            "expert's tokens change; use false"
        )
    layout = settings.rollout_layout
    if layout.expert > 1 and layout.pipeline > 1 and settings.rollout.schedule == "lockstep":
        raise ValueError(
            "rollout.schedule=lockstep runs all groups of a replica at once, and replicas that "
            f"share experts by ep{layout.expert} run theirs together; use ring"
        )


def _check_balance(settings: Settings) -> None:
    """Check that what balances experts in the supervised phase has experts, or their biases."""
    moe, sft = settings.model.moe, settings.sft
    if sft.balance_loss and moe.experts is None:
        raise ValueError(
            f"sft.balance_loss={sft.balance_loss:g} is for experts, and model.moe.experts is null; "
            "use 0"
        )
    if sft.expert_bias_rate and not moe.expert_bias:
        raise ValueError(
            f"sft.expert_bias_rate={sft.expert_bias_rate:g} moves the biases of experts, and "
            "model.moe.expert_bias=false; use 0, or model.moe.expert_bias=true"
        )


def _check_rollout_experts(settings: Settings) -> None:
    """Check that the experts of rollouts are kept, and that states of rollouts are scored."""
    algorithm, model = settings.algorithm, settings.model
    said = f"algorithm.rollout_experts={algorithm.rollout_experts}"
    if model.is_known and model.moe.experts is None:
        raise ValueError(f"{said} is for experts, and model.moe.experts is null; use null")
    if settings.train.from_rollouts is not None:
        raise ValueError(
            f"{said} needs the choice of experts in rollouts, which train.from_rollouts="
            f"{settings.train.from_rollouts} does not have; use algorithm.rollout_experts=null"
        )
    if settings.checkpoint.rollouts:
        raise ValueError(
            f"{said} needs the choice of experts in rollouts, which rollouts that "
            "checkpoint.rollouts=true stores do not have; use checkpoint.rollouts=false"
        )
    if algorithm.filled.prompt_mask:
        raise ValueError(
            f"{said} is for prompts that the sampler saw, and algorithm.prompt_mask="
            f"{algorithm.prompt_mask:g} masks some of them; use 0"
        )
    if settings.parallel.pipeline > 1 and "moe" in model.megatron.get("recompute_modules", ()):
        raise ValueError(
            f"{said} is not known to layers that model.megatron.recompute_modules=[moe] computes "
            f"again with parallel.pipeline={settings.parallel.pipeline}; use "
            "recompute_granularity=full"
        )
