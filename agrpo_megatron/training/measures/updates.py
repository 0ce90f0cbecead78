"""The metrics of an iteration from those of its updates."""

from typing import Any

from agrpo_megatron.estimators.losses import PART_ERROR
from agrpo_megatron.trajectories import STEP_PARTS


def combined(results: list[dict[str, float]]) -> dict[str, Any]:
    """Combine the updates of an iteration; the ratio's error is the first update's.

    Skipped updates are excluded from the means. Where no token was scored the ratio is 1.
    """
    made = [r for r in results if not r["skipped_updates"]]
    return {
        **(_made_metrics(made) if made else {}),
        "learning_rate": results[-1]["learning_rate"],
        "skipped_updates": len(results) - len(made),
        "rows": sum(r["rows"] for r in results),
        "scoring_rows": sum(r["scoring_rows"] for r in results),
        "flops": sum(r["flops"] for r in results),
        "micro_batches": sum(r["micro_batches"] for r in results),
        "perf/packing_efficiency": sum(r["filled"] for r in results)
        / sum(r["slots"] for r in results),
    }


def _made_metrics(results: list[dict[str, float]]) -> dict[str, Any]:
    """Combine the updates that were made; a loss's own metrics are means over them."""
    tokens = sum(r["scored_tokens"] for r in results)
    scored = max(1.0, tokens)
    clipped, high = (
        sum(r[name] for r in results) for name in ("clipped_tokens", "clipped_high_tokens")
    )
    own = sorted({name for result in results for name in result if name.startswith("loss/")})
    parts = [n for n in range(STEP_PARTS) if f"{PART_ERROR}{n}" in results[0]]
    errors = [results[0][f"{PART_ERROR}{n}"] for n in parts]
    return {
        "loss": sum(r["loss"] for r in results) / len(results),
        "grad_norm": max(r["grad_norm"] for r in results),
        "ratio/mean": sum(r["ratio_sum"] for r in results) / tokens if tokens else 1.0,
        "ratio/max_error": results[0]["ratio_max_error"],
        "ratio/p99_error": results[0]["ratio_p99_error"],
        **({"by_step/ratio_error": [e if e >= 0 else None for e in errors]} if errors else {}),
        **({"experts/changed": results[0]["changed"]} if "changed" in results[0] else {}),
        "clip_fraction": clipped / scored,
        "clip_fraction/low": (clipped - high) / scored,
        "clip_fraction/high": high / scored,
        "kl": sum(r["kl_sum"] for r in results) / scored,
        **{n: sum(r.get(n, 0.0) for r in results) / len(results) for n in own},
    }
