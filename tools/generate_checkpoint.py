"""Write a Hugging Face checkpoint of random weights, for trying conversions at a size.

    python tools/generate_checkpoint.py DIR --gigabytes 2 --shards 6

LLaDA's names and LLaDA-8B's vocabulary at a width of 1024, in bf16, with an index; tensors are
written as a stream, so any size can be made.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES, hf_shapes
from agrpo_megatron.families.files import INDEX, Stored, write_safetensors

WIDTH, VOCABULARY = 1024, 126464
BLOCK = 1 << 14  # rows made at once


def main() -> int:
    """Write the directory; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="must not exist yet")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights, about (2)")
    parser.add_argument("--shards", type=int, default=6, help="files (6)")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        print(f"generate: error: {arguments.directory} exists", file=sys.stderr)
        return 2
    arguments.directory.mkdir(parents=True)
    model = _model(arguments.gigabytes * 1e9)
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
    config = {**FAMILIES["llada"].config(model), "dtype": "bfloat16"}
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{arguments.directory}: {len(tensors)} tensors, {total / 1e9:.2f} GB")
    return 0


def _model(nbytes: float) -> ModelSettings:
    layer = 2 * WIDTH * (4 * WIDTH + 9 * WIDTH)
    return ModelSettings(
        num_layers=max(1, round((nbytes - 4 * VOCABULARY * WIDTH) / layer)),
        hidden_size=WIDTH,
        ffn_hidden_size=3 * WIDTH,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        mask_token_id=126336,
        eos_token_id=126081,
    )


def _blocks(tensor: Stored):
    for start in range(0, tensor.shape[0], BLOCK):
        rows = min(BLOCK, tensor.shape[0] - start)
        yield torch.randn(rows, *tensor.shape[1:]).to(tensor.dtype)


if __name__ == "__main__":
    sys.exit(main())
