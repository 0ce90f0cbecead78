"""Which layouts are refused, and the nearest that fits."""

import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agrpo_megatron.config.parallel import layout_name
from agrpo_megatron.config.rules import nearest_layout, validate, validate_layout
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import ParallelSettings, Settings
from tests.config.test_parallel import LAYOUTS, LLADA_8B, MODELS, SMALL, parallel_of


def _refusal(model, parallel, world_size, key="parallel"):
    """Return why a layout is refused; empty where it is accepted."""
    try:
        validate_layout(model, parallel, world_size=world_size, key=key)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (
            "tp3-pp2",
            8,
            "parallel.tensor=3 does not divide model.num_query_groups=4; "
            "use parallel=tp4-pp2-cp1-dp1, the nearest layout that fits",
        ),
        (
            "tp8-sp",
            8,
            "parallel.tensor=8 does not divide model.num_query_groups=4; "
            "use parallel=tp4-sp-pp1-cp1-dp2, the nearest layout that fits",
        ),
        (
            "sp-pp2",
            2,
            "parallel.sequence=true needs parallel.tensor of at least 2; "
            "use parallel=tp1-pp2-cp1-dp1, the nearest layout that fits",
        ),
        (
            "tp2-vpp2",
            4,
            "parallel.virtual=2 needs parallel.pipeline of at least 2; "
            "use parallel=tp2-pp1-cp1-dp2, the nearest layout that fits",
        ),
        (
            "pp16",
            16,
            "parallel.pipeline=16 is more than model.num_layers=8; "
            "use parallel=tp1-pp8-cp1-dp2, the nearest layout that fits",
        ),
        (
            "pp4-vpp3",
            4,
            "parallel.pipeline=4 x parallel.virtual=3 stages is more than model.num_layers=8; "
            "use parallel=tp1-pp4-vpp2-cp1-dp1, the nearest layout that fits",
        ),
        (
            "tp4",
            6,
            "parallel.tensor=4 does not divide the 6 ranks that were started; start 8 ranks "
            "(torchrun --nproc-per-node 8) or use parallel=tp2-pp1-cp1-dp3, the nearest layout "
            "that fits",
        ),
        (
            "tp2-pp2",
            2,
            "parallel.pipeline=2 does not divide the 1 ranks left of the 2 that were started; "
            "start 4 ranks (torchrun --nproc-per-node 4) or use parallel=tp2-pp1-cp1-dp1, the "
            "nearest layout that fits",
        ),
        (
            "cp3",
            4,
            "parallel.context=3 does not divide the 4 ranks that were started; start 6 ranks "
            "(torchrun --nproc-per-node 6) or use parallel=tp1-pp1-cp4-dp1, the nearest layout "
            "that fits",
        ),
        (
            "tp2-dp2",
            8,
            "parallel.data=2 is not the 4 ranks left of the 8 that were started; start 4 ranks "
            "(torchrun --nproc-per-node 4) or use parallel=tp2-pp1-cp1-dp4, the nearest layout "
            "that fits",
        ),
        (
            "tp4-dp4",
            4,
            "parallel.data=4 is not the 1 ranks left of the 4 that were started; start 16 ranks "
            "(torchrun --nproc-per-node 16) or use parallel=tp4-pp1-cp1-dp1, the nearest layout "
            "that fits",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_nearest_that_does(
    layout, world_size, message
):
    assert _refusal(SMALL, parallel_of(layout), world_size) == message


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([3, 5, 2], "has 3 entries for 2 stages"),
        ([], "has 0 entries for 2 stages"),
        ([0, 8], "leaves a stage without a layer"),
        ([9, -1], "leaves a stage without a layer"),
        ([3, 4], "adds up to 7, not model.num_layers=8"),
    ],
)
def test_layers_fill_every_stage_with_the_whole_model(layers, said):
    parallel = replace(parallel_of("pp2"), layers=layers)
    assert _refusal(SMALL, parallel, 2) == (
        f"parallel.layers={layers} {said}; use parallel.layers=[4, 4] or use "
        "parallel=tp1-pp2-cp1-dp1, the nearest layout that fits"
    )
    assert not _refusal(SMALL, replace(parallel, layers=[3, 5]), 2)


def test_heads_are_named_where_there_are_no_groups():
    assert _refusal(LLADA_8B, parallel_of("tp3"), 3).startswith(
        "parallel.tensor=3 does not divide model.num_attention_heads=32; "
    )
    narrow = replace(LLADA_8B, ffn_hidden_size=12290)
    assert _refusal(narrow, parallel_of("tp4"), 4).startswith(
        "parallel.tensor=4 does not divide model.ffn_hidden_size=12290; "
        "use parallel=tp2-pp1-cp1-dp2"
    )


@given(MODELS, LAYOUTS, st.integers(1, 24))
@example(SMALL, ParallelSettings(pipeline=2, layers=[1, 1]), 2)
def test_what_a_refusal_suggests_is_accepted(model, layout, world_size):
    refusal = _refusal(model, layout, world_size)
    near = nearest_layout(model, layout, world_size=world_size)
    if not refusal:
        assert layout_name(near, world_size) == layout_name(layout, world_size)
        return
    found = re.search(r"use parallel=(\S+), the nearest layout that fits$", refusal)
    assert found, refusal
    assert parallel_of(found[1]) == near
    assert not _refusal(model, near, world_size)
    if started := re.search(r"start (\d+) ranks \(torchrun --nproc-per-node \1\)", refusal):
        assert not _refusal(model, replace(layout, layers=None), int(started[1]))
    if layers := re.search(r"use parallel.layers=\[([\d, ]+)\]", refusal):
        split = [int(count) for count in layers[1].split(", ")]
        assert not _refusal(model, replace(layout, layers=split), world_size)


