"""What a benchmark measures: presets, the settings of a shape, and their rules. Loads no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.loaded_model import with_loaded_model
from agrpo_megatron.runs.resolve import validate_unread

KINDS = ("rollout", "train-step", "iteration")
ORDERS = ("random", "leftmost", "low_confidence", "entropy")  # that the reference has

_LLADA = {"hidden_size": 4096, "ffn_hidden_size": 12288, "num_attention_heads": 32}
_LLADA |= {"vocab_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081}
_SDAR = {"hidden_size": 4096, "ffn_hidden_size": 12288, "num_attention_heads": 32}
_SDAR |= {"num_layers": 36, "num_query_groups": 8, "head_dim": 128, "qk_norm": "true"}
_SDAR |= {"vocab_size": 151936, "mask_token_id": 151669, "eos_token_id": 151643}
_SDAR |= {"family": "sdar", "attention": "block_causal", "block_length": 4}
_SDAR |= {"rope_theta": 1e6, "norm_epsilon": 1e-6}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "vocab_size": 512},
    "llada-8b": {**_LLADA, "num_layers": 32},
    "llada-8b/8": {**_LLADA, "num_layers": 4},
    "sdar-8b": _SDAR,
}
# Settings of the sampler that a preset needs.
SAMPLING: dict[str, dict[str, Any]] = {"sdar-8b": {"block_length": 4, "block_origin": "row"}}
# Options of the command line that are settings of the model, by the name of the setting.
SHAPE = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "ffn_hidden_size",
    "vocab": "vocab_size",
}
# Likewise of the sampler.
SAMPLER = ("completion_length", "block_length", "denoising_steps", "unmasking")
SAMPLER += ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and against what."""

    kind: str  # one of KINDS
    settings: Settings
    batch: int  # rollouts
    prompt_length: int  # tokens of each prompt
    zero_advantage: float  # share of rollouts whose advantage is zero
    repeats: int
    has_reference: bool
    has_ceiling: bool

    @property
    def row_length(self) -> int:
        """Return the tokens of a row: prompt and completion."""
        return self.prompt_length + self.settings.sampling.completion_length

    @property
    def zero_rollouts(self) -> int:
        """Return how many rollouts have no advantage."""
        return round(self.batch * self.zero_advantage)


def make_plan(kind: str, options: Mapping[str, Any], overrides: Sequence[str]) -> Plan:
    """Return the plan of a command line.

    Args:
        options: by name with underscores, as argparse has them; None is not given.
        overrides: `section.key=value`, which win over options.

    Raises:
        ValueError: an option or a setting is wrong; the message names key, value, rule and fix.
    """
    _check(kind, options)
    settings = load(Settings, None, [*_settings_of(options), *overrides])
    validate_unread(settings, world_size=1)
    settings = with_loaded_model(settings)
    validate(settings)
    if settings.model.vocab_size is None:
        raise ValueError(
            f"--model={options['model']} names no vocabulary; give a Hugging Face directory"
        )
    settings = _with_ids(settings)
    plan = Plan(
        kind,
        settings,
        batch=options["batch"],
        prompt_length=options["prompt_length"],
        zero_advantage=options["zero_advantage"],
        repeats=options["repeats"],
        has_reference=options["reference"],
        has_ceiling=options["ceiling"],
    )
    _check_plan(plan)
    if plan.has_reference:
        _check_reference(settings)
    return plan


def _settings_of(options: Mapping[str, Any]) -> list[str]:
    """Return the settings that options stand for, as overrides."""
    preset, batch = options["preset"], options["batch"]
    if options["model"] is not None:
        model: dict[str, Any] = {"load": options["model"]}
    else:
        model = dict(PRESETS[preset or "tiny"])
    model |= {key: options[name] for name, key in SHAPE.items() if options[name] is not None}
    if options["vocab"] is not None:  # the ids of a preset belong to its own vocabulary
        model = {key: v for key, v in model.items() if not key.endswith("token_id")}
    sampling = dict(SAMPLING.get(preset or "", {}))
    sampling |= {name: options[name] for name in SAMPLER if options[name] is not None}
    row = options["prompt_length"] + options["completion_length"]
    model |= {"max_sequence_length": max(4096, row)} if options["model"] is None else {}
    rest = {
        "run.threads": options["threads"],
        "precision": options["precision"],
        "algorithm.mc_samples": options["mc_samples"],
        "algorithm.prompts_per_iteration": 1,
        "algorithm.group_size": max(2, batch),
        "optimizer.learning_rate": 1e-6,
        # One forward of a rollout has all rows. A micro-batch of an update is as large as that: as
        # large as the reference's.
        "train.token_budget": batch * row,
    }
    parts = [f"model.{key}={value}" for key, value in model.items()]
    parts += [f"sampling.{key}={value}" for key, value in sampling.items()]
    return parts + [f"{key}={value}" for key, value in rest.items() if value is not None]


def _with_ids(settings: Settings) -> Settings:
    """Return settings with a mask token and an end of text: the last two ids, if none is set."""
    model = settings.model
    assert model.vocab_size is not None
    mask, end = model.mask_token_id, model.eos_token_id
    model = replace(
        model,
        mask_token_id=model.vocab_size - 1 if mask is None else mask,
        eos_token_id=model.vocab_size - 2 if end is None else end,
    )
    for key in ("mask_token_id", "eos_token_id"):
        if (value := getattr(model, key)) >= model.vocab_size:
            raise ValueError(
                f"model.{key}={value} is outside model.vocab_size={model.vocab_size}; "
                "use an id below it"
            )
    return replace(settings, model=model)


