"""Check this code against golden numbers of the public reference code.

    python tools/conformance.py DIR
    torchrun --nproc-per-node 4 tools/conformance.py DIR --parallel tp2-pp2

DIR holds `hf/` (a checkpoint in Hugging Face format), `golden.json` (what was computed, with
which settings) and `golden.safetensors` (inputs and results). Checked are the logits of a
forward pass, the completions of the sampler token for token, and the loss and every gradient of
the AGRPO update. One line per check; exit status 1 when one fails, 2 for wrong arguments.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings, Settings
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import draws_at, rows_at
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.layers.context import scored_slices
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from agrpo_megatron.megatron.pipeline import forward_rows, make_forward
from agrpo_megatron.megatron.weights import load_hf, load_named
from agrpo_megatron.training.step import accumulate_gradients
from agrpo_megatron.training.update import packed_part, with_loss, with_reference
from agrpo_megatron.types import Rollout, Trajectory

sys.path.insert(0, str(Path(__file__).parent))
from checks import (  # noqa: E402 - of this folder
    Check,
    hf_gradients,
    largest,
    open_engine,
    parse_arguments,
    report,
    settings_at,
)
from golden import LogprobCase, below, logit_cases, sampler_cases  # noqa: E402 - of this folder
from golden_blocks import (  # noqa: E402
    block_logit_cases,
    decode_cases,
    ids_and_block,
    tracerl_cases,
    wrong_states,
)
from golden_experts import difference, mine, router_cases, watched  # noqa: E402

LOGITS, LOSS, GRADIENT = 1e-5, 1e-5, 1e-4


@dataclass(frozen=True)
class Golden:
    """A conformance directory, with a model built for it."""

    directory: Path
    cases: dict
    tensors: dict[str, Tensor]
    settings: Settings
    engine: Engine

    @property
    def network(self) -> Network:
        """Return the model, at the layout that was asked for."""
        return self.engine.network


def main() -> int:
    """Run all checks; returns the exit status."""
    arguments = parse_arguments(__doc__, directory="conformance directory")
    try:
        golden = _open(arguments.directory, arguments.parallel)
    except ValueError as error:
        print(f"conformance: error: {error}", file=sys.stderr)
        return 2
    checks = (check for part in CHECKS for check in part(golden))
    status = report(checks, golden.settings, golden.network.ranks, where=arguments.directory)
    stop_ranks()
    return status


def check_logits(golden: Golden) -> Iterator[Check]:
    """Compare the logits of full forward passes, relative to the largest logit.

    In float32 alone another order of the same sums moves them by about one part in a million.
    """
    network = golden.network
    block = golden.settings.model.block_length
    found = (
        logit_cases(golden.tensors) if block is None else block_logit_cases(golden.tensors, block)
    )
    for case in found:
        rows = pack(
            case.canvas, case.lengths, case.scored, shift=case.shift, patterns=case.patterns
        )
        mine = scored_slices(rows, network.ranks)[network.ranks.context.rank]
        expected = case.expected[mine, network.vocab.start :]

        def compare(_: int, ours: Tensor, expected: Tensor = expected) -> float:
            shard = expected[:, : ours.shape[1]]
            return float((ours[:, : shard.shape[1]] - shard).abs().amax())

        error = max(forward_rows(network, [rows], compare), default=0.0)
        error = largest(error, network.ranks.device)
        scale = float(case.expected.abs().max())
        detail = f"{len(rows.scored)} tokens, largest difference {error:.2e} of {scale:.1f}"
        yield Check(case.name, error / max(1.0, scale), LOGITS, detail)


def check_logprobs(golden: Golden) -> Iterator[Check]:
    """Compare log-probs of the states that another trainer scores."""
    network, block = golden.network, golden.settings.model.block_length
    for case in tracerl_cases(golden.cases, golden.tensors, block or 0):
        rows = pack(case.canvas, case.lengths, case.scored, patterns=case.patterns)

        def differ(_: int, logits: Tensor, case: LogprobCase = case) -> float:
            whole = replace(network.vocab, forbidden=())
            policy = policy_logits(logits, whole)
            ours = token_logprobs(policy, case.targets, vocab=whole)[0]
            return float((ours - case.expected).abs().amax())

        error = max(forward_rows(network, [rows], differ), default=0.0)
        error = largest(error, network.ranks.device)
        yield Check(case.name, error, LOGITS * 10, f"{len(case.targets)} tokens")


def check_sampler(golden: Golden) -> Iterator[Check]:
    """Compare sampled token ids, one for one."""
    model = golden.settings.model
    assert model.mask_token_id is not None
    found = (sampler_cases, decode_cases)
    for case in (case for cases in found for case in cases(golden.cases, golden.tensors)):
        context = SamplerContext(
            forward=make_forward(golden.network, golden.settings.rollout, sampling=case.sampling),
            vocab=golden.network.vocab,
            mask_id=model.mask_token_id,
            eos_id=model.eos_token_id,
            seed=0,
            token_budget=4096,
            model=model,
            uniforms=case.uniforms,
            gumbels=case.gumbels,
            stop_ids=case.stop_ids,
        )
        ids = torch.arange(len(case.prompts), device=case.expected.device)
        ours = sample(case.prompts, ids, context=context, sampling=case.sampling)
        is_wrong = ours.tokens != case.expected
        if case.steps is not None:
            ran = ours.unmask_step < ours.num_steps[:, None]
            is_wrong &= case.steps >= 0  # the public sampler leaves the others masked
            is_wrong |= ours.unmask_step.masked_fill(~ran, -1) != case.steps
        wrong = 0
        if case.inputs is not None:
            is_wrong &= case.expected != model.mask_token_id  # blocks after the end
            wrong = wrong_states(case, ours, model.mask_token_id)
        wrong += int(is_wrong.sum())
        yield Check(case.name, wrong, 0, f"{is_wrong.numel()} tokens, {case.detail}")


def check_agrpo(golden: Golden) -> Iterator[Check]:
    """Compare loss and gradients of the update on stored rollouts."""
    network, model = golden.network, golden.settings.model
    assert model.mask_token_id is not None
    for number, case in enumerate(golden.cases.get("agrpo", [])):
        part = below(golden.tensors, f"agrpo.{number}.")
        sampling, algorithm = _published(case)
        settings = replace(golden.settings, sampling=sampling, algorithm=algorithm)
        context = DrawContext(algorithm, eos_id=model.eos_token_id, seed=0)
        rollout = _stored_rollout(part, sampling)
        draws = draws_at(rollout.trajectory, part["u"].double(), context)
        scored = packed_part(settings, network.ranks, rollout, rows_at(rollout.trajectory, draws))
        if algorithm.kl_coefficient > 0:
            reference = build_network(golden.settings, network.ranks)
            load_hf(reference, model, golden.directory / "hf")
            scored = with_reference(scored, reference, settings)
        load_named(network, model, below(part, "policy.").__getitem__)
        scored, loss = with_loss(golden.engine, scored, rollout, settings, is_first=True)
        metrics = accumulate_gradients(
            golden.engine, scored.batches, loss=loss, examples=len(rollout.rewards)
        )
        expected = float(part["loss"])
        error = abs(metrics["loss"] - expected)
        detail = f"{len(draws.rollout)} rows, {case['unmasking']}, {case['is_']} proposal"
        yield Check(f"agrpo {number} loss", error, LOSS, f"{detail}, loss {expected:.6f}")
        ours, theirs = hf_gradients(golden.engine, model), below(part, "grad.")
        errors = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items()}
        worst = max(errors, key=lambda name: errors[name])
        detail = f"{len(errors)} tensors, worst {worst}"
        yield Check(f"agrpo {number} gradients", errors[worst], GRADIENT, detail)


def check_routers(golden: Golden) -> Iterator[Check]:
    """Compare what routers choose, with which weights, and the outputs of layers of experts."""
    block = golden.settings.model.block_length
    for case in router_cases(golden.tensors, block):
        rows = pack(case.canvas, case.lengths, case.canvas >= 0, patterns=case.patterns)
        with watched(golden.network) as seen:
            forward_rows(golden.network, [rows], lambda _, logits: None)
        ours = seen.get(case.layer)
        wrong = 0 if ours is None else int((ours.chosen != mine(case.chosen, ours)).sum())
        count = f"{len(case.chosen)} tokens"
        yield Check(f"{case.name} experts", wrong, 0, count)
        for name, expected in case.values.items():
            error = 0.0 if ours is None else difference(ours.values[name], mine(expected, ours))
            yield Check(f"{case.name} {name}", error, LOGITS, count)


CHECKS = (check_logits, check_routers, check_logprobs, check_sampler, check_agrpo)


def _published(case: dict) -> tuple[SamplingSettings, AlgorithmSettings]:
    """Translate a case's settings; where ours differ from the published code, take theirs."""
    sampling = SamplingSettings(
        completion_length=case["gen_length"],
        block_length=case["block_length"],
        denoising_steps=case["steps"],
        unmasking=case["unmasking"],
        temperature=case["temperature"],
        top_k=case["top_k"],
        top_p=case["top_p"],
        forbid_mask_token=False,
    )
    algorithm = AlgorithmSettings(
        group_size=case["num_generations"],
        mc_samples=case["mc_samples"],
        proposal=case["is_"],
        step_sampler="batch" if case["low_discrepancy"] else "independent",
        uniform_mix=0.0,
        enumerate_short=False,
        live_steps="text",
        clip_low=case["epsilon"],
        clip_high=case["epsilon"],
        kl_coefficient=case["beta"],
    )
    return sampling, algorithm


