"""Open a trained model for evaluation and sampling, without an optimizer."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from agrpo_megatron.checkpoint.resume import verify_together
from agrpo_megatron.checkpoint.start import load_model
from agrpo_megatron.evaluation.evaluate import EVALUATION_IDS
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.requests import encode_prompts
from agrpo_megatron.rollout.session import Output, Run, Session
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.runs.resolve import Resolved
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.types import Prompt, Trajectory


@contextmanager
def opened(resolved: Resolved, checkpoint: Path | None) -> Iterator[tuple[Session, Network]]:
    """Yield a session that writes and shows nothing, and a network in the rollout layout.

    Called by every rank.

    Args:
        checkpoint: a checkpoint of a run; None takes the weights that `model.load` names.
    """
    settings = resolved.settings
    settings = replace(
        settings, parallel=settings.rollout_layout, rollout=replace(settings.rollout, parallel=None)
    )
    ranks = start_ranks(settings)
    try:
        log = RunLog(Path(settings.run.dir), settings=settings, is_main=False)
        network = build_network(settings, ranks)
        network.set_training("eval")
        if checkpoint is not None:
            verify_together(checkpoint, ranks)
        load_model(network, settings, checkpoint)
        with closing(Grader(resolved.task, settings.task)) as grader:
            run = Run(settings, ranks, resolved.task, resolved.tokenizer, grader)
            yield Session(run, Output(log)), network
    finally:
        stop_ranks()


def complete(run: Run, network: Network, prompts: list[Prompt]) -> Trajectory:
    """Complete prompts with the sampler of `evaluation`; every rank completes all of them."""
    ids = EVALUATION_IDS + torch.arange(len(prompts), device=run.ranks.device)
    sampling = run.settings.evaluation_sampling
    encoded = encode_prompts(run, prompts)
    return sample_prompts(run, network, encoded, ids, sampling=sampling)[0]
