"""The record of a measurement, and its table."""

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agrpo_megatron.benchmark.measure import speedup
from agrpo_megatron.benchmark.plan import Plan
from agrpo_megatron.benchmark.run import Found, Result
from agrpo_megatron.runs.history.provenance import provenance
from agrpo_megatron.training.measures.devices import device_text

# Keys of a side in the record, with the labels of the table and the unit of its numbers.
QUANTITIES = {
    "forwards": ("forward passes", 1),
    "token_forwards": ("tokens through the layers", 1),
    "scored_rows": ("rows of the head", 1),
    "flops": ("GFLOP", 1e9),
    "seconds_median": ("seconds, median", 1),
    "seconds_min": ("seconds, least", 1),
    "tokens_per_second": ("completion tokens per second", 1),
    "peak_bytes": ("peak memory, MiB", 2**20),
    "flops_per_second": ("GFLOP/s", 1e9),
    "ceiling_share": ("share of the ceiling", 1),
}


def record(plan: Plan, found: Found) -> dict[str, Any]:
    """Return what was measured, and of what, as JSON takes it."""
    reference, equality = found.reference, found.equality
    ours = _side(plan, found.ours, found.ceiling)
    theirs = None if reference is None else _side(plan, reference, found.ceiling)
    settings = plan.settings
    clock = "CPU seconds of the process" if found.device.type == "cpu" else "seconds"
    return {
        "kind": plan.kind,
        "model": _shape(plan),
        "work": {
            "batch": plan.batch,
            "prompt_length": plan.prompt_length,
            "completion_length": settings.sampling.completion_length,
            "block_length": settings.sampling.block_length,
            "denoising_steps": settings.sampling.denoising_steps,
            "unmasking": settings.sampling.unmasking,
            "temperature": settings.sampling.temperature,
            "top_k": settings.sampling.top_k,
            "top_p": settings.sampling.top_p,
            "mc_samples": settings.algorithm.draws,
            "zero_advantage_rollouts": plan.zero_rollouts,
            "token_budget": settings.train.token_budget,
        },
        "threads": settings.run.threads,
        "repeats": plan.repeats,
        "clock": clock,
        "ours": ours,
        "reference": theirs,
        "ratios": None if theirs is None else _ratios(ours, theirs),
        "speedup": None if reference is None else speedup(found.ours.seconds, reference.seconds),
        "equality": None if equality is None else vars(equality),
        "ceiling_flops_per_second": found.ceiling,
        "body": _body(found),
        "provenance": provenance(settings, ranks=1, device=device_text(found.device), seconds=0.0),
    }


def _body(found: Found) -> dict[str, float] | None:
    return None if found.body is None else {**vars(found.body), "share": found.body.share}


def _shape(plan: Plan) -> dict[str, Any]:
    model = plan.settings.model
    names = ("family", "load", "num_layers", "hidden_size", "num_attention_heads")
    names += ("num_query_groups", "ffn_hidden_size", "vocab_size")
    return {name: getattr(model, name) for name in names}


def _side(plan: Plan, result: Result, ceiling: float | None) -> dict[str, Any]:
    median = statistics.median(result.seconds)
    rate = result.counted.flops / median
    tokens = plan.batch * plan.settings.sampling.completion_length
    return {
        **vars(result.counted),
        "seconds": result.seconds,
        "seconds_median": median,
        "seconds_min": min(result.seconds),
        "tokens_per_second": tokens / median,
        "peak_bytes": result.peak_bytes,
        "flops_per_second": rate,
        "ceiling_share": None if ceiling is None else rate / ceiling,
    }


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Return the reference's quantities over ours."""
    values = {key: (theirs[key], ours[key]) for key in QUANTITIES}
    return {key: a / b for key, (a, b) in values.items() if a is not None and b}


def table(found: dict[str, Any]) -> Table:
    """Return a table of a record: a quantity a row."""
    ours, theirs, ratios = found["ours"], found["reference"], found["ratios"]
    shown = Table(box=SIMPLE_HEAD)
    columns = ("ours",) if theirs is None else ("ours", "reference", "reference / ours")
    shown.add_column(found["kind"])
    for column in columns:
        shown.add_column(column, justify="right")
    for key, (label, unit) in QUANTITIES.items():
        if ours[key] is None:
            continue
        cells = [_number(ours[key], unit)]
        if theirs is not None:
            cells += [_number(theirs[key], unit), f"{ratios[key]:.2f}" if key in ratios else ""]
        shown.add_row(label, *cells)
    return shown


def lines(found: dict[str, Any]) -> list[str]:
    """Return what the table does not say: what was equal, the speedup, and the ceiling."""
    said, equal, gain = [], found["equality"], found["speedup"]
    if equal is not None:
        error = equal["gradient_error"]
        more = "" if error is None else f", gradients within {error:.1e} of their length"
        if (error := equal["bf16_error"]) is not None:
            more += f" ({error:.1e} in bfloat16)"
        said.append(
            f"equal to the reference in float32: all {equal['tokens']} tokens and their steps, "
            f"log-probs within {equal['logprob_error']:.1e}{more}"
        )
    if gain is not None:
        said.append(
            f"speedup {gain['median']:.2f}, from {gain['min']:.2f} to {gain['max']:.2f} in "
            f"{found['repeats']} repeats ({found['clock']})"
        )
    if (rate := found["ceiling_flops_per_second"]) is not None:
        said.append(
            f"ceiling {rate / 1e9:.4g} GFLOP/s: products of a layer's matrices, best of all"
        )
    if (body := found["body"]) is not None:
        said.append(
            f"layers {body['flops_per_second'] / 1e9:.4g} GFLOP/s, {body['share']:.0%} of products "
            f"in their shapes, attention included ({body['products'] / 1e9:.4g} GFLOP/s)"
        )
    return said


def _number(value: float, unit: float) -> str:
    if isinstance(value, int) and unit == 1:
        return f"{value:,}"
    return f"{value / unit:,.0f}" if value / unit >= 1000 else f"{value / unit:.3g}"