def _stored_rollout(part: dict[str, Tensor], sampling: SamplingSettings) -> Rollout:
    masks, zeros = part.get("sampling_masks"), torch.zeros_like(part["advantages"])
    numbers = torch.arange(len(zeros), device=zeros.device)
    trajectory = Trajectory(
        prompts=tuple(part["prompt_ids"]),
        tokens=part["completion_ids"],
        unmask_step=part["unmask_steps"],
        logprobs=part["old_logprobs"],
        entropies=part["old_entropies"],
        spreads=torch.ones_like(part["old_entropies"]),  # not stored, and no setting here uses them
        support_ids=_support_ids(masks) if masks is not None else None,
        num_steps=torch.full_like(numbers, sampling.denoising_steps),
        rollout_ids=numbers,
        sampling=sampling,
        weights_version=0,
    )
    return Rollout(trajectory, zeros, correct=zeros.bool(), advantages=part["advantages"])


def _support_ids(masks: Tensor) -> Tensor:
    """Turn vocabulary-wide masks [R, C, V] into candidate ids [R, C, K], padded with -1."""
    width = int(masks.sum(-1).max())
    ids = torch.arange(masks.shape[-1], device=masks.device)
    ids = ids.expand(masks.shape).masked_fill(~masks, -1)
    return ids.sort(-1, descending=True).values[..., :width].to(torch.int32)


def _open(directory: Path, parallel: str) -> Golden:
    try:
        cases = json.loads((directory / "golden.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "golden.safetensors")
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: not a conformance directory: {error}") from None
    lacking = ids_and_block(cases)
    settings = settings_at(directory / "hf", parallel, token_budget=512, lacking=lacking)
    ranks = start_ranks(settings)
    engine = open_engine(settings, ranks, directory / "hf")
    there = {name: tensor.to(ranks.device) for name, tensor in tensors.items()}
    return Golden(directory, cases, there, settings, engine)


if __name__ == "__main__":
    sys.exit(main())
