"""The start weights of a run."""

from pathlib import Path

from torch import Tensor

from agrpo_megatron.checkpoint.lora.base import base_path, find_base
from agrpo_megatron.checkpoint.resume import verify_together
from agrpo_megatron.checkpoint.sharded import load_weights
from agrpo_megatron.checkpoint.weights import open_weights
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.families.lora import trained_whole
from agrpo_megatron.families.peft import read_peft
from agrpo_megatron.megatron.engine import build_reference
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.weights import initialise, load_hf, load_named
from agrpo_megatron.runs.base import check_base
from agrpo_megatron.runs.progress import BASE_FILE, MODEL_FILE


def load_model(network: Network, settings: Settings, checkpoint: Path | None) -> dict[str, Tensor]:
    """Fill a network from a checkpoint of the run, or else with what it starts from; mutates it.

    Returns:
        As `load_start_weights`.

    Raises:
        ValueError: the checkpoint does not hold weights of this shape, or the base of its adapters
            is another one.
    """
    if checkpoint is None:
        return load_start_weights(network, settings)
    if network.adapters is not None:
        check_base(checkpoint, find_base(settings, network.ranks, checkpoint))
        load_base(network, settings, checkpoint)
    return load_weights(checkpoint, network)


def load_reference(settings: Settings, network: Network, checkpoint: Path | None) -> Network:
    """Return the frozen policy that a phase starts from; called by every rank.

    Args:
        network: the one that the phase trains.
        checkpoint: from which the phase starts; None: what the run starts from.
    """
    reference = build_reference(settings, network)
    if not reference.is_reference:
        load_model(reference, settings, checkpoint)
    return reference


def load_start_weights(network: Network, settings: Settings) -> dict[str, Tensor]:
    """Fill a network with what `model.load` names, or with random weights; mutates it.

    Adapters start from `lora.load`, or with a product of zero.

    Returns:
        The tensors that FP8 weights were cast from, by name.

    Raises:
        ValueError: the directory does not hold weights of this shape.
    """
    uncast, lora = load_base(network, settings, None), settings.lora
    if network.adapters is None:
        return uncast
    if lora.load is None:
        network.adapters.initialise(settings.run.seed)
    else:
        read = read_peft(Path(lora.load), settings.model, lora)
        network.adapters.fill(read)
        load_named(network, settings.model, read, only=trained_whole(settings.model, lora))
    return uncast


def load_base(network: Network, settings: Settings, checkpoint: Path | None) -> dict[str, Tensor]:
    """Fill all weights but adapters with what the run starts from; mutates the network.

    Args:
        checkpoint: of adapters, which names its base; None: there is none yet.

    Returns:
        As `load_start_weights`.
    """
    path, model = base_path(settings, checkpoint), settings.model
    if path is None:
        return initialise(network, model, settings.run.seed)
    if not (path / MODEL_FILE).exists():
        return load_hf(network, model, path)
    verify_together(path, network.ranks)
    if (path / BASE_FILE).exists():
        return load_named(network, model, open_weights(path)[1].part)
    return load_weights(path, network, is_base=True)
