"""This rank's part of a model: its virtual stages, its ranks, its part of the vocabulary."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from agrpo_megatron.config.parallel import padded_vocab
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.families.tensors import FUSED_NORMS, LAYER
from agrpo_megatron.megatron.lora.adapters import Adapters, Held
from agrpo_megatron.megatron.model import MaskedDiffusionModel, build_chunks, expert_biases
from agrpo_megatron.megatron.parallel import Ranks

LOCAL_NAMES = {fused: local for local, fused in FUSED_NORMS.items()}


@dataclass(frozen=True)
class Network:
    """The virtual stages of one rank; the ranks of a replica hold the whole model together."""

    chunks: tuple[MaskedDiffusionModel, ...]
    ranks: Ranks
    vocab: Vocabulary  # the logit columns of this rank
    has_graphs: bool = False  # whether rollouts run as CUDA graphs
    adapters: Adapters | None = None  # what is trained in place of the weights
    is_reference: bool = False  # whether it is the frozen model, without its adapters

    @property
    def config(self) -> TransformerConfig:
        """Return Megatron's settings, which all virtual stages share."""
        return self.chunks[0].config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters by their local-spec names, with global numbers."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                yield _global_name(name, chunk), parameter

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters, and the biases of experts, which no gradient trains."""
        yield from self.named_parameters()
        for chunk in self.chunks:
            for name, bias in expert_biases(chunk):
                yield _global_name(name, chunk), bias

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank that are not frozen."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def for_updates(self) -> None:
        """Make forward passes compute what updates train, or the frozen model if it is that."""
        if self.adapters is not None:
            use = self.adapters.switch_off if self.is_reference else self.adapters.for_updates
            use()

    def for_rollouts(self) -> None:
        """Make forward passes compute the policy, the fastest way that was chosen."""
        if self.adapters is not None:
            self.adapters.for_rollouts()

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
    chunks, adapters = build_chunks(settings, ranks), None
    if settings.lora.rank is not None:
        adapters = Adapters(_held(chunks), model, settings.lora, ranks)
    return Network(chunks, ranks, vocab, settings.kernels.cuda_graphs, adapters)


def _held(chunks: Sequence[MaskedDiffusionModel]) -> Held:
    """Return the modules of this rank's matrices, and their virtual stages."""
    return {
        _global_name(name, chunk): (chunk.get_submodule(name.rpartition(".")[0]), chunk)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.dim() == 2
    }


def _global_name(name: str, chunk: MaskedDiffusionModel) -> str:
    """Return a weight's local-spec name, with the numbers of layer and expert in the whole model.

    Transformer Engine's grouped experts number the weights of one module.
    """
    if not (found := LAYER.match(name)):
        return name
    number = chunk.decoder.layers[int(found[1])].layer_number - 1  # type: ignore[operator]
    rest = LOCAL_NAMES.get(found[2], found[2])
    if expert := _EXPERT.fullmatch(rest):
        held = chunk.first_expert + int(expert[1] or expert[4])
        rest = f"mlp.experts.local_experts.{held}.{expert[2] or expert[3]}.weight"
    return f"decoder.layers.{number}.{rest}"


_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc\d)\.weight|(linear_fc\d)\.weight(\d+))"
)
