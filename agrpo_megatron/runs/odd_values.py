"""Values of settings that are legal and hardly ever meant: one line each, nothing is refused.

A rule is a function of the facts of a run that returns its line, or None. No shipped example may
have one (a test runs them all).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

from agrpo_megatron.config.settings import OptimizerSettings, Settings
from agrpo_megatron.runs.progress import PHASES
from agrpo_megatron.runs.sizes import Sizes
from agrpo_megatron.scaling.forecast.disk import evaluations_of, parameters
from agrpo_megatron.scaling.memory import worst_rank

# Least parameters of a model, and the highest usual learning rate of all its weights and of
# adapters: published recipes of models this size, and the examples here.
USUAL_RATES = ((1e9, 2.5e-5, 2e-4), (1e8, 3e-4, 5e-4), (0.0, 3e-3, 5e-3))
FAR = 10  # times that rate
# Estimators whose draws are denoising steps of the rollout.
DRAW_STEPS = ("agrpo", "egspo", "rldf", "step_merge")
GIB = 2**30


@dataclass(frozen=True)
class Facts:
    """A run before its start: complete settings, lengths of its texts, and its ranks."""

    settings: Settings
    sizes: Sizes
    world_size: int

    @cached_property
    def parameters(self) -> int:
        """The parameters of the model."""
        return parameters(self.settings)[0]

    @property
    def row(self) -> int:
        """The tokens of the longest row: a prompt that was measured, and a completion."""
        return max(self.sizes.train, default=0) + self.settings.sampling.completion_length


type Rule = Callable[[Facts], str | None]


def odd_values(
    settings: Settings, sizes: Sizes, *, world_size: int, phases: Collection[str] = PHASES
) -> list[str]:
    """Return a line for each odd value of a run's complete settings: key, value, why, and range.

    Args:
        phases: those that are going to train (sft, rl); settings of the others have no line.
    """
    if "sft" not in phases:
        settings = replace(settings, sft=replace(settings.sft, iterations=0))
    if "rl" not in phases:
        settings = replace(settings, train=replace(settings.train, iterations=0))
    facts = Facts(settings, sizes, world_size)
    rules = RULES + (RL_RULES if settings.train.iterations else ())
    return [line for rule in rules if (line := rule(facts)) is not None]


def _small_budget(facts: Facts) -> str | None:
    budget, rl = facts.settings.train.token_budget, facts.settings.train.iterations > 0
    if budget >= facts.row or not rl and facts.settings.sft.data is not None:  # see `with_rows`
        return None
    return (
        f"train.token_budget={budget} is under the {facts.row} tokens of a row, the longest of "
        f"{len(facts.sizes.train)} sampled: such rows are micro-batches of their own, which is "
        f"slow; usual are {4 * facts.row} or more"
    )


def _large_budget(facts: Facts) -> str | None:
    """Activations that no GPU holds; float32 runs are for CPUs."""
    settings = facts.settings
    if settings.precision == "fp32" or not settings.launch.gpus_per_node:
        return None
    memory, most = worst_rank(settings, facts.world_size), settings.launch.gpu_memory
    needed = memory.activations + memory.logits
    if needed <= most * GIB:
        return None
    budget = settings.train.token_budget
    third = int(budget * most * GIB / needed / 3)
    return (
        f"train.token_budget={budget} takes {needed / GIB:.0f} GiB of activations in a rank, over "
        f"launch.gpu_memory={most:g}; usual is a third of that memory, {third} tokens"
    )


def _many_draws(facts: Facts) -> str | None:
    algorithm, steps = facts.settings.algorithm, facts.settings.sampling.most_steps
    count = algorithm.mc_samples
    if algorithm.name not in DRAW_STEPS or not isinstance(count, int) or count <= steps:
        return None
    return (
        f"algorithm.mc_samples={count} is more than the {steps} denoising steps of a completion; "
        f"usual are {max(1, steps // 8)} to {max(1, steps // 2)}, and full_trajectory scores all"
    )


def _high_rate(facts: Facts) -> str | None:
    settings = facts.settings
    size, is_lora = facts.parameters, settings.lora.rank is not None
    usual = next(rates for least, *rates in USUAL_RATES if size >= least)[is_lora]
    phases = {"optimizer": (settings.train.iterations, settings.optimizer)}
    phases["sft.optimizer"] = settings.sft.iterations, settings.sft.optimizer
    for key, (iterations, optimizer) in phases.items():
        if iterations and optimizer.learning_rate >= FAR * usual:
            what = "adapters of" if is_lora else "all weights of"
            return (
                f"{key}.learning_rate={optimizer.learning_rate:g} is {FAR} times what {what} a "
                f"model of {size / 1e6:.3g}M parameters take, or more; usual are {usual:g} or less"
            )
    return None


def _pairs(facts: Facts) -> str | None:
    algorithm = facts.settings.algorithm.filled
    if algorithm.group_size > 2 or algorithm.loss == "preference":
        return None
    return (
        "algorithm.group_size=2 compares each completion with one other, so half of the groups "
        "or more teach nothing where rewards are right or wrong; usual are 4 to 16"
    )


def _costly_evaluation(facts: Facts) -> str | None:
    """Compare completions times steps, by which all costs grow; updates count for nothing."""
    settings = facts.settings
    algorithm, sampling, held_out = settings.algorithm, settings.sampling, settings.evaluation
    count, iterations = evaluations_of(settings), settings.train.iterations
    rollouts = iterations * algorithm.prompts_per_iteration * algorithm.group_size
    training = rollouts * sampling.most_steps
    evaluating = count * len(facts.sizes.held_out) * settings.evaluation_sampling.most_steps
    if count <= 2 or evaluating <= training:
        return None
    share = evaluating / training
    every = math.ceil(held_out.interval * share * 5)
    return (
        f"evaluation.interval={held_out.interval} evaluates {count} times, with {share:.1f} times "
        "the forward passes of all rollouts; usual is a fifth or less: "
        f"evaluation.interval={every}, or fewer task.eval_problems"
    )


def _small_weights(facts: Facts) -> str | None:
    model = facts.settings.model
    usual = 1 / math.sqrt(model.hidden_size)
    if model.load is not None or not model.init_std < usual / 4:
        return None
    return (
        f"model.init_std={model.init_std:g} is small for random weights of "
        f"model.hidden_size={model.hidden_size}: such a model hardly learns; usual is about "
        f"1 / sqrt(hidden_size) = {usual:.2g}"
    )


def _slow_positions(facts: Facts) -> str | None:
    settings = facts.settings
    model, size = settings.model, facts.parameters
    if model.load is not None or size >= USUAL_RATES[1][0] or model.rope_theta <= 1000 * facts.row:
        return None
    return (
        f"model.rope_theta={model.rope_theta:g} hardly distinguishes the positions of {facts.row} "
        f"tokens in a small model that starts from nothing; usual are {facts.row} to 10000"
    )


def _long_completions(facts: Facts) -> str | None:
    """Supervised responses are padded with end-of-text to the completion length."""
    settings, longest = facts.settings, facts.sizes.longest_solution
    length = settings.sampling.completion_length
    on_solutions = settings.sft.iterations > 0 and settings.sft.data is None
    if not on_solutions or not longest or length <= 4 * longest:
        return None
    return (
        f"sampling.completion_length={length} is far over the longest solution, {longest} tokens: "
        f"most of a row is end-of-text; usual are {longest} to {2 * longest}"
    )


def _far_temperature(facts: Facts) -> str | None:
    value = facts.settings.sampling.temperature
    if 0.3 <= value <= 1.5:
        return None
    why = "draws nearly equal completions" if value < 1 else "draws mostly noise"
    return f"sampling.temperature={value:g} {why}; usual are 0.6 to 1.0"


def _endless_warmup(facts: Facts) -> str | None:
    settings = facts.settings
    updates = settings.train.iterations * settings.algorithm.updates_per_iteration
    phases = {"optimizer": (updates, settings.optimizer)}
    phases["sft.optimizer"] = settings.sft.iterations, settings.sft.optimizer
    return next((line for key, of in phases.items() if (line := _warmup(key, *of))), None)


def _warmup(key: str, updates: int, optimizer: OptimizerSettings) -> str | None:
    if not updates or optimizer.warmup_iterations < max(1, updates - 1):
        return None
    return (
        f"{key}.warmup_iterations={optimizer.warmup_iterations} is cut to {updates - 1}, as there "
        f"are {updates} updates, and only the last one has the whole learning rate; usual is a "
        "hundredth to a tenth of them"
    )


RULES: tuple[Rule, ...] = (
    _small_budget,
    _large_budget,
    _high_rate,
    _small_weights,
    _slow_positions,
    _long_completions,
    _endless_warmup,
)
RL_RULES: tuple[Rule, ...] = (_many_draws, _pairs, _costly_evaluation, _far_temperature)
