"""Settings of low-rank adapters."""

from dataclasses import dataclass

from agrpo_megatron.config.schema import setting


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: weights are frozen, and products of two small matrices are trained."""

    rank: int | None = setting(None, "rank of the adapters; null: all weights are trained", low=1)
    alpha: float = setting(64.0, "the adapters' product is scaled by alpha / rank", low=0)
    rank_stabilised: bool = setting(False, "scale by alpha / sqrt(rank) instead (rsLoRA)")
    dropout: float = setting(0.0, "dropout of the adapters' inputs in updates", low=0, high=0.99)
    modules: list[str] | None = setting(
        None,
        "layers that get adapters, by the family's published names: q_proj, blocks.0.*; null: all "
        "linear layers of the blocks. As in PEFT, ff_out is also the name of LLaDA's head",
    )
    train_embedding: bool = setting(False, "also train the whole embedding")
    train_head: bool = setting(False, "also train the whole head")
    load: str | None = setting(None, "folder of adapters in PEFT's format to start from")
    merge_rollouts: bool = setting(
        False,
        "add the adapters to the weights for rollouts: faster, and a copy of the adapted weights "
        "is kept; else rollouts apply them as updates do",
    )

    @property
    def scale(self) -> float:
        """Return the factor of the adapters' product."""
        assert self.rank is not None
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
