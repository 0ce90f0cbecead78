"""Evaluation with the sampler of `evaluation`: within a run, and over a grid."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from agrpo_megatron.evaluation.grid import EvaluationProgress, cell_sampling
from agrpo_megatron.evaluation.plan import Batch, Plan
from agrpo_megatron.evaluation.results import Line, ResultStore
from agrpo_megatron.evaluation.scores import scores
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.rollout.generate import Request, generate, sample_records
from agrpo_megatron.rollout.metrics import failure_warning, reward_metrics
from agrpo_megatron.rollout.session import Run, Session
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.text.chat import shown_prompt
from agrpo_megatron.types import GradedRollouts, Problem, Reward

EVALUATION_IDS = 1 << 40  # noise indices of evaluation, far from those of training
SAMPLE_IDS = 1 << 24  # noise indices from one sample of a problem to the next


def evaluate(session: Session, network: Network, *, iteration: int, stage: str) -> dict[str, float]:
    """Complete all held-out problems, log accuracy and samples, and return the metrics.

    Called by every rank; data-parallel ranks share the problems.

    Args:
        stage: "before", "interval" or "after" the reinforcement learning.

    Raises:
        Stopped: the ranks agreed to stop; finished completions are cached.
    """
    started = time.perf_counter()
    run, output = session.run, session.output
    problems = run.task.problems("eval")
    ids = torch.tensor(_rollout_ids(problems), device=network.ranks.device)
    sampling, name = run.settings.evaluation_sampling, f"evaluation-{iteration:06d}"
    request = Request(problems, ids, sampling, split="eval", name=name)
    graded = generate(session, network, request)
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
    counts: Counter[str] = Counter()
    ids = []
    for problem in problems:
        ids.append(EVALUATION_IDS + counts[problem.task])
        counts[problem.task] += 1
    return ids


def evaluate_grid(
    session: Session,
    network: Network,
    plan: Plan,
    store: ResultStore,
    show: Callable[[EvaluationProgress], None],
) -> dict[str, Any]:
    """Complete the rest of a plan and store it; called by every rank.

    Returns the results, on the main rank. A completion depends only on its problem, its sample
    number and the seed, so an interruption does not change the results.

    Args:
        show: called on the main rank after every batch.

    Raises:
        ValueError: on every rank, if the stored completions do not match the plan.
    """
    is_main, batches = session.run.ranks.is_main, plan.batches()
    earlier, done = _resumed(session, plan, batches, store)
    progress = _Meter(plan, batches, done)
    results: dict[str, Any] = {"label": plan.evaluation["label"], "finished": False, "cells": []}
    of_cell: list[Line] = []
    for number, batch in enumerate(batches):
        if number < done:
            of_cell += earlier[number] if is_main else []
        else:
            lines = _complete(session, network, plan, batch)
            if not is_main:
                continue
            store.append(lines)
            of_cell += lines
            show(progress.at(number, of_cell))
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
    shared: list[int | ValueError] = [0]
    if session.run.ranks.is_main:
        try:
            earlier = _earlier(plan, batches, store)
            shared = [len(earlier)]
        except ValueError as error:  # the other ranks would wait for this one
            shared = [error]
    dist.broadcast_object_list(shared, src=0)
    (done,) = shared
    if isinstance(done, ValueError):
        raise done
    return earlier, done


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


def _complete(session: Session, network: Network, plan: Plan, batch: Batch) -> list[Line]:
    """Complete a batch and describe its completions; called by every rank."""
    settings = session.run.settings
    problems = plan.problems[batch.label]
    asked = [(place, sample) for place in batch.places for sample in range(plan.samples)]
    ids = [EVALUATION_IDS + place + sample * SAMPLE_IDS for place, sample in asked]
    repeated = [problems[place] for place, _ in asked]
    request = Request(
        repeated,
        torch.tensor(ids, device=network.ranks.device),
        cell_sampling(settings, batch.cell),
        split=plan.split,
    )
    graded = generate(session, network, request)
    return _lines(session.run, plan, batch, [sample for _, sample in asked], request, graded)


def _lines(
    run: Run,
    plan: Plan,
    batch: Batch,
    samples: Sequence[int],
    request: Request,
    graded: GradedRollouts,
) -> list[Line]:
    """Return the lines of completions.jsonl, one for each completion."""
    tokenizer, trajectory = run.tokenizer, graded.trajectory
    prompts = task_prompts(run.task, request.problems, split=plan.split)
    flops = completion_flops(trajectory, run.settings.model)
    steps, rows = trajectory.num_steps.tolist(), trajectory.tokens.tolist()
    lines = []
    for row, (problem, ids) in enumerate(zip(request.problems, rows, strict=True)):
        reward = graded.rewards[row]
        text = (token in tokenizer.stop_ids for token in ids)
        lines.append(
            {
                "task": batch.label,
                "key": problem.key,
                "sample": samples[row],
                "completion_length": batch.cell.completion_length,
                "denoising_steps": batch.cell.denoising_steps,
                "prompt": shown_prompt(prompts[row]),
                "completion": tokenizer.decode(ids),
                "raw": tokenizer.decode_raw(ids),
                "score": reward.score,
                "correct": reward.correct,
                "parts": reward.parts,
                "failure": reward.failure,
                "num_steps": steps[row],
                "completion_tokens": next((i for i, ends in enumerate(text) if ends), len(ids)),
                "flops": flops[row],
            }
        )
    return lines


def _cell_results(plan: Plan, batch: Batch, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the metrics of a task at a cell, from its stored completions."""
    rewards = [
        Reward(line["score"], line["correct"], line["parts"], line["failure"]) for line in lines
    ]
    samples = plan.samples
    by_problem = [rewards[i : i + samples] for i in range(0, len(rewards), samples)]
    means = {
        name: sum(line[key] for line in lines) / len(lines)
        for name, key in (
            ("steps_run", "num_steps"),
            ("completion_tokens", "completion_tokens"),
            ("flops", "flops"),
        )
    }
    return {
        "task": batch.label,
        "completion_length": batch.cell.completion_length,
        "denoising_steps": batch.cell.denoising_steps,
        **scores(plan.tasks[batch.label], plan.problems[batch.label], by_problem),
        **means,
    }


class _Meter:
    """Measures progress by the tokens that the denoising steps process."""

    def __init__(self, plan: Plan, batches: Sequence[Batch], start: int):
        self._plan, self._batches = plan, batches
        cells = [batch.cell for batch in batches]
        work = [
            cell.completion_length * cell.denoising_steps * len(batch.places)
            for cell, batch in zip(cells, batches, strict=True)
        ]
        self._work, self._start = work, start

    def at(self, number: int, of_cell: Sequence[Line]) -> EvaluationProgress:
        """Describe the progress after a batch, given the completions of its cell so far."""
        batch, whole = self._batches[number], sum(self._work)
        return EvaluationProgress(
            task=batch.label,
            cell=batch.cell,
            cell_number=1 + sum(earlier.is_last for earlier in self._batches[:number]),
            cells=sum(each.is_last for each in self._batches),
            problems_done=batch.places.stop,
            problems=len(self._plan.problems[batch.label]),
            accuracy=sum(line["correct"] for line in of_cell) / len(of_cell),
            work_done=sum(self._work[: number + 1]) / whole,
            work_before=sum(self._work[: self._start]) / whole,
        )
