"""A cached policy whose rollouts are ahead of their update, with other features: each pair runs."""

from agrpo_megatron.training.run import train
from tests.config.test_rules_pairs import FEATURES, MODES
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import resolved_run, silent_view, unknown_metrics

PAIRS = (
    "adapters",
    "experts",
    "freed memory",
    "steps of most entropy",
    "a ratio of a sequence",
    "tokens put back",
    "draws of blocks",
    "measured draws",
    "an exact KL",
    "Dream",
)
RUN = ["train.iterations=2", "train.mismatch_alarm=1e9", "train.mismatch_tail_alarm=1e9"]


def _train(folder):
    """Return the metrics of each pair's run, and what it warned of."""
    found = {}
    for number, name in enumerate(PAIRS):
        view, warned = silent_view(), []
        view.warn = warned.append  # type: ignore[method-assign]
        run_dir = folder / str(number)
        train(resolved_run(run_dir, *MODES["cached ahead"], *FEATURES[name], *RUN), view)
        found[name] = read(run_dir / "metrics.jsonl"), warned
    return found


def test_pairs_of_features_train(tmp_path):
    """Sampler and update agree in the first iteration; the second one has older rollouts."""
    [found] = run_ranks(1, _train, tmp_path)
    for name, (records, warned) in found.items():
        first, second = (record for record in records if record["phase"] == "rl")
        assert first["mismatch/max"] < 1 + 1e-5, name
        assert 1.01 < second["mismatch/max"] < 1e6, name
        assert max(r["ratio/max_error"] for r in (first, second)) < 1e-5, name
        assert (first["rollout/staleness"], second["rollout/staleness"]) == (0, 1), name
        assert 0 < second["grad_norm"] < 1e3 and second["flops"] == second["update_flops"], name
        assert unknown_metrics(records) == set() and warned == [], name
