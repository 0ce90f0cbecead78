"""Nemotron-Labs-Diffusion's config.json, and a small random checkpoint in the published form."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

ROPE = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
}
# Source: config.json of nvidia/Nemotron-Labs-Diffusion-3B.
PUBLISHED = {
    "ar_loss_weight": 1.0,
    "architectures": ["NemotronLabsDiffusionModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "sdpa",
    "auto_map": {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    },
    "block_size": 32,
    "bos_token_id": 1,
    "dlm_loss_weight": None,
    "dlm_paradigm": "bidirectional",
    "dp_varying_mask_ratio": False,
    "eos_token_id": 11,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "mask_token_id": 100,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "model_type": "nemotron_labs_diffusion",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": ROPE,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "5.0.0",
    "use_cache": False,
    "vocab_size": 131072,
}
HIDDEN, FFN, HEADS, GROUPS, HEAD, ROWS, LAYERS = 48, 80, 4, 2, 16, 160, 4
TINY = {
    **PUBLISHED,
    "block_size": 4,
    "head_dim": HEAD,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": GROUPS,
    "rope_parameters": {**ROPE, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    "vocab_size": ROWS,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the small model by their published names."""
    named = {"encoder.embed_tokens": (ROWS, HIDDEN), "encoder.norm": (HIDDEN,)}
    named["diffusion_head"] = (ROWS, HIDDEN)
    for layer in range(LAYERS):
        block = f"encoder.layers.{layer}."
        named |= {f"{block}{part}_layernorm": (HIDDEN,) for part in ("input", "post_attention")}
        named |= {f"{block}self_attn.q_proj": (HEADS * HEAD, HIDDEN)}
        named |= {f"{block}self_attn.{part}_proj": (GROUPS * HEAD, HIDDEN) for part in "kv"}
        named |= {f"{block}self_attn.o_proj": (HIDDEN, HEADS * HEAD)}
        named |= {f"{block}mlp.{part}_proj": (FFN, HIDDEN) for part in ("gate", "up")}
        named |= {f"{block}mlp.down_proj": (HIDDEN, FFN)}
    return {f"{name}.weight": shape for name, shape in named.items()}


def write_nemotron(folder: Path) -> Path:
    """Write a random checkpoint in bf16, two shards and an index; return the folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes().items()
    }
    places = {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(TINY, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 11, "transformers_version": "5.0.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return folder
