"""The start weights of a run."""

from pathlib import Path

from torch import Tensor

from agrpo_megatron.checkpoint.resume import verify_together
from agrpo_megatron.checkpoint.sharded import load_weights
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.weights import initialise, load_hf
from agrpo_megatron.runs.progress import MODEL_FILE, RUN_SETTINGS, checkpoint_path


def load_start_weights(network: Network, settings: Settings) -> dict[str, Tensor]:
    """Fill a network with what `model.load` names, or with random weights; mutates it.

    Returns:
        The tensors that FP8 weights were cast from, by name.

    Raises:
        ValueError: the directory does not hold weights of this shape.
    """
    source = settings.model.load
    if source is None:
        return initialise(network, settings.model, settings.run.seed)
    path = Path(source)
    if (path / RUN_SETTINGS).exists():
        return load_weights(checkpoint_path(path), network)
    if (path / MODEL_FILE).exists():
        verify_together(path, network.ranks)
        return load_weights(path, network)
    return load_hf(network, settings.model, path)
