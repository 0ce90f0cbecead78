"""Updates that are not finite: named, skipped up to a limit, rolled back from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.estimators import losses
from agrpo_megatron.rollout import dynamic_sampling
from agrpo_megatron.training import rl
from agrpo_megatron.training.nan_guard import NONFINITE, NanGuard, rollout_keys
from agrpo_megatron.training.nonfinite import NotFinite
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.run import train
from agrpo_megatron.training.supervised import drawn
from agrpo_megatron.trajectories import tensors
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import open_session, resolved_run, same_metrics, silent_view

LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "cp2": (2, ["parallel.context=2"]),
    "virtual": (2, ["parallel.pipeline=2", "parallel.virtual=2", "model.num_layers=4"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
NAN = float("nan")


def _spoilt(rollout, rows):
    """Return rollouts of which some hold log-probs that are not numbers."""
    trajectory, values = rollout.trajectory, tensors(rollout.trajectory)
    recorded = {name: value for name, value in values.items() if name.endswith("logprobs")}
    spoilt = {n: v.index_fill(0, torch.tensor(rows), NAN) for n, v in recorded.items()}
    return replace(rollout, trajectory=replace(trajectory, **spoilt))


def _useful(rollout):
    """Return the rollouts that have an advantage, so that they are in the update."""
    return rollout.advantages.nonzero()[:, 0].tolist()


def _state(engine):
    """Return copies of all that an update changes."""
    engine.finish_parameters()
    weights = [p.detach().clone() for _, p in engine.network.named_parameters()]
    kept = engine.optimizer.state_dict()
    inner = [kept] if "optimizer" not in kept else [kept["optimizer"]]
    steps = json.dumps(inner, default=lambda value: value.tolist(), sort_keys=True)
    return weights, steps, engine.scheduler.num_steps


def _name_rows(overrides):
    """Spoil two rollouts; return what was found, and which ranks held them."""
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    session.output.view.warn = pytest.fail  # type: ignore[method-assign]
    rollout, _ = collect_rollout(session, engine, 2)
    bad = _useful(rollout)[1:3]
    held = []
    plain = NanGuard.step

    def watched(self, engine, batches, **options):
        if engine.ranks.is_last_stage:
            held.extend(row for batch in batches for row in batch.sources.tolist() if row in bad)
        return plain(self, engine, batches, **options)

    NanGuard.step = watched  # type: ignore[method-assign]
    with pytest.raises(NotFinite) as error:
        update_policy(session, engine, _spoilt(rollout, bad), None)
    keys = [rollout_keys(session.run, rollout.trajectory)(row) for row in bad]
    return bad, keys, bool(held), error.value.finding, str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_whose_loss_is_not_finite_are_named_with_their_ranks(layout, tmp_path):
    size, overrides = LAYOUTS[layout]
    results = run_ranks(size, _name_rows, [*overrides, f"run.dir={tmp_path}"])
    bad, keys, _, finding, text = results[0]
    assert all(found == finding and said == text for _, _, _, found, said in results)
    assert finding.what == "loss" and finding.rows == bad and finding.is_again
    assert finding.weights == {}
    assert list(finding.places) == [rank for rank in range(size) if results[rank][2]]
    assert text.splitlines()[0].startswith("rl iteration 3: the loss is not finite on rank")
    assert f"in rollouts {bad[0]} ({keys[0]}), {bad[1]} ({keys[1]})" in text
    assert "no weights were changed" in text.splitlines()[0] and len(text.splitlines()) < 24
    [record] = read(tmp_path / NONFINITE)
    assert (record["iteration"], record["rows"], record["problems"]) == (3, bad, keys)
    assert record["action"] == "ended"


def test_the_keys_that_are_named_are_those_of_the_problems():
    bad, keys, texts = run_ranks(1, _keys)[0]
    assert len(set(keys)) > 1 and keys == texts and bad


def _keys():
    session, engine = open_session("algorithm.resample_rounds=1")
    asked = []
    plain = rl.sample_groups

    def watched(*args):
        found = plain(*args)
        asked.extend(problem.key for problem in found.problems)
        return found

    rl.sample_groups = watched
    rollout, _ = collect_rollout(session, engine, 3)
    key = rollout_keys(session.run, rollout.trajectory)
    return _useful(rollout), [key(row) for row in range(len(asked))], asked


def _break_once(overrides):
    """Let one micro-batch on the last rank come out wrong, once."""
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    plain, calls = losses.LOSSES["policy"], []

    def faulty(*args):
        outputs = plain(*args)
        calls.append(1)
        is_it = len(calls) == 2 and dist.get_rank() == dist.get_world_size() - 1
        return replace(outputs, loss=outputs.loss * NAN) if is_it else outputs

    losses.LOSSES["policy"] = faulty
    with pytest.raises(NotFinite) as error:
        update_policy(session, engine, rollout, None)
    return error.value.finding, str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_passing_fault_is_told_from_one_that_comes_again(layout, tmp_path):
    size, overrides = LAYOUTS[layout]
    for finding, text in run_ranks(size, _break_once, [*overrides, f"run.dir={tmp_path}"]):
        assert list(finding.places) == [size - 1]
        assert finding.places[size - 1].startswith("micro-batch 2 of ")
        assert not finding.is_again and 0 < len(finding.rows) < 12
        assert "a second forward pass is finite: a transient hardware fault" in text


def _break_a_weight_or_gradient(part, overrides):
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    if session.run.ranks.rank == session.run.ranks.world_size - 1:
        weight = dict(engine.network.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
        if part == "weight":
            weight.data[0, 0] = NAN
        else:
            weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NotFinite) as error:
        update_policy(session, engine, rollout, None)
    return _useful(rollout), error.value.finding, str(error.value)


@pytest.mark.parametrize("part", ["weight", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_weight_or_gradient_is_named_with_its_rank(layout, part, tmp_path):
    size, overrides = LAYOUTS[layout]
    overrides = [*overrides, f"run.dir={tmp_path}"]
    results = run_ranks(size, _break_a_weight_or_gradient, part, overrides)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    for useful, finding, text in results:
        assert text == results[0][2]
        assert set(finding.rows) <= set(useful) and finding.rows
        if part == "weight":
            assert finding.what == "loss" and finding.weights == {size - 1: name}
            assert f"rank {size - 1}: {name}" in text
        else:
            assert finding.what == "gradient" and finding.weights == {}
            assert name in finding.places[size - 1]
            assert finding.rows == useful and "the update was of rollouts" in text


OVERLAP = ["optimizer.distributed=true", "ddp.overlap_grad_reduce=true"]
OVERLAP += ["ddp.overlap_param_gather=true"]


def _leave_out_some(overrides):
    """Make a good, a spoilt and a good update under a guard; then only the good ones."""
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    told: list[str] = []
    session.output.view.warn = told.append  # type: ignore[method-assign]
    guard = NanGuard(session, "rl")
    rollouts = [collect_rollout(session, engine, number)[0] for number in range(2)]
    made = [update_policy(session, engine, rollouts[0], None, guard=guard)[0]]
    before = _state(engine)
    spoilt = _spoilt(rollouts[1], _useful(rollouts[1])[:1])
    skipped, _ = update_policy(session, engine, spoilt, None, guard=guard)
    after = _state(engine)
    made.append(update_policy(session, engine, rollouts[1], None, guard=guard)[0])
    same = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    grads = [p.main_grad.abs().max().item() for _, p in engine.network.named_parameters()]
    return skipped, same and before[1:] == after[1:], made, _state(engine), told, max(grads)


def _only_good(overrides):
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    rollouts = [collect_rollout(session, engine, number)[0] for number in range(2)]
    made = [update_policy(session, engine, rollout, None)[0] for rollout in rollouts]
    return made, _state(engine)


@pytest.mark.parametrize("more", [[], OVERLAP], ids=["plain", "overlap"])
def test_an_update_that_is_left_out_leaves_no_trace(more, tmp_path):
    overrides = [*more, f"run.dir={tmp_path}", "resilience.skip_updates=1"]
    others = run_ranks(2, _only_good, overrides)
    for result, (expected, state) in zip(
        run_ranks(2, _leave_out_some, overrides), others, strict=True
    ):
        skipped, is_same, made, ours, told, gradient = result
        assert is_same and gradient > 0
        assert skipped["skipped_updates"] == 1 and skipped["learning_rate"] > 0
        assert not {"loss", "grad_norm", "ratio/max_error"} & set(skipped)
        assert made == expected and made[0]["skipped_updates"] == 0
        assert all(torch.equal(a, b) for a, b in zip(ours[0], state[0], strict=True))
        assert ours[1:] == state[1:]
        [text] = told
        assert "the update is skipped (1 in a row, resilience.skip_updates=1)" in text
    [record] = read(tmp_path / NONFINITE)
    assert record["action"] == "skipped" and record["iteration"] == 2


def _in_a_row(overrides):
    session, engine = open_session(*overrides)
    guard, actions = NanGuard(session, "rl"), []
    rollout, _ = collect_rollout(session, engine, 0)
    spoilt = _spoilt(rollout, _useful(rollout)[:1])
    for made in (spoilt, rollout, spoilt, spoilt):
        metrics, _ = update_policy(session, engine, made, None, guard=guard)
        actions.append(metrics["skipped_updates"])
    with pytest.raises(NotFinite, match=r"more than resilience.skip_updates=2 in a row"):
        update_policy(session, engine, spoilt, None, guard=guard)
    return actions


def test_only_so_many_in_a_row_are_left_out(tmp_path):
    overrides = [f"run.dir={tmp_path}", "resilience.skip_updates=2"]
    assert run_ranks(1, _in_a_row, overrides) == [[1, 0, 1, 1]]
    actions = [record["action"] for record in read(tmp_path / NONFINITE)]
    assert actions == ["skipped", "skipped", "skipped", "ended"]


def _spoil_sft(iteration, *, times):
    """Let the supervised loss of an iteration not be finite, so often."""
    plain, calls, struck = drawn.sft_batches, [], []

    def faulty(prompts, responses, example_ids, *args, **options):
        batches = plain(prompts, responses, example_ids, *args, **options)
        calls.append(1)
        if int(example_ids[0]) != (iteration - 1) * len(prompts) or len(struck) == times:
            return batches
        struck.append(1)
        return [replace(b, weights=b.weights.masked_fill(b.sources == 2, NAN)) for b in batches]

    drawn.sft_batches = faulty


def _spoil_rl(iteration, *, times):
    """Let the loss of an iteration not be finite, so often."""
    plain, struck = rl.update_policy, []

    def faulty(session, engine, rollout, *args, **options):
        if rollout.trajectory.weights_version == iteration - 1 and len(struck) < times:
            struck.append(1)
            rollout = _spoilt(rollout, _useful(rollout)[:1])
        return plain(session, engine, rollout, *args, **options)

    rl.update_policy = faulty


SPOIL = {"sft": _spoil_sft, "rl": _spoil_rl}
RUN = ["sft.iterations=3", "train.iterations=4", "evaluation.interval=2", "checkpoint.interval=2"]


def _train(run_dir, overrides, spoilt=None, times=1):
    if spoilt is not None:
        phase, iteration = spoilt
        SPOIL[phase](iteration, times=times)
    view, told = silent_view(), []
    view.warn = told.append  # type: ignore[method-assign]
    resolved = resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size())
    try:
        train(resolved, view)
    except NotFinite as error:
        return told, str(error)
    return told, None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the metrics of runs in which nothing happens, by ranks."""
    runs = {}

    def of(size):
        if size not in runs:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            assert run_ranks(size, _train, run_dir, [])[0] == ([], None)
            runs[size] = read(run_dir / "metrics.jsonl"), read(run_dir / "samples.jsonl")
        return runs[size]

    return of


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "spoilt", [("rl", 1), ("rl", 3), ("sft", 3)], ids=lambda s: f"{s[0]}{s[1]}"
)
def test_after_a_passing_fault_the_run_goes_back_and_ends_as_if_nothing_had_been(
    undisturbed, tmp_path, size, spoilt
):
    run_dir, (phase, iteration) = tmp_path / "run", spoilt
    told, error = run_ranks(size, _train, run_dir, ["resilience.roll_backs=1"], spoilt)[0]
    assert error is None
    assert told[0].startswith(f"{phase} iteration {iteration}: the loss is not finite")
    assert told[0].endswith(
        "rolling back to the last good checkpoint (1 of resilience.roll_backs=1)"
    )
    metrics, samples = undisturbed(size)
    assert same_metrics(read(run_dir / "metrics.jsonl"), metrics)
    assert read(run_dir / "samples.jsonl") == samples
    assert [r["action"] for r in read(run_dir / NONFINITE)] == ["ended"]


