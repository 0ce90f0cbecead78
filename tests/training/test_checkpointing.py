"""What a run keeps: damage costs one checkpoint, restarts sample nothing again, layouts change."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.checkpoint.sharded import load_checkpoint
from agrpo_megatron.rollout import dynamic_sampling
from agrpo_megatron.rollout.cache import RolloutCache
from agrpo_megatron.rollout.session import Safety
from agrpo_megatron.runs.progress import Progress, read_progress
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import open_session, resolved_run, same_metrics, silent_view

RUN = [
    "train.iterations=4",
    "algorithm.updates_per_iteration=2",
    "evaluation.interval=2",
    "checkpoint.interval=1",
]


def _train(run_dir, overrides, line=None):
    """Train; return how often completions were sampled for training, and what was warned of."""
    if line is not None:
        kill_after_line(line)
    own, sampled, warned = dynamic_sampling.generate, [], []

    def generate(session, network, request):
        sampled.append(request.weights_version)
        return own(session, network, request)

    dynamic_sampling.generate = generate
    view = silent_view()
    view.warn = warned.append
    train(resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size()), view)
    return sampled, warned


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ranks(1, _train, directory, [])
    return directory


def _killed(run_dir, overrides, line):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, run_dir, overrides, line)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path):
    """Lines: evaluation, three iterations with an evaluation after the second, then the kill."""
    run = tmp_path / "run"
    _killed(run, [], 5)
    root = run / "checkpoints"
    assert (root / "latest").read_text() == "rl-000002"
    _flip(next((root / "rl-000002").glob("*.distcp")))
    ((_, warned),) = run_ranks(1, _train, run, [])
    assert len(warned) == 1 and "__0_0.distcp: damaged" in warned[0]
    assert "resuming from rl-000001, the damaged one is now damaged-rl-000002" in warned[0]
    assert same_metrics(read(run / "metrics.jsonl"), read(whole / "metrics.jsonl"))


def test_a_run_whose_checkpoints_are_all_damaged_stops_with_the_reason(tmp_path):
    run = tmp_path / "run"
    _killed(run, [], 3)
    for shard in (run / "checkpoints").glob("*/*.distcp"):
        _flip(shard)
    with pytest.raises(AssertionError, match="no other checkpoint is left, --restart starts again"):
        run_ranks(1, _train, run, [])
    assert list((run / "checkpoints").glob("*/*.distcp")), "nothing was deleted"


def test_a_restart_samples_nothing_again_that_was_whole(whole, tmp_path):
    """Saved after two iterations, killed in the fourth: of the two between, none is sampled."""
    run, seldom = tmp_path / "run", ["checkpoint.interval=0", "checkpoint.best=null"]
    _killed(run, seldom, 6)  # evaluation, 1, 2, evaluation, 3, 4
    assert sorted(p.stem for p in (run / "rollouts").glob("*.safetensors")) == [
        f"{i:06d}" for i in range(4)
    ]
    ((sampled, _),) = run_ranks(1, _train, run, seldom)
    assert sampled == []
    assert same_metrics(read(run / "metrics.jsonl"), read(whole / "metrics.jsonl"))
    assert list((run / "rollouts").iterdir()) == []


def test_rollouts_are_not_kept_where_that_is_not_wanted(tmp_path):
    ((sampled, _),) = run_ranks(1, _train, tmp_path / "run", ["checkpoint.rollouts=false"])
    assert sampled == [0, 1, 2, 3] and not (tmp_path / "run" / "rollouts").exists()


def test_the_best_checkpoint_is_kept_with_its_score(whole):
    root = whole / "checkpoints"
    evaluations = [m for m in read(whole / "metrics.jsonl") if m["phase"] == "eval"][1:]
    top = max(evaluations, key=lambda record: record["accuracy"])
    progress = read_progress(root / (root / "best").read_text())
    assert (progress.iteration, progress.best) == (top["iteration"], top["accuracy"])
    assert progress.scores["accuracy"] == top["accuracy"]


def _keep_and_find(folder):
    session, engine = open_session("sampling.top_k=9", world_size=dist.get_world_size())
    cache = RolloutCache(folder, session.run.ranks, run="this")
    session = replace(session, safety=Safety(cache=cache))
    first, metrics = collect_rollout(session, engine, 0)
    dist.barrier()
    second, again = collect_rollout(session, engine, 0)
    names = ("tokens", "unmask_step", "logprobs", "entropies", "spreads", "support_ids")
    pairs = [(getattr(r.trajectory, name) for r in (first, second)) for name in names]
    same = [torch.equal(*pair) for pair in pairs]
    is_same = same_metrics([metrics], [again])
    return all(same) and is_same and torch.equal(first.rewards, second.rewards)


@pytest.mark.parametrize("size", [1, 2])
def test_the_bank_gives_back_what_it_was_given(tmp_path, size):
    assert run_ranks(size, _keep_and_find, tmp_path) == [True] * size


def _find_others(folder):
    """Say what is found by the ids that were kept, by fewer or others, and for another run."""
    session, engine = open_session(world_size=dist.get_world_size())
    sampling, ranks = session.run.settings.sampling, session.run.ranks
    cache = RolloutCache(folder, ranks, run="this")
    session = replace(session, safety=Safety(cache=cache))
    ids = collect_rollout(session, engine, 0)[0].trajectory.rollout_ids
    dist.barrier()
    # A rank that alone is asked for others: all must go the same way.
    mine = ids[:-4] if session.run.ranks.is_main else ids
    found = [cache.find(0, asked, sampling=sampling) for asked in (ids, ids[:-4], ids + 4, mine)]
    other = RolloutCache(folder, session.run.ranks, run="other")
    found.append(other.find(0, ids, sampling=sampling))
    return [answers is not None for answers in found]


@pytest.mark.parametrize("size", [1, 2])
def test_the_bank_gives_nothing_but_what_is_asked_for(tmp_path, size):
    assert run_ranks(size, _find_others, tmp_path) == [[True, False, False, False, False]] * size


def test_rollouts_of_other_settings_are_not_trained_on(tmp_path):
    """Killed before the first checkpoint, a run may begin again with any settings."""
    run, seldom = tmp_path / "run", ["checkpoint.interval=0", "checkpoint.best=null"]
    _killed(run, seldom, 3)
    assert list((run / "rollouts").iterdir())
    ((sampled, _),) = run_ranks(1, _train, run, [*seldom, "sampling.temperature=0.5"])
    assert sampled == [0, 1, 2, 3]


def test_a_damaged_rollout_is_sampled_again(tmp_path):
    run = tmp_path / "run"
    _killed(run, ["checkpoint.interval=0", "checkpoint.best=null"], 3)
    (run / "rollouts" / "000000.safetensors").write_bytes(b"half")
    ((sampled, _),) = run_ranks(1, _train, run, ["checkpoint.interval=0", "checkpoint.best=null"])
    assert sampled == [0, 2, 3]


SEGMENT = ["algorithm.baseline=none", "optimizer.megatron.adam_eps=1e-4"]


def _segment(root, start, overrides, iterations):
    """Go on from a checkpoint at this layout for some iterations, and save."""
    session, engine = open_session(*SEGMENT, *overrides, world_size=dist.get_world_size())
    if start:
        load_checkpoint(root / f"rl-{start:06d}", engine)
    seen = []
    for iteration in range(start, start + iterations):
        rollout, _ = collect_rollout(session, engine, iteration)
        metrics, _ = update_policy(session, engine, rollout, None)
        seen.append((rollout.trajectory.tokens, metrics["loss"], metrics["grad_norm"]))
    saver = Saver(root, engine, keep=9, is_async=False, files=None)
    saver.save(Progress("rl", start + iterations, {}))
    return seen


def test_a_run_goes_on_from_layout_to_layout(tmp_path):
    """One rank, tensor parallel, pipeline, distributed optimizer, and one rank again."""
    (expected,) = run_ranks(1, _segment, tmp_path / "whole", 0, [], 5)
    distributed = ["parallel=dp2", "optimizer.distributed=true"]
    layouts = [(1, []), (2, ["parallel=tp2"]), (2, ["parallel=pp2"]), (2, distributed), (1, [])]
    for iteration, (size, overrides) in enumerate(layouts):
        for result in run_ranks(size, _segment, tmp_path / "run", iteration, overrides, 1):
            ((tokens, *numbers),) = result
            assert torch.equal(tokens, expected[iteration][0])
            assert numbers == pytest.approx(expected[iteration][1:], rel=1e-5)


def _bf16_segment(root, start, overrides):
    return _segment(root, start, ["precision=bf16", *overrides], 1)


def test_float32_main_weights_move_between_kinds_of_optimizers(tmp_path):
    """bf16: the next gradient is that of the same weights, whichever optimizer keeps the copies."""
    distributed = "optimizer.distributed=true"
    (first,) = run_ranks(1, _bf16_segment, tmp_path, 0, [])
    assert first[0][2] > 0
    (here,) = run_ranks(1, _bf16_segment, tmp_path, 1, [])
    for result in run_ranks(2, _bf16_segment, tmp_path, 1, ["parallel=dp2", distributed]):
        assert torch.equal(result[0][0], here[0][0])
        assert result[0][2] == pytest.approx(here[0][2], rel=1e-3)
    (back,) = run_ranks(1, _bf16_segment, tmp_path, 2, [])
    (stay,) = run_ranks(2, _bf16_segment, tmp_path, 2, ["parallel=dp2", distributed])[:1]
    assert back[0][2] == pytest.approx(stay[0][2], rel=1e-3)


def test_a_checkpoint_holds_what_it_needs_to_be_used_alone(whole):
    path = whole / "checkpoints" / "rl-000004"
    names = {p.name for p in path.iterdir()}
    assert {"model.yaml", "run.yaml", "progress.json", "checksums.json", "hf"} <= names
    assert json.loads((path / "checksums.json").read_text()).keys() >= {"__0_0.distcp", ".metadata"}
    assert (path / "hf" / "tokenizer.model").exists()
