"""The linear layers of a family that may have low-rank adapters, by their published names."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from agrpo_megatron.config.settings import LoraSettings, ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.tensors import LAYER, WeightMapping

LINEAR = ("qkv", "fused_qkv", "row", "gate_up")  # transforms of the linear layers within a block
MATRICES = ("lora_A", "lora_B")
HEAD, EMBEDDING = "output_layer", "word_embeddings"


@dataclass(frozen=True)
class Linear:
    """A published linear layer."""

    name: str
    outputs: int
    inputs: int
    mapping: WeightMapping  # of the Megatron parameter that holds its weight, alone or with others

    @property
    def is_split_by_inputs(self) -> bool:
        """Whether tensor parallelism splits its inputs; else its outputs."""
        return self.mapping.transform == "row"

    @property
    def is_expert(self) -> bool:
        """Whether it is of one expert; shared experts, which see all tokens, are not."""
        return self.mapping.expert is not None

    @property
    def is_head(self) -> bool:
        """Whether it is the head."""
        return self.mapping.module == HEAD


def tensor_name(linear: Linear, matrix: str) -> str:
    """Return the name of an adapter's tensor, as PEFT has it within the model."""
    return f"{linear.name}.{matrix}.weight"


def linear_layers(model: ModelSettings) -> list[Linear]:
    """Return the linear layers of a model, the head last."""
    shapes = hf_shapes(model)
    return [
        Linear(name.removesuffix(".weight"), shapes[name][0], shapes[name][1], mapping)
        for mapping in weight_mappings(model)
        if (mapping.transform in LINEAR and mapping.megatron.endswith("weight"))
        or mapping.module == HEAD
        for name in mapping.parts
    ]


def adapted_layers(model: ModelSettings, lora: LoraSettings) -> list[Linear]:
    """Return the layers that get adapters.

    A pattern names a layer by its whole name or by the end of it, from a dot on; `*` is any text.

    Raises:
        ValueError: a pattern names no layer, or the head, which is trained whole.
    """
    layers = linear_layers(model)
    if lora.modules is None:
        return [layer for layer in layers if not layer.is_head]
    for pattern in lora.modules:
        if not any(_is_named(layer.name, pattern) for layer in layers):
            raise ValueError(
                f"lora.modules: {pattern} names no linear layer of the {model.family} family; use "
                f"{', '.join(_nearest(pattern, layers))}"
            )
    named = [layer for layer in layers if any(_is_named(layer.name, each) for each in lora.modules)]
    if lora.train_head and named[-1].is_head:
        raise ValueError(
            f"lora.modules={lora.modules} names the head {named[-1].name}, which "
            "lora.train_head=true trains whole; leave it out of lora.modules, or use "
            "lora.train_head=false"
        )
    return named


def check_stages(model: ModelSettings, lora: LoraSettings, stages: Sequence[int]) -> None:
    """Check that every virtual pipeline stage has something to train.

    Args:
        stages: layers of each stage, in order.

    Raises:
        ValueError: one has no adapter.
    """
    names = {layer.mapping.megatron for layer in adapted_layers(model, lora)}
    places = {found[1] if (found := LAYER.match(name)) else "head" for name in names}
    start = 0
    for number, count in enumerate(stages):
        held = {str(layer) for layer in range(start, start + count)}
        if number == len(stages) - 1:
            held.add("head")
        if not held & places:
            raise ValueError(
                f"lora.modules={lora.modules} names nothing in layers {start} to "
                f"{start + count - 1}, which are a pipeline stage; name a layer of each stage, or "
                "use fewer stages"
            )
        start += count


def trained_whole(model: ModelSettings, lora: LoraSettings) -> dict[str, str]:
    """Return the tensors that are trained whole: Hugging Face names, by Megatron's."""
    wanted = {EMBEDDING: lora.train_embedding, HEAD: lora.train_head}
    modules = [name for name, is_trained in wanted.items() if is_trained]
    return {m.megatron: m.parts[0] for m in weight_mappings(model) if m.module in modules}


def _is_named(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _nearest(pattern: str, layers: Sequence[Linear]) -> list[str]:
    """Return the ends of all layers' names, the nearest first."""
    ends = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    return difflib.get_close_matches(pattern.rpartition(".")[2], ends, n=len(ends), cutoff=0.0)