@given(MODELS, LAYOUTS, st.integers(1, 24))
def test_no_layout_that_fits_is_nearer(model, layout, world_size):
    def far(other):
        product = 1.0
        for name in ("tensor", "pipeline", "context", "virtual"):
            one, two = getattr(other, name), getattr(layout, name)
            product *= max(one, two) / min(one, two)
        return product

    nearest = far(nearest_layout(model, layout, world_size=world_size))
    for tensor in range(1, world_size + 1):
        for pipeline in range(1, world_size // tensor + 1):
            for context in range(1, world_size // (tensor * pipeline) + 1):
                for virtual in range(1, 5):
                    other = ParallelSettings(
                        tensor=tensor, pipeline=pipeline, context=context, virtual=virtual
                    )
                    if far(other) < nearest - 1e-9:
                        assert _refusal(model, other, world_size)


# Rollouts.


@pytest.mark.parametrize("text", ["tp2", "sp-tp2-cp2", "tp4-pp1", "dp4"])
def test_rollouts_have_a_layout_of_their_own(text):
    settings = load(
        Settings, None, ["parallel=pp2-vpp2", f"rollout.parallel={text}", "model.num_layers=4"]
    )
    validate(settings, world_size=4)
    assert settings.rollout_layout == parallel_of(text)


def test_rollouts_take_the_training_layout_where_none_is_given():
    settings = load(Settings, None, ["parallel=pp2-vpp2", "parallel.layers=[1,1,1,1]"])
    validate(settings, world_size=4)
    assert settings.rollout_layout == settings.parallel


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tp3",
            "rollout.parallel=tp3-pp1-cp1: tensor=3 does not divide model.num_attention_heads=4; "
            "use rollout.parallel=tp4-pp1-cp1-dp1, the nearest layout that fits",
        ),
        (
            "tp1-sp",
            "rollout.parallel=tp1-sp-pp1-cp1: sequence=true needs tensor of at least 2; "
            "use rollout.parallel=tp1-pp1-cp1-dp4, the nearest layout that fits",
        ),
        (
            "tp4-dp2",
            "rollout.parallel=tp4-pp1-cp1-dp2: data=2 is not the 1 ranks left of the 4 that were "
            "started; start 8 ranks (torchrun --nproc-per-node 8) or use "
            "rollout.parallel=tp4-pp1-cp1-dp1, the nearest layout that fits",
        ),
        (
            "pp2-vpp2",
            "rollout.parallel=pp2-vpp2: vpp2 is for training only, as the rollouts' ring keeps "
            "every stage busy; use rollout.parallel=tp1-pp2-cp1-dp2",
        ),
        (
            "tp2-pp",
            "rollout.parallel=tp2-pp: 'pp' is not a part; write any of tpN, sp, ppN, vppN, cpN, "
            "epN, etpN, dpN (N from 1) joined by -",
        ),
    ],
)
def test_a_layout_of_rollouts_is_refused_by_its_own_key(text, message):
    with pytest.raises(ValueError, match=r"rollout\.parallel") as error:
        validate(load(Settings, None, [f"rollout.parallel={text}"]), world_size=4)
    assert str(error.value) == message


def test_an_architecture_is_judged_once_it_was_read(tmp_path):
    """With model.load the layers and heads of the settings are not yet the model's."""
    settings = load(Settings, None, [f"model.load={tmp_path}", "parallel=tp8-pp8"])
    validate(settings, world_size=64)
    read = replace(LLADA_8B, load=str(tmp_path))
    validate(replace(settings, model=read), world_size=64)
    with pytest.raises(ValueError, match=r"parallel\.tensor=8 does not divide"):
        validate(replace(settings, model=replace(read, num_query_groups=4)), world_size=64)


TWO_TASKS = ["task.name=mixture", "task.mixture={a: {name: countdown}, b: {name: sudoku}}"]


@pytest.mark.parametrize("key", ["checkpoint.best", "train.stop_metric"])
def test_a_metric_that_no_evaluation_has_is_refused(key):
    rest = [] if key == "checkpoint.best" else ["train.stop_patience=3"]
    for name in ("accuracy", "reward/mean", "reward/format", "summary/macro"):
        validate(load(Settings, None, [f"{key}={name}", *rest]))
    validate(load(Settings, None, [f"{key}=accuracy/b", *rest, *TWO_TASKS]))
    for name, more in (("accuracy/b", []), ("accuracy/c", TWO_TASKS), ("loss", [])):
        with pytest.raises(
            ValueError, match=f"^{key}={name} is not an evaluation metric; use accuracy, "
        ) as e:
            validate(load(Settings, None, [f"{key}={name}", *rest, *more]))
        assert ("accuracy/a, accuracy/b" in str(e.value)) == bool(more)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.stop_target=0.9"], "train.stop_target=0.9 needs train.stop_metric; use"),
        (["train.stop_patience=4"], "train.stop_patience=4 needs train.stop_metric; use"),
        (["train.stop_metric=accuracy"], "train.stop_metric=accuracy needs train.stop_target or"),
        (
            ["train.stop_metric=accuracy", "train.stop_target=1", "evaluation.interval=0"],
            "evaluation.interval=0 makes none; use for example evaluation.interval=25",
        ),
        (
            ["task.pass_rate_low=0.7", "task.pass_rate_high=0.2"],
            "task.pass_rate_low=0.7 is above task.pass_rate_high=0.2, which leaves no problem",
        ),
    ],
)
def test_settings_that_contradict_one_another_are_refused(overrides, said):
    with pytest.raises(ValueError, match="^t") as error:
        validate(load(Settings, None, overrides))
    assert said in str(error.value)
