"""Evaluation with the sampler of `evaluation`: within a run, and over a grid."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from agrpo_megatron.config.settings import evaluation_sampling
from agrpo_megatron.evaluation.grid import EvaluationProgress, cell_sampling
from agrpo_megatron.evaluation.plan import Batch, Plan, asked_split
from agrpo_megatron.evaluation.results import Line, ResultStore
from agrpo_megatron.evaluation.scores import scores
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.rollout.generate import answer, sample_records, shown_prompt
from agrpo_megatron.rollout.metrics import failure_warning, reward_metrics
from agrpo_megatron.rollout.session import EVALUATION_IDS, Session
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.types import Answers, Problem, Reward

SAMPLE_IDS = 1 << 24  # noise indices from one sample of a problem to the next


def evaluate(session: Session, network: Network, *, iteration: int, stage: str) -> dict[str, float]:
    """Complete all held-out problems, log accuracy and samples, and return the metrics.

    Called by every rank; data-parallel ranks share the problems.

    Args:
        stage: "before", "interval" or "after" the reinforcement learning.

    Raises:
        Stopped: the ranks agreed to stop; what was sampled is kept.
    """
    started = time.perf_counter()
    problems = session.task.problems("eval")
    ids = torch.tensor(_rollout_ids(problems), device=network.ranks.device)
    sampling = evaluation_sampling(session.settings)
    kept = f"evaluation-{iteration:06d}"
    answers = answer(session, network, problems, ids, sampling=sampling, split="eval", kept=kept)
    found = scores(session.task, problems, [[reward] for reward in answers.rewards])
    low, high = found["accuracy_interval"]
    record = {
        "phase": "eval",
        "iteration": iteration,
        "stage": stage,
        "problems": len(problems),
        **reward_metrics(answers.rewards, problems),
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"summary/{name}": value for name, value in found["summary"].items()},
        "time/evaluation": time.perf_counter() - started,
    }
    session.log.metrics(record)
    samples = sample_records(session, problems, answers, split="eval")
    session.log.samples(samples, phase="eval", iteration=iteration, stage=stage)
    session.view.evaluation(record)
    warning = failure_warning(answers.rewards, session.settings.task.grader.failed_score)
    if warning is not None:
        session.view.warn(f"evaluation after iteration {iteration}: {warning}")
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
    """Answer what is left of a plan and write it down; called by every rank.

    Returns the results, on the main rank. A completion depends on its problem, its sample number
    and the seed alone, so an evaluation that was cut off ends with the numbers it would have had.

    Args:
        show: called on the main rank after every batch.

    Raises:
        ValueError: on every rank, where the completions in the store are not what was written.
    """
    is_main, batches = session.ranks.is_main, plan.batches()
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
    """Return what `_earlier` does, on the main rank, and on every rank its number of batches."""
    earlier: list[list[Line]] = []
    told: list[int | ValueError] = [0]
    if session.ranks.is_main:
        try:
            earlier = _earlier(plan, batches, store)
            told = [len(earlier)]
        except ValueError as error:  # the other ranks would wait for this one
            told = [error]
    dist.broadcast_object_list(told, src=0)
    (done,) = told
    if isinstance(done, ValueError):
        raise done
    return earlier, done


def _earlier(plan: Plan, batches: Sequence[Batch], store: ResultStore) -> list[list[Line]]:
    """Return the whole batches that stand in the store, and cut it back to them.

    Raises:
        ValueError: what stands there is not what the plan would have written.
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
    """Answer a batch and describe its completions; called by every rank."""
    chosen = session.settings.evaluation
    problems = plan.problems[batch.label]
    asked = [(place, sample) for place in batch.places for sample in range(chosen.samples)]
    ids = [EVALUATION_IDS + place + sample * SAMPLE_IDS for place, sample in asked]
    repeated = [problems[place] for place, _ in asked]
    answers = answer(
        session,
        network,
        repeated,
        torch.tensor(ids, device=network.ranks.device),
        sampling=cell_sampling(session.settings, batch.cell),
        split=asked_split(session.settings),
    )
    return _lines(session, batch, repeated, [sample for _, sample in asked], answers)


def _lines(
    session: Session,
    batch: Batch,
    problems: Sequence[Problem],
    samples: Sequence[int],
    answers: Answers,
) -> list[Line]:
    """Return what completions.jsonl holds of each completion."""
    tokenizer, trajectory = session.tokenizer, answers.trajectory
    prompts = task_prompts(session.task, problems, split=asked_split(session.settings))
    flops = completion_flops(trajectory, session.settings.model)
    steps, rows = trajectory.num_steps.tolist(), trajectory.tokens.tolist()
    lines = []
    for row, (problem, ids) in enumerate(zip(problems, rows, strict=True)):
        reward = answers.rewards[row]
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
    """Return the metrics of a task at a cell, from its completions as they were written."""
    verdicts = [
        Reward(line["score"], line["correct"], line["parts"], line["failure"]) for line in lines
    ]
    samples = plan.samples
    by_problem = [verdicts[i : i + samples] for i in range(0, len(verdicts), samples)]
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
    """Measures how far the plan has come, by the tokens that its denoising steps run over."""

    def __init__(self, plan: Plan, batches: Sequence[Batch], start: int):
        self._plan, self._batches = plan, batches
        cells = [batch.cell for batch in batches]
        work = [
            cell.completion_length * cell.denoising_steps * len(batch.places)
            for cell, batch in zip(cells, batches, strict=True)
        ]
        self._work, self._start = work, start

    def at(self, number: int, of_cell: Sequence[Line]) -> EvaluationProgress:
        """Describe the state after a batch, given the completions of its cell so far."""
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
