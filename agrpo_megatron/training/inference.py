"""Open a trained model for evaluation and sampling, without an optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from agrpo_megatron.checkpoint.sharded import load_weights
from agrpo_megatron.megatron.engine import model_vocabulary
from agrpo_megatron.megatron.model import MaskedDiffusionModel, build_model
from agrpo_megatron.megatron.ranks import start_ranks, stop_ranks
from agrpo_megatron.settings import evaluation_sampling
from agrpo_megatron.training.log import RunLog
from agrpo_megatron.training.resolve import Resolved
from agrpo_megatron.training.run import load_start_weights
from agrpo_megatron.training.session import (
    EVALUATION_IDS,
    Session,
    View,
    sample_prompts,
)
from agrpo_megatron.types import Trajectory


@contextmanager
def opened(
    resolved: Resolved, view: View, checkpoint: Path | None
) -> Iterator[tuple[Session, MaskedDiffusionModel]]:
    """Yield a session that writes no files, and a network; called by every rank.

    Args:
        checkpoint: a checkpoint of a run; None takes the weights that `model.load` names.
    """
    settings = resolved.settings
    ranks = start_ranks(settings)
    try:
        log = RunLog(Path(settings.run.dir), settings=settings, is_main=False)
        vocab = model_vocabulary(settings, ranks)
        network = build_model(settings.model, settings.parallel).eval()
        if checkpoint is not None:
            load_weights(checkpoint, network)
        else:
            load_start_weights(network, settings, ranks)
        yield (
            Session(settings, ranks, resolved.task, resolved.tokenizer, vocab, log, view),
            network,
        )
    finally:
        stop_ranks()


def complete(session: Session, network: MaskedDiffusionModel, prompts: list[str]) -> Trajectory:
    """Complete prompts with the sampler of `evaluation`; every rank does all of them."""
    ids = EVALUATION_IDS + torch.arange(len(prompts), device=session.ranks.device)
    sampling = evaluation_sampling(session.settings)
    trajectory, _ = sample_prompts(session, network, prompts, ids, sampling=sampling)
    return trajectory
