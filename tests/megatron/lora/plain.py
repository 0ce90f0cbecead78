"""A model of plain torch modules under its family's published names, for the PEFT library."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.lora import linear_layers
from tests.megatron.literal import literal_logits


class PlainModel(nn.Module):
    """The literal transformer; its linear layers and its embedding are torch's, as published.

    Args:
        tensors: its weights, by their published names.
    """

    def __init__(self, model: ModelSettings, tensors: dict[str, Tensor]):
        super().__init__()
        self.settings = model
        linear = {layer.name for layer in linear_layers(model)}
        embedding = weight_mappings(model)[0].parts[0]
        for name, shape in hf_shapes(model).items():
            owner, _, kind = name.rpartition(".")
            if owner in linear and kind == "weight":
                has_bias = f"{owner}.bias" in tensors
                self._add(owner, nn.Linear(shape[1], shape[0], bias=has_bias))
            elif name == embedding:
                self._add(owner, nn.Embedding(*shape))
            elif owner not in linear:
                norm = nn.Module()
                norm.register_parameter("weight", nn.Parameter(torch.empty(shape)))
                self._add(owner, norm)
        # The literal transformer has LLaDA's names.
        llada = weight_mappings(replace(model, family="llada"))
        pairs = zip(llada, weight_mappings(model), strict=True)
        self._names = {
            theirs.rpartition(".")[0]: ours.rpartition(".")[0]
            for published, own in pairs
            for theirs, ours in zip(published.parts, own.parts, strict=True)
        }
        assert not self.load_state_dict(tensors).unexpected_keys

    def _add(self, name: str, module: nn.Module) -> None:
        *path, last = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, module)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [T, V] of one row of tokens [T]."""
        modules = {theirs: self.get_submodule(ours) for theirs, ours in self._names.items()}
        norms = {
            f"{name}.weight": module.weight
            for name, module in modules.items()
            if name.endswith(("norm", "ln_f"))
        }
        return literal_logits(norms, self.settings, tokens, layer=lambda name, x: modules[name](x))


def random_(model: nn.Module, names: tuple[str, ...], scale: float, seed: int = 0) -> None:
    """Draw the parameters whose names have one of the parts; mutates them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(part in name for part in names):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * drawn)
