"""The tensors of a model: every line of its family's table, and their shapes in both worlds."""

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES
from agrpo_megatron.families.names import Line, expand


def lines(model: ModelSettings) -> list[Line]:
    """Return one line for each Megatron parameter of the whole model."""
    return expand(FAMILIES[model.family].lines(model), model.num_layers)


def hf_shapes(model: ModelSettings) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and transform of every Hugging Face tensor, by name."""
    hidden, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    assert model.vocab_size is not None
    heights = {"q": hidden, "k": groups * head, "v": groups * head}
    matrices = {
        "vocab": (model.vocab_size, hidden),
        "gate_up": (model.ffn_hidden_size, hidden),
        "row": (hidden, hidden),
    }
    result: dict[str, tuple[tuple[int, ...], str]] = {}
    for line in lines(model):
        for number, name in enumerate(line.parts):
            if line.transform == "qkv":
                rows = heights["qkv"[number]]
                shape = (rows, hidden) if name.endswith("weight") else (rows,)
            elif line.transform == "copy":
                per_head = "q_layernorm" in line.megatron or "k_layernorm" in line.megatron
                shape = (head if per_head else hidden,)
            elif line.megatron.endswith("linear_fc2.weight"):
                shape = (hidden, model.ffn_hidden_size)
            else:
                shape = matrices[line.transform]
            result[name] = (shape, line.transform)
    return result


def megatron_shape(line: Line, shapes: dict[str, tuple[tuple[int, ...], str]]) -> tuple[int, ...]:
    """Return the shape of the whole Megatron parameter that a line's parts make."""
    parts = [shapes[name][0] for name in line.parts]
    return (sum(part[0] for part in parts), *parts[0][1:])
