"""Layouts of large models: their bytes against built models, and what orders them."""

import pytest
import torch.distributed as dist

from agrpo_megatron.config.parallel import layout_text
from agrpo_megatron.megatron.platform import prepare_platform
from agrpo_megatron.planning.cluster import Given, read_cluster, read_ranks
from agrpo_megatron.planning.passes import TILE
from agrpo_megatron.planning.presets import open_model, read_layout
from agrpo_megatron.planning.ranking import GIB, rank_layouts
from agrpo_megatron.planning.reasons import changed, comparison, scenarios
from agrpo_megatron.scaling.memory import SPARE
from tests.ranks import run_ranks
from tests.scaling.test_experts import built

GPUS = {"llada2-flash": "128xH100", "70b": "256xH100"}


def ranked(name, gpus, *overrides, given=None, only=None):
    model = open_model(name, overrides, ranks=read_ranks(gpus))
    cluster = read_cluster(gpus, model.settings.precision, given or Given())
    return rank_layouts(model, cluster, only=only)


@pytest.fixture(scope="module", params=GPUS)
def large(request):
    return request.param, ranked(request.param, GPUS[request.param])


def _bytes_of(cases):
    dist.destroy_process_group()
    prepare_platform(1)
    found = {}
    for settings, world in cases:
        for stage in {0, settings.parallel.pipeline - 1}:
            found[layout_text(settings.parallel), stage] = built(settings, world, stage)
    return found


def test_bytes_of_planned_layouts_are_those_of_built_models(large):
    """Weights, gradients and states of the three fastest shapes, on the meta device."""
    _, ranking = large
    shapes, world = {}, ranking.cluster.ranks
    for one in ranking.fitting:
        parallel = one.settings.parallel
        if parallel.virtual == 1:
            shapes.setdefault((parallel.tensor, parallel.pipeline), one)
    cases = [(one.settings, world) for one in list(shapes.values())[:3]]
    assert len(cases) == 3
    (found,) = run_ranks(1, _bytes_of, cases, timeout=240)
    assert len(found) >= 5
    for case, (held, predicted) in found.items():
        assert held == predicted, case


def test_large_models_have_layouts_that_fit_and_reasons(large):
    name, ranking = large
    first, second = ranking.fitting[:2]
    assert first.seconds <= second.seconds and ranking.too_large
    room = SPARE * 80 * GIB
    assert all(one.memory.total < room for one in ranking.fitting)
    assert all(one.memory.total >= room for one in ranking.too_large)
    assert f"{first.seconds / second.seconds:.3f}" <= "1.000" and second.name in comparison(
        first, second
    )
    assert (sum(ranking.illegal.values()) > 0) == (name == "llada2-flash"), "blocks refuse context"
    texts = [one.text for one in scenarios(ranking)]
    assert "160 GiB on each GPU" in texts
    assert all(one.first.seconds < one.earlier.seconds for one in scenarios(ranking))
    twice = {one.name: one.seconds for one in changed(ranking, ranking.cluster, completions=2)}
    assert first.seconds < twice[first.name] < 2.01 * first.seconds


def test_seconds_of_one_rank_by_hand():
    """LLaDA-8B on one H200: products at 55 % of the peak, and no exchange."""
    given = ["lora.rank=16", "algorithm.prompts_per_iteration=4"]
    ranking = ranked("llada-8b", "1xH200", *given)
    (one,) = ranking.fitting
    times, rows = one.iteration.times, one.iteration.rollout.batches.largest
    assert rows == 8192 // 512 and one.iteration.rollout.batches.count == 128 * 32 // rows
    rate = 989e12 * 0.55 * 8192 / (8192 + TILE)
    assert times.rollout == pytest.approx(ranking.flops.rollout / rate)
    assert times.update == pytest.approx(ranking.flops.update / rate)
    others = times.rollout_exchange, times.rollout_bubble, times.update_exchange, times.gradients
    assert others == (0, 0, 0, 0) and times.reshard == 0


def test_exchange_of_tensor_parallelism_by_hand():
    """Two sums of the residual stream for each layer and direction, over NVLink or the network."""
    parallel = read_layout("tp2")
    near = ranked("llada-8b", "2xH100", only=parallel).too_large
    apart = ranked("llada-8b", "2xH100", only=parallel, given=Given(gpus_per_node=1)).too_large
    found = [one.iteration.rollout.of.exchange for one in (near[0], apart[0])]
    # The embedding, and two of each layer; those of the last layer of the 32 scored tokens only.
    streams = (1 + 2 * 31) * 8192 + 2 * 16 * 256 / 128
    for exchange, link in zip(found, (450e9, 50e9), strict=True):
        assert exchange == pytest.approx(streams * 4096 * 2 / (0.8 * link) + 65 * 15e-6)


def test_decoding_of_few_cached_rows_is_as_slow_as_the_reading_of_weights():
    given = ["algorithm.prompts_per_iteration=1", "algorithm.group_size=2", "lora.rank=16"]
    given.append("sampling.early_end=false")
    slow, fast = (
        ranked("sdar-8b", "1xH100", *given, given=Given(bandwidth=gbs)).fitting[0]
        for gbs in (500.0, 1000.0)
    )
    ratio = slow.iteration.times.rollout / fast.iteration.times.rollout
    assert ratio == pytest.approx(2, rel=1e-6)


def test_a_bubble_is_the_share_of_waiting_stages():
    """Micro-batches, and one less than stages that wait; virtual stages divide it."""
    found = {}
    for text in ("pp4", "pp4-vpp2"):
        ranking = ranked("llada-8b", "4xH100", only=read_layout(text))
        one = (ranking.fitting + ranking.too_large)[0]
        times, passes = one.iteration.times, one.iteration.update
        found[text] = times.update_bubble / (times.update + times.update_exchange)
        expected = 3 / (2 if "vpp" in text else 1) / passes.micro_batches
        assert found[text] == pytest.approx(expected)
    assert found["pp4-vpp2"] < found["pp4"]


def test_more_memory_and_faster_gpus_are_never_slower():
    h100, h200, b200 = (
        ranked("llada-8b", f"8x{gpu}").fitting[0] for gpu in ("H100", "H200", "B200")
    )
    assert h100.seconds >= h200.seconds > b200.seconds


def test_what_a_plan_overrides_is_used():
    ranking = ranked("llada-8b", "8xH100", given=Given(peak=500, mfu=0.4, overlap=1.0))
    assert ranking.cluster.rate == pytest.approx(0.4 * 500e12)
    assert all(one.iteration.times.gradients == 0 for one in ranking.fitting)
    parallel, given = read_layout("tp2-sp-ep8"), Given(links=0.4, latency=30, launch=0, experts=1)
    slow, usual = (
        ranked("llada2-flash", "64xH100", only=parallel, given=one).too_large[0].iteration
        for one in (given, Given())
    )
    assert slow.rollout.of.exchange == pytest.approx(2 * usual.rollout.of.exchange)
    assert slow.times.update < usual.times.update
    with pytest.raises(ValueError, match="--links=2 must be from 0.0001 to 1"):
        ranked("llada-8b", "8xH100", given=Given(links=2))
    plain = ranked("llada-8b", "8xH100")
    assert any(one.iteration.times.gradients > 0 for one in plain.fitting)
