"""Models, packed rows and micro-batches of any size with random content, for checks on a GPU.

`gpu_check.py` times them and `tests/gpu` tests them. All of it runs on a CPU too, at tiny sizes.
"""

import gc
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import ModelSettings, Settings
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import load_named
from agrpo_megatron.scaling.flops import Work, scored_work
from agrpo_megatron.types import PackedRows, TimestepBatch


@dataclass(frozen=True)
class Scale:
    """Sizes of a check; a row is a prompt and its completion."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    prompt: int  # tokens, the mean: those of neighbouring groups differ by a half of it
    completion: int  # tokens
    steps: int  # denoising steps of a completion
    rows: int  # in one forward
    group: int  # rows that share a prompt
    micro_batches: int  # of one update
    repeats: int  # times that something is timed

    @property
    def tokens(self) -> int:
        """Return the packed tokens of one forward."""
        return self.rows * (self.prompt + self.completion)


# LLaDA-8B's shapes (its config.json), with as many layers as let fp32 training fit 80 GB.
LLADA_8B = Scale(
    layers=6,
    hidden=4096,
    ffn=12288,
    heads=32,
    vocab=126464,
    prompt=256,
    completion=256,
    steps=128,
    rows=16,
    group=8,
    micro_batches=8,
    repeats=5,
)
# What a CPU runs in a second: nothing that is measured with it means anything.
REHEARSAL = Scale(
    layers=2,
    hidden=128,
    ffn=256,
    heads=2,
    vocab=512,
    prompt=24,
    completion=40,
    steps=20,
    rows=4,
    group=2,
    micro_batches=2,
    repeats=2,
)


def scale_settings(scale: Scale, *overrides: str) -> Settings:
    """Return settings of a model of this size; later overrides take precedence."""
    return load(
        Settings,
        None,
        [
            f"model.num_layers={scale.layers}",
            f"model.hidden_size={scale.hidden}",
            f"model.ffn_hidden_size={scale.ffn}",
            f"model.num_attention_heads={scale.heads}",
            f"model.vocab_size={scale.vocab}",
            f"model.mask_token_id={scale.vocab - 128}",
            "model.eos_token_id=1",
            f"sampling.completion_length={scale.completion}",
            f"sampling.block_length={scale.completion}",
            f"sampling.denoising_steps={scale.steps}",
            f"train.token_budget={scale.tokens}",
            f"algorithm.group_size={scale.group}",
            "logging.wandb=disabled",
            "logging.live=false",
            *overrides,
        ],
    )


def open_engine(settings: Settings) -> Engine:
    """Start the one rank and build an engine with random weights."""
    ranks = start_ranks(settings)
    engine = build_engine(settings, settings.optimizer, iterations=1000, ranks=ranks)
    uncast = random_weights(engine.network, settings.model, seed=settings.run.seed)
    engine.init_main_weights(uncast)
    return engine


def open_network(settings: Settings) -> Network:
    """Start the one rank and build a network with random weights, only for sampling."""
    network = build_network(settings, start_ranks(settings))
    random_weights(network, settings.model, seed=settings.run.seed)
    return network


def random_weights(network: Network, model: ModelSettings, *, seed: int) -> dict[str, Tensor]:
    """Draw weights on the network's own device, the same under any layout; mutates them.

    The distribution is `megatron.weights.initialise`'s, which draws on the CPU: slow at 8B shapes.
    Returns the values of FP8 weights before their cast, by Megatron's name.
    """
    shapes, device = hf_shapes(model), network.ranks.device
    into_residual = {
        name for each in weight_mappings(model) if each.transform == "row" for name in each.parts
    }

    def _draw(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        drawn = torch.randn(shape, generator=generator, device=device)
        scale = (2 * model.num_layers) ** -0.5 if name in into_residual else 1.0
        return drawn.mul_(scale * model.init_std)

    return load_named(network, model, _draw)


def random_prompts(scale: Scale, *, seed: int, device: torch.device) -> list[Tensor]:
    """Return the prompt of each row, the longer ones first, as in the sampler."""
    generator = torch.Generator().manual_seed(seed)
    groups, quarter = -(-scale.rows // scale.group), scale.prompt // 4
    prompts = []
    for number in range(groups):
        even = groups % 2 and number == groups - 1
        length = scale.prompt + (0 if even else quarter if number % 2 == 0 else -quarter)
        ids = torch.randint(2, scale.vocab - 128, (length,), generator=generator)
        prompts += [ids.to(device)] * scale.group
    return sorted(prompts[: scale.rows], key=len, reverse=True)


def random_rows(scale: Scale, *, seed: int, device: torch.device) -> PackedRows:
    """Return half-denoised rows: half of each completion masked, one step scored."""
    generator = torch.Generator().manual_seed(seed)
    prompts = random_prompts(scale, seed=seed, device=device)
    shape = (scale.rows, scale.completion)
    completions = torch.randint(2, scale.vocab - 128, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(1)
    completions[order < scale.completion // 2] = scale.vocab - 128
    scored = order < scale.completion // scale.steps
    canvas, lengths = make_canvas(prompts, completions.to(device))
    columns = completion_columns(lengths, scale.completion)
    marks = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, scored.to(device))
    return pack(canvas, lengths + scale.completion, marks)


def random_batch(scale: Scale, *, seed: int, device: torch.device) -> TimestepBatch:
    """Return a micro-batch of the policy gradient, its old log-probs near those of the model."""
    rows = random_rows(scale, seed=seed, device=device)
    count = len(rows.scored)
    generator = torch.Generator().manual_seed(seed + 1)
    sign = torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1
    return TimestepBatch(
        rows=rows,
        targets=torch.randint(2, scale.vocab - 128, (count,), generator=generator).to(device),
        old_logprobs=-torch.full((count,), float(scale.vocab), device=device).log(),
        reference_logprobs=None,
        support_ids=None,
        advantages=sign.to(device),
        weights=torch.ones(count, device=device),
        kl_weights=torch.ones(count, device=device),
        sources=torch.arange(count, device=device) // max(1, count // scale.rows),
        row=torch.arange(count, device=device) // max(1, count // scale.rows),
        position=torch.arange(count, device=device) % max(1, count // scale.rows),
    )


def work_of(rows: PackedRows) -> Work:
    """Return the work of one pass: the layers on all rows, the head on the scored tokens."""
    scored = torch.searchsorted(rows.scored, rows.cu_seqlens.long()).diff()
    return scored_work(rows.cu_seqlens.diff().tolist(), scored.tolist())


def free_memory() -> None:
    """Free the memory of unreferenced engines."""
    gc.collect()
    torch.cuda.empty_cache()