def test_what_comes_again_after_going_back_ends_the_run_and_says_so(tmp_path):
    run_dir = tmp_path / "run"
    changes = ["resilience.roll_backs=3"]
    [(told, error)] = run_ranks(1, _train, run_dir, changes, ("rl", 3), 9)
    assert len(told) == 1 and error is not None
    assert error.startswith("rl iteration 3: the loss is not finite on rank 0")
    assert "no transient hardware fault" in error
    assert [r["action"] for r in read(run_dir / NONFINITE)] == ["ended", "ended"]


def _spoil_sampling(iteration):
    """Let what an iteration samples be spoilt, once, before it is kept on disk."""
    plain, struck = dynamic_sampling.generate, []

    def faulty(session, network, request):
        found = plain(session, network, request)
        if request.weights_version != iteration - 1 or struck:
            return found
        struck.append(1)
        trajectory = found.trajectory
        logprobs = trajectory.logprobs.masked_fill(trajectory.logprobs != 0, NAN)
        return replace(found, trajectory=replace(trajectory, logprobs=logprobs))

    dynamic_sampling.generate = faulty


def _train_with_spoilt_sampling(run_dir, overrides, iteration):
    _spoil_sampling(iteration)
    return _train(run_dir, overrides)


@pytest.mark.parametrize("size", [1, 2])
def test_rollouts_that_were_spoilt_are_sampled_anew(undisturbed, tmp_path, size):
    run_dir = tmp_path / "run"
    changes = ["resilience.roll_backs=1", "checkpoint.background=true", "checkpoint.rollouts=true"]
    told, error = run_ranks(size, _train_with_spoilt_sampling, run_dir, changes, 4)[0]
    assert error is None and len(told) == 1
    assert told[0].startswith("rl iteration 4: the loss is not finite")
    assert same_metrics(read(run_dir / "metrics.jsonl"), undisturbed(size)[0])


