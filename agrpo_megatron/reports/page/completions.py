"""The completions of the HTML report: every token a cell, coloured by its denoising step."""

from collections.abc import Sequence
from typing import Any

from agrpo_megatron.reports.read import Row, Run
from agrpo_megatron.reports.text import compact, number, tail_start, visible

PROMPTS_SHOWN = 8
REPLAY_SECONDS = 5.0


def prompts(run: Run) -> list[dict[str, Any]]:
    """Return completions of the first and the last sampled iteration, by prompt; may be empty."""
    phase = "eval" if any(sample["phase"] == "eval" for sample in run.samples) else "rl"
    chosen = [sample for sample in run.samples if sample["phase"] == phase]
    if not chosen:
        return []
    ends = {min(s["iteration"] for s in chosen): None, max(s["iteration"] for s in chosen): None}
    pairs = _by_prompt([[s for s in chosen if s["iteration"] == i] for i in reversed(ends)])
    return [
        {
            "text": prompt,
            "solution": samples[-1].get("solution"),
            "cards": [_card(sample) for sample in samples],
        }
        for prompt, samples in pairs
    ]


def _by_prompt(newest_first: Sequence[Sequence[Row]]) -> list[tuple[str, list[Row]]]:
    """Return up to PROMPTS_SHOWN prompts, each with its first sample per iteration, oldest first.

    Prompts sampled at both ends come first.
    """
    prompts: dict[str, list[Row]] = {}
    for samples in newest_first:
        for prompt, sample in {str(s.get("prompt")): s for s in reversed(samples)}.items():
            prompts.setdefault(prompt, []).insert(0, sample)
    ordered = sorted(prompts.items(), key=lambda item: -len(item[1]))
    return ordered[:PROMPTS_SHOWN]


def _card(sample: Row) -> dict[str, Any]:
    iteration, steps = sample["iteration"], _num_steps(sample)
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


def _num_steps(sample: Row) -> int:
    steps = number(sample, "num_steps")
    return int(steps) if steps else max(map(int, sample["unmask_step"]), default=0) + 1


def _cells(sample: Row, num_steps: int) -> list[dict[str, Any]]:
    """Return a cell per token; the run of equal tokens at the end is folded into one."""
    pieces = [str(piece) for piece in sample["pieces"]]
    steps = [int(step) for step in sample["unmask_step"]]
    tail = tail_start(pieces)
    cells = [
        _cell(piece, step, str(step), num_steps) | {"breaks": piece.count("\n")}
        for piece, step in zip(pieces[:tail], steps[:tail], strict=True)
    ]
    if tail < len(pieces):
        first, last = min(steps[tail:]), min(max(steps[tail:]), num_steps - 1)
        label = f"{first} to {last}" if first < last else str(first)
        cells.append(_cell(pieces[-1], first, label, num_steps) | {"count": len(pieces) - tail})
    return cells


def _cell(piece: str, step: int, label: str, num_steps: int) -> dict[str, Any]:
    return {
        "text": visible(piece),
        "label": label,
        "step": min(step, num_steps),
        "share": f"{step / max(1, num_steps - 1):.3f}",
        "is_filled": step >= num_steps,
        "count": 0,
        "breaks": 0,
    }
