"""A rollout through captured layers: the same completions, from fixed shapes and addresses.

CUDA graphs cannot run here, so the capture is emulated: a replay computes again from the captured
tensors and writes to the captured output, as a graph does.
"""

import torch

from tests.ranks import run_ranks

RUN = [
    "precision=bf16",
    "kernels.layer_spec=te",
    "kernels.cuda_graphs=true",
    "model.hidden_size=64",
    "sampling.denoising_steps=8",
    "sampling.early_end=true",
    "model.rope_original_length=4",  # queries are scaled by position
    "model.query_scale_beta=0.5",
]


def _replayed(run):
    written = run()
    return lambda: written.copy_(run()), written


def _rollouts():
    from tests.te.kernels import install

    install()
    from agrpo_megatron.megatron import graphs
    from agrpo_megatron.rollout.generate import sample_prompts
    from agrpo_megatron.rollout.requests import encode_prompts
    from tests.training.tiny import open_session

    recorded = []

    def record(run):
        recorded.append(run)
        return _replayed(run)

    graphs.record_on_gpu = lambda: record
    session, engine = open_session(*RUN)
    problems = session.run.task.problems("train")[:6]
    prompts = encode_prompts(
        session.run, [session.run.task.prompt(problem) for problem in problems]
    )
    found = []
    for has_graphs in (False, True):
        object.__setattr__(engine.network, "has_graphs", has_graphs)
        trajectory, forward = sample_prompts(
            session.run,
            engine.rollout_network(),
            prompts,
            torch.arange(len(prompts)),
            sampling=session.run.settings.sampling,
        )
        found.append((trajectory.tokens, trajectory.logprobs, trajectory.unmask_step))
    return found, len(recorded), forward.slots.busy


def test_a_rollout_from_recorded_layers_is_the_same():
    (plain, replayed), recorded, forwards = run_ranks(1, _rollouts)[0]
    assert 0 < recorded < forwards
    tokens, logprobs, steps = zip(plain, replayed, strict=True)
    assert torch.equal(*tokens) and torch.equal(*steps)
    torch.testing.assert_close(*logprobs, atol=0.03, rtol=0)
