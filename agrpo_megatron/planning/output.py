"""The settings file of a planned layout, and the command that submits it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.parallel import layout_text
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import dump_yaml
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.ranking import Candidate
from agrpo_megatron.runs.files import write_whole


def settings_text(one: Candidate, cluster: Cluster, *, command: str) -> str:
    """Return a settings file with what differs from the defaults.

    Args:
        command: that made the plan, for the file's first line.
    """
    is_cpu = cluster.device.name == "CPU"
    launch = replace(
        one.settings.launch,
        gpus_per_node=0 if is_cpu else cluster.per_node,
        ranks_per_node=cluster.per_node if is_cpu else None,
        gpu_memory=float(cluster.device.memory),
    )
    tree = asdict(replace(one.settings, launch=launch))
    changed = _difference(tree, asdict(Settings()))
    changed["parallel"] = layout_text(one.settings.parallel)
    head = f"# {command}\n# Planned for {cluster.ranks} x {cluster.device.name}: {one.name}.\n"
    return head + dump_yaml(changed)


def write_settings(path: Path, text: str) -> None:
    """Write a settings file.

    Raises:
        ValueError: there is a file, or its folder is missing.
    """
    if path.exists():
        raise ValueError(f"--output={path} exists; remove it, or give another name")
    if not path.parent.is_dir():
        raise ValueError(f"--output={path}: {path.parent} is not a folder; make it first")
    write_whole(path, text)


def launch_command(file: str, cluster: Cluster) -> str:
    """Return the command that submits the planned run."""
    return f"agrpo launch {file} --nodes {cluster.nodes}"


def _difference(tree: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Return what a tree of settings has that the usual one has not."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(usual.get(key), dict) and usual[key]:
            value = _difference(value, usual[key])
            if value:
                found[key] = value
        elif value != usual.get(key):
            found[key] = value
    return found