def _check(kind: str, options: Mapping[str, Any]) -> None:
    """Check options that are no settings."""
    least = {"batch": 1 if kind == "rollout" else 2, "prompt_length": 1, "repeats": 1}
    for name, low in least.items():
        if (value := options[name]) < low:
            key = name.replace("_", "-")
            why = ": an advantage needs another rollout" if low == 2 else ""
            raise ValueError(f"--{key}={value} must be at least {low}{why}; use for example 8")
    if options["preset"] is not None and options["model"] is not None:
        raise ValueError(
            f"--preset={options['preset']} and --model={options['model']} both name a model; "
            "leave one of them out"
        )
    given = [name for name in SHAPE if options[name] is not None]
    if given and options["model"] is not None:
        raise ValueError(
            f"--{given[0]}={options[given[0]]} cannot change the shape of "
            f"--model={options['model']}; leave it out, or use --preset"
        )
    if (vocab := options["vocab"]) is not None and vocab < 4:
        raise ValueError(f"--vocab={vocab} must be at least 4; use for example 16384")
    share = options["zero_advantage"]
    if not 0 <= share < 1:
        raise ValueError(
            f"--zero-advantage={share:g} must be at least 0 and below 1; use for example 0.4"
        )
    if share and kind == "rollout":
        raise ValueError(
            f"--zero-advantage={share:g} has no meaning for a rollout, which has no update; "
            "leave it out, or measure train-step or iteration"
        )


def _check_plan(plan: Plan) -> None:
    """Check what the options mean together with the settings."""
    length, limit = plan.row_length, plan.settings.model.max_sequence_length
    if length > limit:
        raise ValueError(
            f"--prompt-length={plan.prompt_length} and a completion of "
            f"{plan.settings.sampling.completion_length} tokens make {length}, more than "
            f"model.max_sequence_length={limit}; shorten one of them"
        )
    if plan.batch - plan.zero_rollouts == 1:
        raise ValueError(
            f"--zero-advantage={plan.zero_advantage:g} leaves one of {plan.batch} rollouts with an "
            "advantage, but advantages add up to zero; use a lower share"
        )
    algorithm = plan.settings.algorithm
    if plan.kind != "rollout" and plan.batch % algorithm.group_size:
        raise ValueError(
            f"algorithm.group_size={algorithm.group_size} does not divide --batch={plan.batch}; "
            "leave it out, or use a divisor"
        )
    if algorithm.name != "agrpo" or algorithm.filled.mc_samples == "auto":
        key = "name" if algorithm.name != "agrpo" else "mc_samples"
        raise ValueError(
            f"algorithm.{key}={getattr(algorithm, key)} is not measured here; use "
            "algorithm.name=agrpo with a number as --mc-samples"
        )
    if plan.settings.train.async_steps:
        raise ValueError(
            "train.async_steps=1 samples while rewards are graded, and made-up rewards take no "
            "time; use train.async_steps=0"
        )
    if algorithm.needs_reference:
        raise ValueError(
            f"algorithm.kl_coefficient={algorithm.kl_coefficient:g} needs a frozen policy, which "
            "is not measured here; use 0"
        )


def _check_reference(settings: Settings) -> None:
    """Check that the reference has the computation of the settings.

    Raises:
        ValueError: it does not; leave out --reference, or change the setting.
    """
    model, sampling = settings.model, settings.sampling
    wanted = {
        "model.family": (model.family, ("llada",)),
        "model.attention": (model.attention, ("full",)),
        "model.rope_factor": (model.rope_factor, (1,)),
        "model.rotary_fraction": (model.rotary_fraction, (1,)),
        "model.query_scale_beta": (model.query_scale_beta, (0,)),
        "model.qk_norm": (model.qk_norm, (False,)),
        "model.shift": (model.shift, (False,)),
        "model.moe.experts": (model.moe.experts, (None,)),
        "lora.rank": (settings.lora.rank, (None,)),
        "precision": (settings.precision, ("fp32", "bf16")),
        "sampling.policy": (sampling.policy, ("exact",)),
        "sampling.unmasking": (sampling.unmasking, ORDERS),
        "sampling.schedule": (sampling.schedule, ("uniform",)),
        "sampling.block_origin": (sampling.block_origin, ("completion",)),
        "sampling.truncation": (sampling.truncation, ("top_k_first",)),
        "sampling.confidence": (sampling.confidence, ("policy",)),
        "sampling.threshold": (sampling.threshold, (None,)),
        "sampling.edit_threshold": (sampling.edit_threshold, (None,)),
        "sampling.end_at_stop": (sampling.end_at_stop, (False,)),
        "sampling.position_temperature": (sampling.position_temperature, (None,)),
        "algorithm.scoring": (settings.algorithm.scoring, ("token",)),
        "algorithm.clip": (settings.algorithm.clip, ("ppo",)),
        "algorithm.entropy_bonus": (settings.algorithm.entropy_bonus, (0,)),
        "algorithm.loss": (settings.algorithm.filled.loss, ("policy",)),
        "algorithm.level": (settings.algorithm.filled.level, ("token",)),
        "algorithm.scored_policy": (settings.algorithm.filled.scored_policy, ("sampler",)),
        "algorithm.rollout_correction": (settings.algorithm.rollout_correction, (None,)),
        "algorithm.updates_per_iteration": (settings.algorithm.updates_per_iteration, (1,)),
    }
    for key, (value, known) in wanted.items():
        if value not in known:
            options = " or ".join("null" if k is None else f"{k}".lower() for k in known)
            raise ValueError(
                f"{key}={value}: --reference is LLaDA's published computation, with "
                f"{key}={options}; use that, or leave out --reference"
            )
