"""A model of plain torch modules under its family's published names, for the PEFT library."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.lora import linear_layers
from agrpo_megatron.megatron.layers.router import choose, scores_of, weigh
from tests.megatron.literal import _attention, _norm, literal_logits


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
                if kind == "weight":
                    self._add(owner, nn.Module())
                parameter = nn.Parameter(torch.empty(shape))
                self.get_submodule(owner).register_parameter(kind, parameter)
        self._names = self._llada_names(model)
        assert not self.load_state_dict(tensors).unexpected_keys

    def _llada_names(self, model: ModelSettings) -> dict[str, str]:
        """Return our names by LLaDA's, which the literal transformer has."""
        llada = weight_mappings(replace(model, family="llada"))
        pairs = zip(llada, weight_mappings(model), strict=True)
        return {
            theirs.rpartition(".")[0]: ours.rpartition(".")[0]
            for published, own in pairs
            for theirs, ours in zip(published.parts, own.parts, strict=True)
        }

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


class PlainExperts(PlainModel):
    """The same with experts, each token through its own ones."""

    def _llada_names(self, model: ModelSettings) -> dict[str, str]:
        self._parts = {mapping.megatron: mapping.parts for mapping in weight_mappings(model)}
        return {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [T, V] of one row of tokens [T]."""
        model = self.settings
        x = self._output("embedding.word_embeddings", tokens)
        for number in range(model.num_layers):
            layer = f"decoder.layers.{number}."
            normed = _norm(x, self._tensor(f"{layer}input_layernorm.weight"), model)
            fused = self._output(f"{layer}self_attention.linear_qkv", normed)
            sizes = [model.query_width, model.key_width, model.key_width]
            flat = dict(zip("qkv", fused.split(sizes, -1), strict=True))
            norms = {
                name: self._tensor(f"{layer}self_attention.{name}_layernorm.weight")
                for name in "qk"
            }
            attended = _attention(flat, norms, model, None)
            x = x + self._output(f"{layer}self_attention.linear_proj", attended)
            normed = _norm(x, self._tensor(f"{layer}pre_mlp_layernorm.weight"), model)
            x = x + self._mlp(f"{layer}mlp.", normed)
        x = _norm(x, self._tensor("decoder.final_layernorm.weight"), model)
        return self._output("output_layer", x)

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        if f"{prefix}linear_fc1.weight" in self._parts:
            return self._swiglu(prefix, x)
        moe, bias = self.settings.moe, f"{prefix}router.expert_bias"
        scores = scores_of(x @ self._tensor(f"{prefix}router.weight").T, moe)
        own = self._tensor(bias) if bias in self._parts else None
        chosen = choose(scores, moe, bias=own)
        weights = weigh(scores, chosen, moe)
        result = torch.zeros_like(x)
        if moe.shared_ffn_hidden_size is not None:
            result = self._swiglu(f"{prefix}shared_experts.", x)
        for expert in range(moe.experts or 0):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            output = self._swiglu(f"{prefix}experts.local_experts.{expert}.", x[rows])
            result = result.index_add(0, rows, weights[rows, places, None].to(x.dtype) * output)
        return result

    def _swiglu(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self._output(f"{prefix}linear_fc1", x).chunk(2, -1)
        return self._output(f"{prefix}linear_fc2", F.silu(gate) * up)

    def _output(self, name: str, x: Tensor) -> Tensor:
        owners = [part.rpartition(".")[0] for part in self._parts[f"{name}.weight"]]
        return torch.cat([self.get_submodule(owner)(x) for owner in owners], -1)

    def _tensor(self, name: str) -> Tensor:
        return self.get_parameter(self._parts[name][0])


def random_(model: nn.Module, names: tuple[str, ...], scale: float, seed: int = 0) -> None:
    """Draw the parameters whose names have one of the parts; mutates them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(part in name for part in names):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * drawn)
