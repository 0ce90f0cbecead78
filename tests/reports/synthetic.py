"""Synthetic run directories: what a run would have written, with plausible numbers."""

import json
import math
import random
from pathlib import Path

from agrpo_megatron.config.schema import build, to_yaml
from agrpo_megatron.config.settings import Settings

HOSTILE = "<script>alert('x')</script>"
END = "<|endoftext|>"


def sft_row(rng, iteration, total):
    return {
        "phase": "sft",
        "iteration": iteration,
        "loss": 2.5 * math.exp(-4 * iteration / total) + 0.4 + rng.gauss(0, 0.05),
        "grad_norm": 1.5 + rng.random(),
        "learning_rate": 1e-3,
        "scored_tokens": 2048,
        "timing/iteration": 0.4 + 0.05 * rng.random(),
        "perf/tokens_per_second": 9000 + 500 * rng.random(),
    }


def rl_row(rng, iteration, total):
    progress = 1 / (1 + math.exp(-8 * (iteration / total - 0.45)))
    accuracy = min(1.0, max(0.0, 0.12 + 0.55 * progress + rng.gauss(0, 0.06)))
    row = {
        "phase": "rl",
        "iteration": iteration,
        "reward/mean": 0.1 + accuracy,
        "reward/std": 0.3,
        "accuracy": accuracy,
        "reward/format": min(1.0, 0.4 + 0.6 * progress + rng.gauss(0, 0.03)),
        "ratio/mean": 1 + rng.gauss(0, 2e-6),
        "ratio/max_error": (error := 10 ** rng.gauss(-5, 0.2)),
        "ratio/p99_error": 0.1 * error,
        "clip_fraction": abs(rng.gauss(0.02, 0.01)),
        "entropy": 1.2 - 0.7 * progress + rng.gauss(0, 0.03),
        "kl": 0.0,
        "loss": rng.gauss(0, 0.02),
        "grad_norm": 0.5 + 0.3 * rng.random(),
        "learning_rate": 1e-4,
        "live_steps/mean": 40 - 12 * progress + rng.gauss(0, 1),
        "completions/mean_length": 60 - 20 * progress + rng.gauss(0, 2),
        "zero_advantage_fraction": min(1.0, abs(0.5 - 0.4 * progress + rng.gauss(0, 0.05))),
        "rows": round(900 + 100 * rng.random()),
        "micro_batches": 6,
        "perf/packing_efficiency": 0.93,
        "timing/rollout": 2.0 - 0.5 * progress + 0.2 * rng.random(),
        "timing/reward": 0.05,
        "timing/update": 1.4 + 0.1 * rng.random(),
        "timing/iteration": 3.7,
        "perf/tokens_per_second": 8000 + 1500 * rng.random(),
    }
    return row | ({"timing/checkpoint": 1.5} if iteration % 50 == 0 else {})


def eval_row(rng, iteration, stage, total):
    progress = 1 / (1 + math.exp(-8 * (iteration / total - 0.45)))
    accuracy = round(256 * (0.1 + 0.55 * progress + rng.gauss(0, 0.01))) / 256
    return {
        "phase": "eval",
        "iteration": iteration,
        "stage": stage,
        "accuracy": accuracy,
        "reward/mean": accuracy + 0.08,
        "problems": 256,
        "timing/evaluation": 6.0,
    }


def sample(rng, iteration, correct, text, numbers):
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)] + [END] * 12
    order = list(range(len(pieces)))
    rng.shuffle(order)
    steps = [place // 2 for place in order]
    return {
        "phase": "eval",
        "iteration": iteration,
        "prompt": f"Use the numbers {numbers} to make 85.\nAnswer:",
        "completion": "".join(pieces),
        "pieces": pieces,
        "unmask_step": steps,
        "num_steps": max(steps) + 1,
        "reward": float(correct),
        "correct": correct,
        "solution": "4*25-3*5",
    }


def write_run(path: Path, *, iterations=200, sft=120, interval=25, seed=0) -> Path:
    """Write a run directory as a finished run leaves it; return it."""
    rng = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    settings = build(Settings, {"run": {"seed": seed}, "train": {"iterations": iterations}})
    (path / "config.yaml").write_text(to_yaml(settings))
    rows = [sft_row(rng, i, sft) for i in range(1, sft + 1)]
    rows.append(eval_row(rng, 0, "before", iterations))
    for i in range(1, iterations + 1):
        rows.append(rl_row(rng, i, iterations))
        if i % interval == 0 or i == iterations:
            stage = "after" if i == iterations else "interval"
            rows.append(eval_row(rng, i, stage, iterations))
    write_lines(path / "metrics.jsonl", rows)
    samples = [
        sample(rng, 0, False, "4 + 7 * 25 is\n" + HOSTILE, "4, 7, 25, 3"),
        sample(rng, 0, False, "I think that 25 * 3 = 75 and 75 + 7 = 82, so no", "25, 3, 7"),
        sample(rng, iterations, True, "(4*25) - (7+3) - 5\n= 85", "4, 7, 25, 3"),
        sample(rng, iterations, True, "25*3 + 7 + 3 = 85", "25, 3, 7"),
    ]
    write_lines(path / "samples.jsonl", samples)
    return path


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
