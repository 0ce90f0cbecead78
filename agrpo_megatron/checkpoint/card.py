"""The model card of an exported checkpoint: what was trained, how, and how it scored."""

from pathlib import Path
from typing import Any

from agrpo_megatron import __version__
from agrpo_megatron.config.schema import flatten
from agrpo_megatron.config.yaml_files import read_yaml
from agrpo_megatron.families.config_json import CONFIG, OWN_TYPE, read_object
from agrpo_megatron.runs.progress import PROGRESS_FILE, RUN_FILE, Progress, read_progress

CARD = "README.md"
OWN_VERSIONS = "4.46 to 5.23"  # tested: tests/checkpoint/exports
LOADING = """
## Loading

{loader}.

```python
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

`model(input_ids).logits` are [batch, tokens, vocabulary]. `agrpo sample FOLDER`
makes completions; in a program, `agrpo_megatron.diffusion.sample` does.
"""
SHOWN = ("task.name", "algorithm", "sampling", "optimizer", "train.iterations", "run.seed")


def loader_of(folder: Path) -> str:
    """Return what loads a Hugging Face directory, one line."""
    config = read_object(folder / CONFIG)
    if config["model_type"] == OWN_TYPE:
        return f"AutoModel with trust_remote_code=True, transformers {OWN_VERSIONS}"
    auto_map = config.get("auto_map") or {}
    files = {f"{str(name).rpartition('.')[0]}.py" for name in auto_map.values()}
    if files and all((folder / file).is_file() for file in files):
        made = config.get("transformers_version", "of an unknown version")
        return f"AutoModel with trust_remote_code=True: the model's own files, made with {made}"
    return (
        f"no modelling files, and transformers has no {config['model_type']}: put the model's own "
        f"next to the weights, or convert with --own-code"
    )


def write_card(checkpoint: Path, folder: Path) -> None:
    """Write the card of a checkpoint of a run; a converted one gets none."""
    if not (checkpoint / PROGRESS_FILE).exists() or not (checkpoint / RUN_FILE).exists():
        return
    path = folder / CARD
    if path.exists():
        path.rename(folder / "README-base.md")
    card = _card(read_yaml(checkpoint / RUN_FILE), read_progress(checkpoint))
    card += LOADING.format(loader=loader_of(folder))
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
