"""Settings of mixtures of experts."""

from dataclasses import dataclass

from agrpo_megatron.config.schema import setting


@dataclass(frozen=True)
class MoeSettings:
    """Experts in place of the SwiGLU: a router sends each token to a few of them.

    Every token reaches all its experts: none is dropped.
    """

    experts: int | None = setting(
        None, "experts of a layer; null: every layer has one SwiGLU", low=2
    )
    topk: int = setting(2, "experts of a token", low=1)
    ffn_hidden_size: int | None = setting(
        None, "width of an expert's hidden layer; null without experts", low=1
    )
    shared_ffn_hidden_size: int | None = setting(
        None,
        "hidden width of the shared experts, which see all tokens, together; null: none",
        low=1,
    )
    dense_layers: int = setting(0, "first layers that have a SwiGLU in place of experts", low=0)
    score: str = setting(
        "softmax", "what the router makes of its logits", choices=("softmax", "sigmoid")
    )
    normalise: bool = setting(True, "the weights of a token's experts add up to scaling_factor")
    scaling_factor: float = setting(1.0, "factor of the experts' weights", low=0)
    expert_bias: bool = setting(
        False, "a bias of each expert, which is added to scores for the choice and not for weights"
    )
    groups: int | None = setting(
        None, "groups of experts, of which a token chooses group_topk first; null: none", low=2
    )
    group_topk: int | None = setting(
        None, "groups of a token, of the largest sums of two scores; null without groups", low=1
    )
    block_experts: int | None = setting(
        None,
        "experts that a block admits, by the largest score of its tokens; its tokens choose among "
        "them (LLaDA2.2). null: all",
        low=1,
    )
