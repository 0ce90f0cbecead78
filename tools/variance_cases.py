"""Rollouts with the gradient of every denoising step, for `variance.py`: stored or sampled."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.batches import timestep_batch
from agrpo_megatron.diffusion.draw import LogitsForward
from agrpo_megatron.diffusion.logprobs import (
    Vocabulary,
    gather_logits,
    policy_logits,
    token_logprobs,
)
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import live_of, rows_at
from agrpo_megatron.types import PackedRows, Rollout, StepDraws, TimestepBatch, Trajectory

NAMES = ("n_layers", "n_heads", "d_model", "mlp_hidden_size", "vocab_size", "mask_token_id")
OTHERS = {"eos_token_id": 38, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
RANDOM_CONFIG = dict(zip(NAMES, (2, 4, 32, 96, 40, 39), strict=True)) | OTHERS


@dataclass(frozen=True)
class Case:
    """Stored rollouts, and what each of their steps adds to the gradient."""

    name: str
    contributions: Tensor  # [R, M, D] float64
    rollout: Rollout
    eos_id: int
    group_size: int


@dataclass(frozen=True)
class Model:
    """A LLaDA in plain torch, float64: small enough for one gradient per denoising step."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    vocab: Vocabulary  # published rollouts may draw the mask token, ours may not

    def score(self, rows: PackedRows) -> Tensor:
        """Return logits at the scored positions of rows of one length."""
        length = int(rows.cu_seqlens[1])
        assert bool((rows.cu_seqlens.diff() == length).all())
        hidden = self.hidden(rows.tokens.view(-1, length)).flatten(0, 1)
        return hidden[rows.scored] @ self.weights["ff_out.weight"].T

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the final hidden states [N, L, d] of token ids [N, L]."""
        weights, heads = self.weights, self.config["n_heads"]
        x = weights["wte.weight"][tokens]
        for layer in range(self.config["n_layers"]):
            own = below(weights, f"blocks.{layer}.")
            y = self._norm(x, own["attn_norm.weight"])
            q, k, v = (
                (y @ own[f"{name}_proj.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
                for name in "qkv"
            )
            mixed = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)
            x = x + mixed.transpose(1, 2).flatten(2) @ own["attn_out.weight"].T
            y = self._norm(x, own["ff_norm.weight"])
            gate = F.silu(y @ own["ff_proj.weight"].T)
            x = x + (gate * (y @ own["up_proj.weight"].T)) @ own["ff_out.weight"].T
        return self._norm(x, weights["ln_f.weight"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])

    def _rotate(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        exponents = torch.arange(0, width, 2, dtype=x.dtype) / width
        turns = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        angles = (turns / self.config["rope_theta"] ** exponents).repeat(1, 2)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


def random_model(seed: int) -> Model:
    """Return a model of random weights, wide enough to have opinions."""
    config, generator = RANDOM_CONFIG, torch.Generator().manual_seed(seed)
    size, inner, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
    shapes = {"wte": (vocab, size), "ff_out": (vocab, size), "ln_f": (size,)}
    for layer in range(config["n_layers"]):
        block = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (size, size))
        block |= {"ff_proj": (inner, size), "up_proj": (inner, size), "ff_out": (size, inner)}
        block |= {"attn_norm": (size,), "ff_norm": (size,)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    weights = {
        f"{name}.weight": torch.ones(shape, dtype=torch.float64)
        if len(shape) == 1
        else torch.randn(shape, generator=generator, dtype=torch.float64) * 2 / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    return Model(config, weights, Vocabulary(vocab, forbidden=(config["mask_token_id"],)))


def sampled_case(unmasking: str, seed: int, *, steps: int = 16) -> Case:
    """Sample two groups from a random model; the reward is the share of even token ids."""
    model, group_size = random_model(seed), AlgorithmSettings().group_size
    sampling = SamplingSettings(
        completion_length=32, block_length=8, denoising_steps=steps, unmasking=unmasking
    )
    mask_id, eos_id = model.config["mask_token_id"], model.config["eos_token_id"]
    forward = LogitsForward(model.score)
    context = SamplerContext(forward, model.vocab, mask_id, eos_id, seed, token_budget=4096)
    prompts = [torch.arange(8) + 10 * g for g in range(2) for _ in range(group_size)]
    trajectory = sample(prompts, torch.arange(len(prompts)), context=context, sampling=sampling)
    rewards = (trajectory.tokens % 2 == 0).double().mean(1)
    gains = advantages(rewards, AlgorithmSettings())
    name = f"2 x {group_size} rollouts of a random model, unmasking {unmasking}"
    return make_case(name, model, trajectory, gains, group_size)


def stored_cases(path: Path) -> Iterator[Case]:
    """Read the `agrpo.N.*` trajectories of a file, and the model in `hf/` that drew them."""
    tensors, model = load_file(path), stored_model(path.parent / "hf")
    settings = json.loads((path.parent / "golden.json").read_text())
    for number, options in enumerate(settings["agrpo"]):
        stored = below(tensors, f"agrpo.{number}.")
        trajectory, gains = stored_trajectory(stored, options), stored["advantages"].double()
        name = f"{path.name}, agrpo.{number}: {len(gains)} rollouts, {options['unmasking']}"
        yield make_case(name, model, trajectory, gains, len(gains))


def stored_model(folder: Path) -> Model:
    """Read a LLaDA in Hugging Face's format."""
    config = json.loads((folder / "config.json").read_text())
    weights = below(load_file(folder / "model.safetensors"), "model.transformer.")
    weights = {name: weight.double() for name, weight in weights.items()}
    return Model(config, weights, Vocabulary(config["vocab_size"]))


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def stored_trajectory(stored: dict[str, Tensor], options: dict[str, Any]) -> Trajectory:
    """Turn stored tensors into a record; positions without numbers were filled in, not drawn."""
    steps, masks, support = stored["unmask_steps"], stored.get("sampling_masks"), None
    drawn = (stored["old_logprobs"] != 0) | (stored["old_entropies"] > 0)
    if masks is not None:
        kept, ids = torch.sort(masks.int(), dim=-1, descending=True, stable=True)
        support = ids.masked_fill(kept == 0, -1)[..., : int(masks.sum(-1).max())].int()
    return Trajectory(
        prompts=tuple(stored["prompt_ids"]),
        tokens=stored["completion_ids"],
        unmask_step=steps,
        logprobs=stored["old_logprobs"],
        entropies=stored["old_entropies"],
        spreads=torch.ones_like(stored["old_entropies"]),  # not stored
        support_ids=support,
        num_steps=steps.masked_fill(~drawn, -1).amax(1) + 1,
        rollout_ids=torch.arange(len(steps)),
        sampling=SamplingSettings(temperature=options["temperature"]),
    )


