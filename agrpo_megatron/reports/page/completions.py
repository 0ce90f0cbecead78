"""The completions of the HTML report: every token a cell, coloured by its denoising step."""

import itertools
from typing import Any

from agrpo_megatron.reports.read import Row, Run
from agrpo_megatron.reports.text import compact, number, tail_start, visible

PROMPTS_SHOWN = 8
REPLAY_SECONDS = 5.0


def prompts(run: Run) -> list[dict[str, Any]]:
    """Return completions of the first and the last sampled iteration, by prompt; may be empty.

    Each prompt has its first sample of an iteration; prompts sampled in both come first.
    """
    phase = "eval" if any(sample["phase"] == "eval" for sample in run.samples) else "rl"
    chosen = [sample for sample in run.samples if sample["phase"] == phase]
    if not chosen:
        return []
    iterations = [sample["iteration"] for sample in chosen]
    by_prompt: dict[str, list[Row]] = {}
    for end in sorted({min(iterations), max(iterations)}, reverse=True):
        samples = [sample for sample in reversed(chosen) if sample["iteration"] == end]
        for prompt, sample in {str(s.get("prompt")): s for s in samples}.items():
            by_prompt.setdefault(prompt, []).insert(0, sample)
    ordered = sorted(by_prompt.items(), key=lambda item: -len(item[1]))
    return [
        {"text": prompt, "solution": pair[-1].get("solution"), "cards": [*map(_card, pair)]}
        for prompt, pair in ordered[:PROMPTS_SHOWN]
    ]


def _card(sample: Row) -> dict[str, Any]:
    iteration = sample["iteration"]
    steps = int(number(sample, "num_steps") or max(map(int, sample["unmask_step"]), default=0) + 1)
    is_before = iteration == 0 and sample["phase"] == "eval"
    reward = number(sample, "reward")
    facts = [f"reward {compact(reward)}"] if reward is not None else []
    return {
        "title": "Before RL" if is_before else f"Iteration {iteration}",
        "correct": sample.get("correct"),
        "facts": ", ".join([*facts, f"{steps} denoising steps"]),
        "delay": f"{REPLAY_SECONDS / max(1, steps):.3f}s",
        "cells": _cells(sample, steps),
    }


def _cells(sample: Row, num_steps: int) -> list[dict[str, Any]]:
    """Return a cell per token; the run of equal tokens at the end is folded into one."""
    pieces = [str(piece) for piece in sample["pieces"]]
    steps = [int(step) for step in sample["unmask_step"]]
    edges = sorted({*range(tail_start(pieces) + 1), len(pieces)})
    cells = []
    for start, end in itertools.pairwise(edges):
        first, last = min(steps[start:end]), min(max(steps[start:end]), num_steps - 1)
        is_folded = end - start > 1
        cell = {
            "text": visible(pieces[start]),
            "label": f"{first} to {last}" if first < last else str(first),
            "step": min(first, num_steps),
            "share": f"{first / max(1, num_steps - 1):.3f}",
            "is_filled": first >= num_steps,
            "count": end - start if is_folded else 0,
            "breaks": 0 if is_folded else pieces[start].count("\n"),
        }
        cells.append(cell)
    return cells
