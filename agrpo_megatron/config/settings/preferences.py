"""Settings of preference pairs in the supervised phase."""

from dataclasses import dataclass

from agrpo_megatron.config.schema import setting


@dataclass(frozen=True)
class PreferenceSettings:
    """VRPO: learn from pairs of a chosen and a rejected answer (sft.loss=vrpo)."""

    beta: float = setting(0.2, "scale of the log-ratio to the frozen start", low=1e-9)
    masks: int = setting(8, "masks in the estimate of a text's log-likelihood (ELBO)", low=1)
    states: str = setting(
        "counts",
        "how many tokens a mask hides: spread evenly from one to all over the masks, or drawn for "
        "each mask on its own (as published)",
        choices=("counts", "random_count"),
    )
    shared_masks: bool = setting(
        True, "policy and reference score the same masks (false: for studies of the variance)"
    )
    label_smoothing: float = setting(
        0.0,
        "assumed share of pairs with swapped labels (conservative DPO)",
        low=0,
        high=0.5,
    )
    chosen_weight: float = setting(
        0.0, "weight of the cross-entropy of the chosen text, per token (RPO)", low=0
    )
