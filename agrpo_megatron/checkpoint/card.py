"""The model card of an exported checkpoint: what was trained, how, and how it scored."""

from pathlib import Path
from typing import Any

from agrpo_megatron import __version__
from agrpo_megatron.checkpoint.exports.own_files import TOKENIZER_CONFIG
from agrpo_megatron.config.schema import flatten
from agrpo_megatron.config.yaml_files import read_yaml
from agrpo_megatron.families.config_json import CONFIG, OWN_TYPE, read_object
from agrpo_megatron.runs.progress import PROGRESS_FILE, RUN_FILE, Progress, read_progress

CARD = "README.md"
OWN_VERSIONS = "4.46 to 5.23"  # tested: tests/checkpoint/exports
LOADING = """
## Loading

{loader}.
{snippet}
`agrpo sample FOLDER` makes completions{program}.
"""
SNIPPET = """
```python
from transformers import {imported}
model = {model}.from_pretrained("FOLDER", trust_remote_code=True){tokenizer}
```

`model(input_ids).logits` are [batch, tokens, vocabulary].
"""
TOKENIZER = '\ntokenizer = AutoTokenizer.from_pretrained("FOLDER"{own_code})'
PROGRAM = "; in a program, `agrpo_megatron.diffusion.sample` does"
MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")  # the first one that loads
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG)  # AutoTokenizer needs one of them
SHOWN = ("task.name", "algorithm", "sampling", "optimizer", "train.iterations", "run.seed")


def loader_of(folder: Path) -> str:
    """Return what loads a Hugging Face directory, one line."""
    config, found = read_object(folder / CONFIG), _model_class(folder)
    if config["model_type"] == OWN_TYPE:
        return f"AutoModel with trust_remote_code=True, transformers {OWN_VERSIONS}"
    if found is None:
        return (
            f"no modelling files, and transformers has no {config['model_type']}: put the model's "
            "own next to the weights, or convert with --own-code"
        )
    name, place = found
    files = f"the files of {place}" if place else "the model's own files"
    made = config.get("transformers_version", "of an unknown version")
    return f"{name} with trust_remote_code=True: {files}, made with {made}"


def _model_class(folder: Path) -> tuple[str, str] | None:
    """Return the class of transformers that loads a folder, and the repository of its code.

    An entry of `auto_map` is `file.Class`, whose file is in the folder, or
    `repository--file.Class`; a list of them has null for a class that does not exist. The
    repository is empty for a file in the folder. None: nothing loads it.
    """
    auto_map = read_object(folder / CONFIG).get("auto_map") or {}
    for name in MODELS:
        entries = auto_map.get(name)
        for entry in entries if isinstance(entries, list) else [entries]:
            place, remote, named = str(entry or "").rpartition("--")
            file = f"{named.rpartition('.')[0]}.py"
            if entry and (remote or (folder / file).is_file()):
                return name, place
    return None


def _loading(folder: Path) -> str:
    """Return the section on loading, without lines that would fail."""
    snippet, program, found = "", "", _model_class(folder)
    if found is not None:
        imported, tokenizer = found[0], ""
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            settings = folder / TOKENIZER_CONFIG
            has_code = settings.is_file() and "auto_map" in read_object(settings)
            tokenizer = TOKENIZER.format(own_code=", trust_remote_code=True" if has_code else "")
            imported += ", AutoTokenizer"
        snippet = SNIPPET.format(imported=imported, model=found[0], tokenizer=tokenizer)
        program = PROGRAM
    return LOADING.format(loader=loader_of(folder), snippet=snippet, program=program)


def write_card(checkpoint: Path, folder: Path) -> None:
    """Write the card of a checkpoint of a run; a converted one gets none."""
    if not (checkpoint / PROGRESS_FILE).exists() or not (checkpoint / RUN_FILE).exists():
        return
    path = folder / CARD
    if path.exists():
        path.rename(folder / "README-base.md")
    card = _card(read_yaml(checkpoint / RUN_FILE), read_progress(checkpoint))
    card += _loading(folder)
    path.write_text(card, encoding="utf-8")


def _card(run: dict[str, Any], progress: Progress) -> str:
    base = run["model"].get("load")
    tags = "tags: [masked-diffusion, reinforcement-learning]"
    lines = ["---", "library_name: transformers", tags]
    if base and not Path(base).is_absolute():
        lines.append(f"base_model: {base}")
    start = f"`{Path(base).name}`" if base else "random weights"
    lines += [
        "---",
        "",
        f"# {Path(run['run']['dir']).name}",
        "",
        f"Trained with agrpo_megatron {__version__}, from {start}: phase `{progress.phase}`, "
        f"{progress.iteration} iterations.",
        "",
    ]
    if progress.scores:
        lines += ["| held-out | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in progress.scores.items()]
        lines.append("")
    lines += ["| setting | value |", "|---|---|"]
    shown = {key: value for key, value in flatten(run).items() if key.startswith(SHOWN)}
    lines += [f"| {key} | {value} |" for key, value in shown.items()]
    return "\n".join(lines) + "\n"
