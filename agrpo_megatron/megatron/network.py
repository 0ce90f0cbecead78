"""This rank's part of a model: its virtual stages, its ranks, its part of the vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from agrpo_megatron.config.parallel import padded_vocab
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.families.tensors import FUSED_NORMS, LAYER
from agrpo_megatron.megatron.model import MaskedDiffusionModel, build_chunks
from agrpo_megatron.megatron.parallel import Ranks

LOCAL_NAMES = {fused: local for local, fused in FUSED_NORMS.items()}


@dataclass(frozen=True)
class Network:
    """The virtual stages of one rank; the ranks of a replica hold the whole model together."""

    chunks: tuple[MaskedDiffusionModel, ...]
    ranks: Ranks
    vocab: Vocabulary  # the logit columns of this rank
    has_graphs: bool = False  # whether rollouts run as CUDA graphs

    @property
    def config(self) -> TransformerConfig:
        """Return Megatron's settings, which all virtual stages share."""
        return self.chunks[0].config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters by their local-spec names, with global layer numbers."""
        for chunk in self.chunks:
            layers = chunk.decoder.layers
            for name, parameter in chunk.named_parameters():
                if found := LAYER.match(name):
                    number = layers[int(found[1])].layer_number - 1  # type: ignore[operator]
                    name = f"decoder.layers.{number}.{LOCAL_NAMES.get(found[2], found[2])}"
                yield name, parameter

    def set_training(self, mode: str) -> None:
        """Switch all virtual stages to `train` or `eval`."""
        for chunk in self.chunks:
            chunk.train(mode == "train")

    def renew_casts(self) -> None:
        """Make the next forward cast the weights to FP8 again, as they may have changed.

        Transformer Engine caches its casts. Megatron's schedules renew them with the first
        micro-batch; code that calls the chunks directly must call this.
        """
        for chunk in self.chunks:
            chunk.set_is_first_microbatch()


def build_network(settings: Settings, ranks: Ranks) -> Network:
    """Build this rank's part of the model, without weights; called by every rank."""
    model = settings.model
    assert model.vocab_size is not None and model.mask_token_id is not None
    width = padded_vocab(settings) // ranks.tensor.size
    vocab = Vocabulary(
        size=model.vocab_size,
        start=ranks.tensor.rank * width,
        forbidden=(model.mask_token_id,) if settings.sampling.forbid_mask_token else (),
        group=ranks.tensor.group,
    )
    return Network(build_chunks(settings, ranks), ranks, vocab, settings.kernels.cuda_graphs)