def make_case(
    name: str, model: Model, trajectory: Trajectory, gains: Tensor, group_size: int
) -> Case:
    """Compute every live step's gradient by all weights, at a policy ratio of 1.

    What the sampler records of each token is measured again: stored files lack the spreads.
    """
    eos_id = model.config["eos_token_id"]
    live, most = live_of(trajectory, DrawContext(AlgorithmSettings(), eos_id, 0))
    weights = {key: weight.detach().requires_grad_() for key, weight in model.weights.items()}
    model, rollout = replace(model, weights=weights), Rollout(trajectory, gains, gains > 0, gains)
    rows = len(gains)
    size = sum(weight.numel() for weight in weights.values())
    result = torch.zeros(rows, most, size, dtype=torch.float64)
    recorded = torch.zeros(3, *trajectory.tokens.shape, dtype=torch.float64)
    for r, t in (torch.arange(most) < live[:, None]).nonzero().tolist():
        one = StepDraws(torch.tensor([r]), torch.tensor([t]), torch.ones(1).double())
        mask_id = model.config["mask_token_id"]
        batch = timestep_batch(
            rollout, rows_at(trajectory, one), torch.tensor([0]), mask_id=mask_id
        )
        temperature = trajectory.sampling.temperature
        logits = policy_logits(model.score(batch.rows), model.vocab, temperature=temperature)
        logprobs, entropies = token_logprobs(
            logits, batch.targets, vocab=model.vocab, support_ids=batch.support_ids
        )
        measured = (logprobs, entropies, _spreads(logits, batch, model.vocab))
        for values, new in zip(recorded, measured, strict=True):
            values[r, batch.position] = new.detach()
        loss = -(logprobs * batch.advantages).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        result[r, t] = torch.cat(
            [
                torch.zeros_like(w).flatten() if g is None else g.flatten()
                for g, w in zip(gradients, weights.values(), strict=True)
            ]
        )
    # Variances need only inner products, and a rotation into the vectors' span keeps them.
    spanned = torch.linalg.qr(result.flatten(0, 1).T, mode="r").R.T.view(rows, most, -1)
    fields = dict(zip(("logprobs", "entropies", "spreads"), recorded, strict=True))
    rollout = replace(rollout, trajectory=replace(trajectory, **fields))
    return Case(name, spanned, rollout, eos_id, group_size)


def _spreads(logits: Tensor, batch: TimestepBatch, vocab: Vocabulary) -> Tensor:
    """Return 1 - sum p^2 [S] of the scored policy."""
    if batch.support_ids is not None:
        logits = gather_logits(logits, batch.support_ids, vocab)
    return 1 - logits.softmax(-1).square().sum(-1)
