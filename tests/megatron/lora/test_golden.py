"""AGRPO with adapters: loss and gradients are those of the official trainer with PEFT's LoRA.

The official loss is written here by formula on plain torch modules. Without adapters it gives the
golden numbers of the official trainer; with adapters of the PEFT library it gives what ours has to.
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import draws_at, rows_at
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.families.peft import lora_settings_of, read_peft
from agrpo_megatron.megatron.engine import build_engine
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import load_hf
from agrpo_megatron.training.step import accumulate_gradients
from agrpo_megatron.training.update import packed_part, with_loss, with_reference
from tests.megatron.lora.plain import PlainModel, random_
from tests.megatron.lora.whole import whole_adapters
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "conformance.py"
GOLDEN = ROOT / "tests" / "fixtures" / "llada_tiny"
HF = GOLDEN / "hf"
PREFIX = "base_model.model."
# The layers of the published run, and a scale that is not 1.
LAYERS = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
LORA = {"r": 8, "lora_alpha": 16, "target_modules": LAYERS}


def stored(number):
    """Return a golden case: its settings, and its tensors without the common start."""
    case = json.loads((GOLDEN / "golden.json").read_text())["agrpo"][number]
    start, tensors = f"agrpo.{number}.", load_file(GOLDEN / "golden.safetensors")
    return case, {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def below(part, start):
    """Return the tensors whose names start so, without it."""
    return {n.removeprefix(start): t for n, t in part.items() if n.startswith(start)}


def drawn_steps(case, part, row, last):
    """Return the drawn steps of a rollout and their weights: inverse CDF of the proposal."""
    chances = torch.zeros(last + 1, dtype=torch.float64)
    if case["is_"] == "entropy":
        for step in range(last + 1):
            of_step = part["unmask_steps"][row] == step
            chances[step] = part["old_entropies"][row][of_step].double().sum() + 1e-8
    else:
        chances[:] = 1
    chances = chances / chances.sum()
    steps = torch.searchsorted(chances.cumsum(0), part["u"][row].double(), right=True)
    return [(int(step), 1 / (last + 1) / float(chances[step])) for step in steps]


def published_loss(policy, reference, case, part):
    """Return the official loss of a group; states are rebuilt, and only their own step is scored.

    Per token: -min(r A, clip(r) A) + beta r k3, of log-probs under temperature and support.
    """
    model, total = settings_from_hf(HF), 0.0
    for row, tokens in enumerate(part["completion_ids"]):
        fixed, prompt = part["unmask_steps"][row], part["prompt_ids"][row]
        last = int(fixed[tokens != model.eos_token_id].max())
        gain = part["advantages"][row].double()
        for step, weight in drawn_steps(case, part, row, last):
            state = torch.cat([prompt, tokens.masked_fill(fixed >= step, model.mask_token_id)])
            scored = (fixed == step).nonzero()[:, 0]

            def logprobs(network, state=state, scored=scored, row=row):
                logits = network(state)[len(part["prompt_ids"][row]) + scored].double()
                logits = logits / case["temperature"]
                if "sampling_masks" in part:
                    kept = part["sampling_masks"][row][scored]
                    logits = logits.masked_fill(~kept, float("-inf"))
                chosen = part["completion_ids"][row][scored]
                return logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]

            ours = logprobs(policy)
            ratio = (ours - part["old_logprobs"][row][scored].double()).exp()
            low, high = 1 - case["epsilon"], 1 + case["epsilon"]
            terms = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
            if case["beta"]:
                with torch.no_grad():
                    theirs = reference(logprobs)
                gap = theirs - ours
                terms = terms + case["beta"] * (gap.exp() - gap - 1) * ratio
            total = total + weight * terms.sum()
    return total / (case["mc_samples"] * case["num_generations"])


def plain(tensors):
    """Return plain modules in float64 with these weights."""
    return PlainModel(settings_from_hf(HF), tensors).double()


@pytest.mark.parametrize("number", range(3))
def test_the_formula_is_the_official_trainers(number):
    case, part = stored(number)
    policy, frozen = plain(below(part, "policy.")), plain(load_file(HF / "model.safetensors"))
    loss = published_loss(policy, lambda logprobs: logprobs(frozen), case, part)
    loss.backward()
    assert abs(float(loss) - float(part["loss"])) < 1e-5
    found = dict(policy.named_parameters())
    for name, expected in below(part, "grad.").items():
        assert (found[name].grad - expected).norm() < 1e-4 * expected.norm(), name


def _ours(folder, numbers, tensor):
    """Return loss and gradients of our update with PEFT's adapters, for each golden case."""
    tool, results = runpy.run_path(str(TOOL)), []
    settings = tool["settings_at"](HF, f"tp{tensor}", token_budget=512)
    lora = lora_settings_of(folder, settings.model)
    settings = replace(settings, lora=lora)
    engine = build_engine(settings, settings.optimizer, iterations=1, ranks=start_ranks(settings))
    network = engine.network
    load_hf(network, settings.model, HF)
    network.adapters.fill(read_peft(folder, settings.model, lora))
    for number in numbers:
        case, part = stored(number)
        sampling, algorithm = tool["_published"](case)
        chosen = replace(settings, sampling=sampling, algorithm=algorithm)
        rollout = tool["_stored_rollout"](part, sampling)
        context = DrawContext(algorithm, eos_id=settings.model.eos_token_id, seed=0)
        draws = draws_at(rollout.trajectory, part["u"].double(), context)
        scored = packed_part(chosen, engine.ranks, rollout, rows_at(rollout.trajectory, draws))
        if case["beta"]:
            scored = with_reference(scored, replace(network, is_reference=True), chosen)
        scored, loss = with_loss(engine, scored, rollout, chosen, is_first=True)
        metrics = accumulate_gradients(
            engine, scored.batches, loss=loss, examples=len(rollout.rewards)
        )
        gradients = whole_adapters(network, lambda parameter: parameter.main_grad)
        results.append((metrics["loss"], gradients))
    return results


def norm(tensors):
    """Return the norm of all tensors together."""
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


@pytest.mark.parametrize("tensor", [1, 2])
def test_loss_and_gradients_are_those_of_pefts_lora(tmp_path, tensor):
    """The reference of case 2 is the model with its adapters off, in both.

    The whole gradient is within 1e-5. Of single matrices, those of queries and keys are small
    differences of large terms: float32 alone moves PEFT's own by 2e-5.
    """
    module = get_peft_model(plain(load_file(HF / "model.safetensors")), LoraConfig(**LORA)).double()
    random_(module, ("lora_",), 0.1)
    module.save_pretrained(tmp_path)

    def without_adapters(logprobs):
        with module.disable_adapter():
            return logprobs(module)

    ranks = run_ranks(tensor, _ours, tmp_path, range(3), tensor)
    for number, ours in enumerate(zip(*ranks, strict=True)):
        case, part = stored(number)
        module.zero_grad()
        loss = published_loss(module, without_adapters, case, part)
        loss.backward()
        assert abs(float(loss)) > 1e-2
        assert all(abs(mine - float(loss)) < 1e-5 * abs(float(loss)) for mine, _ in ours)
        expected = {
            name.removeprefix(PREFIX).replace(".default", ""): parameter.grad
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        for _, gradients in ours:
            assert expected.keys() == gradients.keys()
            differences = {name: gradients[name] - whole for name, whole in expected.items()}
            assert norm(differences) < 1e-5 * norm(expected), number
            for name, difference in differences.items():
                assert difference.norm() < 3e-5 * expected[name].norm(), (number, name)