def _spoil_weights(iteration):
    """Let a weight change by itself after an iteration's update, once."""
    plain, struck = rl.update_policy, []

    def faulty(session, engine, rollout, *args, **options):
        result = plain(session, engine, rollout, *args, **options)
        is_it = rollout.trajectory.weights_version == iteration - 1 and not struck
        if is_it and session.run.ranks.rank == session.run.ranks.world_size - 1:
            weight = dict(engine.network.named_parameters())["decoder.final_layernorm.weight"]
            weight.data[0] = NAN
        struck.extend([1] * is_it)
        return result

    rl.update_policy = faulty


def _train_with_spoilt_weights(run_dir, overrides, iteration):
    _spoil_weights(iteration)
    return _train(run_dir, overrides)


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    changes = ["evaluation.interval=0", "checkpoint.interval=1", "resilience.roll_backs=1"]
    plain, run_dir = tmp_path / "plain", tmp_path / "run"
    assert run_ranks(2, _train, plain, changes)[0] == ([], None)
    told, error = run_ranks(2, _train_with_spoilt_weights, run_dir, changes, 2)[0]
    assert error is None
    assert told[0].splitlines()[:2] == [
        "rl iteration 2: the weights are not finite on rank 1; they are not saved",
        "  rank 1: decoder.final_layernorm.weight",
    ]
    rows = read(run_dir / "metrics.jsonl")
    assert same_metrics(rows, read(plain / "metrics.jsonl")) and len(rows) == 9
    [record] = read(run_dir / NONFINITE)
    assert (record["what"], record["iteration"]) == ("weights", 2)


def test_without_roll_backs_the_run_ends(tmp_path):
    [(told, error)] = run_ranks(1, _train, tmp_path / "run", [], ("rl", 3))
    assert told == [] and error is not None and error.startswith("rl iteration 3: the loss")


@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_a_run_goes_on_without_an_update_that_is_left_out(tmp_path, phase):
    run_dir = tmp_path / "run"
    changes = ["resilience.skip_updates=1"]
    [(told, error)] = run_ranks(1, _train, run_dir, changes, (phase, 2))
    assert error is None and len(told) == 1
    rows = [r for r in read(run_dir / "metrics.jsonl") if r["phase"] == phase]
    assert [r["skipped_updates"] for r in rows] == [int(r["iteration"] == 2) for r in rows]
    assert ["loss" in r for r in rows] == [r["iteration"] != 2 for r in rows]
    text = (Path(run_dir) / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
