"""The grid of an evaluation: completion lengths and numbers of denoising steps, checked.

Runs before torch is loaded, so that an invalid cell fails at once.
"""

import math
from dataclasses import dataclass, replace

from agrpo_megatron.config.rules import validate_sampling
from agrpo_megatron.config.rules.model import divisors, two_nearest
from agrpo_megatron.config.settings import EvaluationSettings, SamplingSettings, Settings

# Names of the run's folder of evaluations, and of files in the directory of each evaluation.
EVALUATIONS, EVALUATION, RESULTS = "evaluations", "evaluation.json", "results.json"
SWEEP_POINTS = 5  # minimum step counts of a sweep, if the block length allows


@dataclass(frozen=True, order=True)
class Cell:
    """One completion length and number of denoising steps, for every problem."""

    completion_length: int
    denoising_steps: int


def evaluation_grid(settings: Settings, *, is_sweep: bool = False) -> list[Cell]:
    """Return the cells of `evaluation`, lengths and steps ascending.

    Args:
        is_sweep: if no steps are set, take `sweep_steps` of every length.

    Raises:
        ValueError: a length or number of steps does not fit, or settings contradict each other.
    """
    chosen, base = settings.evaluation, settings.evaluation_sampling
    _check_samples(chosen)
    if chosen.steps is not None and chosen.tokens_per_step is not None:
        raise ValueError(
            f"evaluation.steps={chosen.steps} and evaluation.tokens_per_step="
            f"{chosen.tokens_per_step} both set the steps; use one of them"
        )
    cells = set()
    for length in chosen.completion_lengths or [base.completion_length]:
        if length < 1:
            raise ValueError(
                f"evaluation.completion_lengths={length} is below 1; use for example "
                f"{base.completion_length}"
            )
        block = _block_length(base, length)
        if length % block:
            multiples = two_nearest(length, range(block, length + block, block))
            raise ValueError(
                f"evaluation.completion_lengths={length} is not a multiple of the block length "
                f"{block}; use {multiples}, or set evaluation.block_length"
            )
        if is_sweep and chosen.steps is None and chosen.tokens_per_step is None:
            steps = sweep_steps(length, block)
        else:
            steps = _steps(chosen, base, length, block)
        cells |= {Cell(length, count) for count in steps}
    for cell in cells:
        validate_sampling(cell_sampling(settings, cell), "evaluation")
    return sorted(cells)


def cell_sampling(settings: Settings, cell: Cell) -> SamplingSettings:
    """Return the sampler of a cell; Dream's schedule decodes any length as one block."""
    base = settings.evaluation_sampling
    return replace(
        base,
        completion_length=cell.completion_length,
        denoising_steps=cell.denoising_steps,
        block_length=_block_length(base, cell.completion_length),
    )


def sweep_steps(length: int, block_length: int) -> list[int]:
    """Return step counts from one per block to one per token: halved, more if these are few."""
    each = {block_length >> halvings for halvings in range(block_length.bit_length())}
    while len(each) < SWEEP_POINTS and (left := set(range(1, block_length + 1)) - each):
        gaps = {c: min(abs(math.log(c / other)) for other in each) for c in left}
        each.add(max(left, key=lambda c: (gaps[c], -c)))
    return sorted(length // block_length * count for count in each)


def _block_length(base: SamplingSettings, length: int) -> int:
    return length if base.schedule == "dream" else base.block_length


def _steps(
    chosen: EvaluationSettings, base: SamplingSettings, length: int, block: int
) -> list[int]:
    """Return the steps that are set for a length."""
    blocks = length // block
    if chosen.tokens_per_step is not None:
        for tokens in chosen.tokens_per_step:
            if tokens < 1 or block % tokens:
                raise ValueError(
                    f"evaluation.tokens_per_step={tokens} does not divide the block length "
                    f"{block}; use {two_nearest(tokens, divisors(block))}"
                )
        return [length // tokens for tokens in chosen.tokens_per_step]
    key = "evaluation.steps" if chosen.steps is not None else "evaluation.denoising_steps"
    counts = chosen.steps or [base.denoising_steps]
    for steps in counts:
        if steps < 1 or steps % blocks or (steps > length and base.schedule != "dream"):
            fits = two_nearest(steps, range(blocks, length + 1, blocks))
            raise ValueError(
                f"{key}={steps} does not fit completion length {length}: it must be a multiple of "
                f"its {blocks} blocks and at most {length}; use {fits}, or "
                "evaluation.tokens_per_step, which fits every length"
            )
    return counts


def _check_samples(chosen: EvaluationSettings) -> None:
    for key in ("completion_lengths", "steps", "tokens_per_step"):
        if getattr(chosen, key) == []:
            raise ValueError(f"evaluation.{key}=[] is empty; name at least one, or use null")
    if chosen.few_shot and chosen.split == "train":
        raise ValueError(
            f"evaluation.few_shot={chosen.few_shot} shows training problems, and evaluation.split="
            "train asks them; use evaluation.few_shot=0, or evaluation.split=eval"
        )
    is_random = chosen.temperature > 0 or chosen.unmasking in ("random", "bernoulli")
    if chosen.samples > 1 and not is_random:
        raise ValueError(
            f"evaluation.samples={chosen.samples} asks for different completions of a problem, but "
            "evaluation.temperature=0 writes the same one each time; use evaluation.temperature=1, "
            "or evaluation.samples=1"
        )


@dataclass(frozen=True)
class EvaluationProgress:
    """The progress of an evaluation, for its view."""

    task: str
    cell: Cell
    cell_number: int  # from 1
    cells: int  # of all tasks
    problems_done: int  # of the cell
    problems: int
    accuracy: float  # of the cell's problems so far
    work_done: float  # share of all denoising steps' tokens, earlier attempts included
    work_before: float  # the same when this attempt began
