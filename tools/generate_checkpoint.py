"""Write a Hugging Face checkpoint of random weights, for trying conversions at a size.

    python tools/generate_checkpoint.py DIR --gigabytes 2 --shards 6
    python tools/generate_checkpoint.py DIR --family llada2_moe --gigabytes 4

A family's names and vocabulary at a width of 1024, in bf16, with an index; 64 experts in a family
that has some. Tensors are written as a stream, so any size can be made.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from agrpo_megatron.config.settings import ModelSettings, MoeSettings
from agrpo_megatron.families import FAMILIES, hf_shapes
from agrpo_megatron.families.files import INDEX, Stored, write_safetensors
from agrpo_megatron.families.tensors import with_values

WIDTH = 1024
EXPERTS = MoeSettings(experts=64, topk=4, ffn_hidden_size=512)
# Vocabulary, mask token and end of text of each family, and its experts.
FAMILY = {
    "llada": (126464, 126336, 126081, MoeSettings()),
    "sdar_moe": (151936, 151669, 151643, EXPERTS),
    "llada2_moe": (
        *(157184, 156895, 156892),
        replace(
            EXPERTS,
            shared_ffn_hidden_size=512,
            dense_layers=1,
            score="sigmoid",
            scaling_factor=2.5,
            expert_bias=True,
            groups=8,
            group_topk=4,
        ),
    ),
}
BLOCK = 1 << 14  # rows made at once


def main() -> int:
    """Write the directory; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="must not exist yet")
    parser.add_argument("--family", choices=FAMILY, default="llada", help="(llada)")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights, about (2)")
    parser.add_argument("--shards", type=int, default=6, help="files (6)")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        print(f"generate: error: {arguments.directory} exists", file=sys.stderr)
        return 2
    arguments.directory.mkdir(parents=True)
    model = _model(arguments.family, arguments.gigabytes * 1e9)
    tensors = {n: Stored(Path(), torch.bfloat16, s) for n, s in hf_shapes(model).items()}
    total, filled, files = sum(t.nbytes for t in tensors.values()), 0, {}
    for name, tensor in tensors.items():
        number = 1 + filled * arguments.shards // total
        files[name] = f"model-{number:05d}-of-{arguments.shards:05d}.safetensors"
        filled += tensor.nbytes
    for file in sorted(set(files.values())):
        held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        write_safetensors(arguments.directory / file, held, lambda name: _blocks(tensors[name]))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (arguments.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = {**FAMILIES[model.family].config(model), "dtype": "bfloat16"}
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{arguments.directory}: {len(tensors)} tensors, {total / 1e9:.2f} GB")
    return 0


def _model(family: str, nbytes: float) -> ModelSettings:
    vocabulary, mask, end, moe = FAMILY[family]
    model = with_values(
        ModelSettings(
            family=family,
            hidden_size=WIDTH,
            ffn_hidden_size=3 * WIDTH,
            num_attention_heads=16,
            head_dim=WIDTH // 16,
            vocab_size=vocabulary,
            mask_token_id=mask,
            eos_token_id=end,
            qk_norm=True,
            moe=moe,
        ),
        FAMILIES[family].fixed,
    )
    if model.has_blocks:
        model = replace(model, block_length=4)
    sizes = [_nbytes(replace(model, num_layers=layers)) for layers in (2, 3)]
    layers = 2 + round((nbytes - sizes[0]) / (sizes[1] - sizes[0]))
    return replace(model, num_layers=max(1 + moe.dense_layers, layers))


def _nbytes(model: ModelSettings) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in hf_shapes(model).values())


def _blocks(tensor: Stored):
    for start in range(0, tensor.shape[0], BLOCK):
        rows = min(BLOCK, tensor.shape[0] - start)
        yield torch.randn(rows, *tensor.shape[1:]).to(tensor.dtype)


if __name__ == "__main__":
    sys.exit(main())
