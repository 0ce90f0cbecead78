"""Evaluation with the sampler of `evaluation`: within a run, and over a grid."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from agrpo_megatron.evaluation.failures import refuse_failing
from agrpo_megatron.evaluation.grid import EvaluationProgress, cell_sampling
from agrpo_megatron.evaluation.plan import Batch, Plan
from agrpo_megatron.evaluation.results import Line, ResultStore
from agrpo_megatron.evaluation.scores import scores
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import on_main
from agrpo_megatron.rollout.generate import generate
from agrpo_megatron.rollout.metrics import failure_warning, reward_metrics
from agrpo_megatron.rollout.records import sample_records
from agrpo_megatron.rollout.requests import Request
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.text.chat import shown_prompt
from agrpo_megatron.types import Problem, Reward

EVALUATION_IDS = 1 << 40  # noise indices of evaluation, far from those of training
SAMPLE_IDS = 1 << 24  # noise indices from one sample of a problem to the next


def evaluate(session: Session, network: Network, *, iteration: int, stage: str) -> dict[str, float]:
    """Complete all held-out problems, log accuracy and samples, and return the metrics.

    Called by every rank; data-parallel ranks share the problems.

    Args:
        stage: "before", "interval" or "after" the reinforcement learning.

    Raises:
        Stopped: the ranks agreed to stop; finished completions are cached.
        ValueError: it is the evaluation before training, and most rewards failed.
    """
    started = time.perf_counter()
    run, output = session.run, session.output
    problems = run.task.problems("eval")
    ids = torch.tensor(_rollout_ids(problems), device=network.ranks.device)
    sampling, name = run.settings.evaluation_sampling, f"evaluation-{iteration:06d}"
    request = Request(problems, ids, sampling, split="eval", name=name)
    graded = generate(session, network, request)
    if stage == "before":
        refuse_failing(run, problems, graded.rewards, when="of the first evaluation")
    found = scores(run.task, problems, [[reward] for reward in graded.rewards])
    low, high = found["accuracy_interval"]
    record = {
        "phase": "eval",
        "iteration": iteration,
        "stage": stage,
        "problems": len(problems),
        **reward_metrics(graded.rewards, problems),
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"summary/{name}": value for name, value in found["summary"].items()},
        "timing/evaluation": time.perf_counter() - started,
    }
    output.log.metrics(record)
    samples = sample_records(run, problems, graded, split="eval")
    output.log.samples(samples, phase="eval", iteration=iteration, stage=stage)
    output.view.evaluation(record)
    warning = failure_warning(graded.rewards, run.settings.task.grader.failed_score)
    if warning is not None:
        output.view.warn(f"evaluation after iteration {iteration}: {warning}")
    return record


def _rollout_ids(problems: Sequence[Problem]) -> list[int]:
    """Return the noise index of each problem: its place within its own task."""
    ids = defaultdict(lambda: itertools.count(EVALUATION_IDS))
    return [next(ids[problem.task]) for problem in problems]


def evaluate_grid(
    session: Session,
    network: Network,
    plan: Plan,
    store: ResultStore,
    show: Callable[[EvaluationProgress], None],
    tick: Callable[[int, float], None] = lambda number, share: None,
) -> dict[str, Any]:
    """Complete the rest of a plan and store it; called by every rank.

    Returns the results, on the main rank. A completion depends only on its problem, its sample
    number and the seed, so an interruption does not change the results.

    Args:
        show: called on the main rank after every batch.
        tick: called on every rank after a denoising step, with the batch's number and share done.

    Raises:
        ValueError: on every rank, if the stored completions do not match the plan.
    """
    is_main, batches = session.run.ranks.is_main, plan.batches()
    earlier, done = _resumed(session, plan, batches, store)
    results: dict[str, Any] = {"label": plan.evaluation["label"], "finished": False, "cells": []}
    of_cell: list[Line] = []
    for number, batch in enumerate(batches):
        if number < done:
            of_cell += earlier[number] if is_main else []
        else:
            lines = _complete(session, network, plan, batch, partial(tick, number))
            if not is_main:
                continue
            store.append(lines)
            of_cell += lines
            show(_progress(plan, batches, number, done=done, lines=of_cell))
        if is_main and batch.is_last:
            results["cells"].append(_cell_results(plan, batch, of_cell))
            results["finished"] = number + 1 == len(batches)
            of_cell = []
            store.write(results)
    return results


def _resumed(
    session: Session, plan: Plan, batches: Sequence[Batch], store: ResultStore
) -> tuple[list[list[Line]], int]:
    """Return the batches in the store, on the main rank, and on every rank their number."""
    earlier: list[list[Line]] = []

    def read() -> int:
        earlier.extend(_earlier(plan, batches, store))
        return len(earlier)

    return earlier, on_main(session.run.ranks, read)


def _earlier(plan: Plan, batches: Sequence[Batch], store: ResultStore) -> list[list[Line]]:
    """Return the complete batches of the store, and cut the store back to them.

    Raises:
        ValueError: the stored completions do not match the plan.
    """
    store.begin(plan.evaluation)
    lines, found, start = store.lines(), [], 0
    for batch in batches:
        expected = [
            (batch.label, plan.problems[batch.label][place].key, sample)
            for place in batch.places
            for sample in range(plan.samples)
        ]
        part = lines[start : start + len(expected)]
        if len(part) < len(expected):
            break
        if [(line["task"], line["key"], line["sample"]) for line in part] != expected:
            raise store.changed(start + 1)
        found.append(part)
        start += len(expected)
    store.keep(start)
    return found


def _complete(
    session: Session, network: Network, plan: Plan, batch: Batch, tick: Callable[[float], None]
) -> list[Line]:
    """Complete a batch; return its lines of completions.jsonl. Called by every rank.

    Raises:
        ValueError: it is the first one of a cell, and most rewards failed.
    """
    run, sampling = session.run, cell_sampling(session.run.settings, batch.cell)
    asked = [(place, sample) for place in batch.places for sample in range(plan.samples)]
    noise = [EVALUATION_IDS + place + sample * SAMPLE_IDS for place, sample in asked]
    problems = [plan.problems[batch.label][place] for place, _ in asked]
    done, total = 0, len(asked) * sampling.most_steps / network.ranks.data.size

    def on_step(rows: int) -> None:
        nonlocal done
        done += rows
        tick(min(1.0, done / total))

    request = Request(
        problems,
        torch.tensor(noise, device=network.ranks.device),
        sampling,
        split=plan.split,
        on_step=on_step,
    )
    graded = generate(session, network, request)
    if batch.places.start == 0:
        refuse_failing(run, problems, graded.rewards, when="of the first batch")
    trajectory, stop_ids = graded.trajectory, run.tokenizer.stop_ids
    prompts = task_prompts(run.task, problems, split=plan.split)
    flops = completion_flops(trajectory, run.settings)
    steps, tokens = trajectory.num_steps.tolist(), trajectory.tokens.tolist()
    return [
        {
            "task": batch.label,
            "key": problems[row].key,
            "sample": sample,
            **asdict(batch.cell),
            "prompt": shown_prompt(prompts[row]),
            "input": run.tokenizer.text_of(prompts[row]),
            "completion": run.tokenizer.decode(ids),
            "raw": run.tokenizer.decode_raw(ids),
            **asdict(graded.rewards[row]),
            "num_steps": steps[row],
            "completion_tokens": next((i for i, t in enumerate(ids) if t in stop_ids), len(ids)),
            "flops": flops[row],
        }
        for row, ((_, sample), ids) in enumerate(zip(asked, tokens, strict=True))
    ]


def _cell_results(plan: Plan, batch: Batch, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the metrics of a task at a cell, from its stored completions."""
    rewards = [
        Reward(line["score"], line["correct"], line["parts"], line["failure"]) for line in lines
    ]
    by_problem = list(itertools.batched(rewards, plan.samples))
    keys = {"steps_run": "num_steps", "completion_tokens": "completion_tokens", "flops": "flops"}
    means = {name: sum(line[key] for line in lines) / len(lines) for name, key in keys.items()}
    return {
        "task": batch.label,
        **asdict(batch.cell),
        **scores(plan.tasks[batch.label], plan.problems[batch.label], by_problem),
        **means,
    }


def _progress(
    plan: Plan, batches: Sequence[Batch], number: int, *, done: int, lines: Sequence[Line]
) -> EvaluationProgress:
    """Return the progress after batch `number`, measured by tokens of denoising steps.

    Args:
        done: batches of earlier attempts.
        lines: the completions of the batch's cell so far.
    """
    batch, cells = batches[number], [each.cell for each in batches]
    lengths = [cell.completion_length * cell.denoising_steps for cell in cells]
    work = [length * len(each.places) for length, each in zip(lengths, batches, strict=True)]
    return EvaluationProgress(
        task=batch.label,
        cell=batch.cell,
        cell_number=1 + sum(earlier.is_last for earlier in batches[:number]),
        cells=sum(each.is_last for each in batches),
        problems_done=batch.places.stop,
        problems=len(plan.problems[batch.label]),
        accuracy=sum(line["correct"] for line in lines) / len(lines),
        work_done=sum(work[: number + 1]) / sum(work),
        work_before=sum(work[:done]) / sum(work),
    )
