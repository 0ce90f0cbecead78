"""The model of a plan: a preset, a Hugging Face directory, or a settings file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import build, from_text, load
from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.config.yaml_files import dump_yaml
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.families.config_json import CONFIG
from agrpo_megatron.runs.files import shipped
from agrpo_megatron.runs.loaded_model import with_loaded_model
from agrpo_megatron.runs.resolve import plan
from agrpo_megatron.runs.sizes import measure

PRESETS = {
    "llada-8b": "llada_8b/model.yaml",
    "dream-7b": "shapes/dream_7b.yaml",
    "sdar-8b": "sdar_8b/model.yaml",
    "sdar-30b-a3b": "sdar_30b/model.yaml",
    "nemotron-14b": "nemotron_14b/model.yaml",
    "llada2-mini": "llada2_mini/model.yaml",
    "llada2-flash": "llada2_flash/model.yaml",
    "13b": "shapes/dense_13b.yaml",
    "34b": "shapes/dense_34b.yaml",
    "70b": "shapes/dense_70b.yaml",
}
PROMPT_LENGTH = 256  # tokens, where no task says otherwise
PER_GPU = 16  # completions that an iteration has for each GPU, as the published run on 8 GPUs
BUDGET = 8192  # tokens of a micro-batch, where no settings file says otherwise


@dataclass(frozen=True)
class Model:
    """Complete settings without a layout, and what is assumed of its texts."""

    settings: Settings  # on one rank
    prompts: list[int]  # lengths in tokens
    overrides: tuple[str, ...]  # of the source, in the order in which they apply
    source: Path | None  # settings file; None: only overrides
    name: str  # as the user gave it
    assumed: tuple[str, ...]  # lines on lengths and batch
    rollout_layout: str | None  # of the source, checked with each layout


def open_model(
    name: str,
    overrides: Sequence[str],
    *,
    ranks: int,
    prompt_length: int | None = None,
    completion_length: int | None = None,
) -> Model:
    """Find a model and complete its settings on one rank.

    Args:
        name: preset, Hugging Face directory or its config.json, or settings file.
        overrides: of settings, which win over all else.
        prompt_length: tokens of each prompt; None: those of the task of a settings file, else 256.
        completion_length: tokens of a completion; None: as in the settings.

    Raises:
        ValueError: there is no such model, or a setting or a length is wrong.
    """
    _check_chosen(overrides)
    path, given, is_file = _source(name)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if not is_file and not keys & {"algorithm.prompts_per_iteration", "algorithm.group_size"}:
        given.append(f"algorithm.prompts_per_iteration={max(16, PER_GPU * ranks // 8)}")
    if completion_length is not None:
        given += _with_length(load(Settings, path, [*given, *overrides]), completion_length, keys)
    given += overrides
    wanted = load(Settings, path, given)
    alone = replace(
        wanted, parallel=ParallelSettings(), rollout=replace(wanted.rollout, parallel=None)
    )
    settings, prompts = _completed(alone, is_file=is_file)
    prompts = prompts if prompt_length is None else [prompt_length]
    settings = _checked(settings, max(prompts))
    algorithm, length = settings.algorithm, settings.sampling.completion_length
    texts = f"prompts of {_range(prompts)} tokens, completions of {length}"
    count = algorithm.prompts_per_iteration * algorithm.group_size
    assumed = (
        f"{texts} in {settings.sampling.denoising_steps} denoising steps, all of which run",
        f"{count} completions an iteration ({algorithm.prompts_per_iteration} prompts, groups of "
        f"{algorithm.group_size}), all with an advantage",
    )
    layout = wanted.rollout.parallel
    return Model(settings, prompts, tuple(given), path, name, assumed, layout)


def read_layout(text: str) -> ParallelSettings:
    """Return the layout of a text such as tp4-sp-pp2.

    Raises:
        ValueError: the text is not a layout.
    """
    return build(ParallelSettings, from_text(ParallelSettings, text, key="--layout"), "--layout ")


def _check_chosen(overrides: Sequence[str]) -> None:
    """Refuse settings that a plan chooses itself."""
    chosen = {
        "parallel": "chooses the layout; use --layout",
        "launch.gpus_per_node": "writes it; use --gpus-per-node",
        "launch.ranks_per_node": "writes it; use --gpus-per-node",
        "launch.gpu_memory": "writes it; use --memory",
    }
    for override in overrides:
        key = override.partition("=")[0].strip()
        said = chosen.get(key) or chosen.get(key.partition(".")[0])
        if said:
            raise ValueError(f"{override}: a plan {said}")


def _source(name: str) -> tuple[Path | None, list[str], bool]:
    """Return settings file, overrides before the user's, and whether the user wrote the file."""
    if name.lower() in PRESETS:
        return shipped(f"examples/{PRESETS[name.lower()]}"), [], False
    path = Path(name)
    folder = path.parent if path.name == CONFIG else path
    if folder.is_dir() and (folder / CONFIG).is_file():
        return None, _of_folder(folder), False
    if path.is_file():
        return path, [], True
    raise ValueError(
        f"MODEL={name} is neither a preset nor a file; give one of {', '.join(PRESETS)}, a Hugging "
        f"Face directory with {CONFIG}, or a settings file (YAML)"
    )


def _of_folder(folder: Path) -> list[str]:
    """Return settings for a Hugging Face directory: its shapes, and a sampler that fits."""
    model = settings_from_hf(folder)
    given = {"model.load": dump_yaml(str(folder.resolve())).strip(), "precision": "bf16"}
    given |= {"optimizer.distributed": "true", "train.token_budget": BUDGET}
    if model.has_blocks:
        given |= {"sampling.block_length": model.block_length, "sampling.block_origin": "row"}
        given |= {"sampling.completion_length": 512, "sampling.denoising_steps": 512}
    return [f"{key}={value}" for key, value in given.items()]


def _with_length(settings: Settings, length: int, keys: set[str]) -> list[str]:
    """Return overrides for another completion length: as many tokens a step, blocks that fit."""
    if length < 1:
        raise ValueError(f"--completion-length={length} must be at least 1; use for example 256")
    sampling, found = settings.sampling, [f"sampling.completion_length={length}"]
    if "sampling.denoising_steps" not in keys:
        steps = max(1, length * sampling.denoising_steps // sampling.completion_length)
        found.append(f"sampling.denoising_steps={steps}")
    is_one_block = sampling.block_length == sampling.completion_length
    if is_one_block and "sampling.block_length" not in keys:
        found.append(f"sampling.block_length={length}")
    return found


def _completed(settings: Settings, *, is_file: bool) -> tuple[Settings, list[int]]:
    """Return complete settings and lengths of prompts; only a settings file has a task to read."""
    if is_file:
        planned = plan(settings, world_size=1)
        return planned.settings, measure(planned).train
    settings = with_loaded_model(settings, has_weights=False)
    validate(settings)
    return settings, [PROMPT_LENGTH]


def _checked(settings: Settings, longest: int) -> Settings:
    """Return settings whose rows have room for the prompts.

    Raises:
        ValueError: they have not, or the model's vocabulary is unknown.
    """
    length, limit = settings.sampling.completion_length, settings.model.max_sequence_length
    if longest < 1 or longest + length > limit:
        raise ValueError(
            f"--prompt-length={longest} and a completion of {length} tokens make {longest + length}"
            f", and model.max_sequence_length={limit}; shorten one, or raise the limit"
        )
    assert settings.model.vocab_size is not None
    return settings


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
