"""How long the prompts and solutions of a run are, for forecasts and warnings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.missing_data import PROMPT_TOKENS, held_out_count
from agrpo_megatron.runs.resolve import Planned, Resolved
from agrpo_megatron.tasks.base import NoTask, task_prompts
from agrpo_megatron.tasks.supervised.examples import padded_length
from agrpo_megatron.tasks.supervised.text_sizes import TextSizes, estimated_sizes
from agrpo_megatron.types import Chat, Prompt

SOME = 256  # prompts of a split that are measured
CHARACTERS = 4  # of a token, where there is no tokenizer
TEMPLATE = 20  # tokens that a chat template adds, likewise


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens."""

    train: list[int]  # of some prompts of training problems; of held-out ones if there are none
    held_out: list[int]  # of as many prompts as an evaluation has; some were measured
    longest_solution: int  # of some training problems; 0: none has one
    # Prompt and response of some rows of `sft.data`, padded, at most as their batch will be.
    rows: Sequence[tuple[int, int]] = ()
    texts: TextSizes | None = None  # of raw texts, which a plan does not read

    def with_iterations(self, settings: Settings) -> Settings:
        """Return settings with about as many supervised iterations as the texts make."""
        if self.texts is None or self.texts.iterations is None or settings.sft.iterations:
            return settings
        return replace(settings, sft=replace(settings.sft, iterations=self.texts.iterations))


def measure(planned: Planned | Resolved) -> Sizes:
    """Measure some prompts of both splits, evenly spread; without a tokenizer by characters."""
    task, parts, texts = planned.task, {}, _texts(planned)
    if isinstance(task, NoTask) and isinstance(planned, Planned):  # its data are missing
        return Sizes(
            [PROMPT_TOKENS],
            [PROMPT_TOKENS] * held_out_count(task.settings),
            0,
            _rows(planned),
            texts,
        )
    for split in ("train", "eval"):
        problems = task.problems(split)
        some = problems[:: -(-len(problems) // SOME) or 1]
        parts[split] = _lengths(planned, task_prompts(task, some, split=split))
        if split == "train":
            solutions = [problem.solution for problem in some if problem.solution]
    held_out = parts["eval"] or parts["train"]
    count = len(task.problems("eval"))
    return Sizes(
        train=parts["train"] or parts["eval"],
        held_out=[held_out[number % len(held_out)] for number in range(count)],
        longest_solution=max(_lengths(planned, solutions), default=0),
        rows=_rows(planned),
        texts=texts,
    )


def _texts(planned: Planned | Resolved) -> TextSizes | None:
    """Return estimates of raw texts that were not read, but can be."""
    if isinstance(planned, Resolved) or not planned.has_texts or planned.tokenizer is None:
        return None
    settings = planned.settings
    length = settings.sft.row_tokens or settings.model.max_sequence_length
    return estimated_sizes(settings.sft, planned.tokenizer, length=length)


def _rows(planned: Planned | Resolved) -> list[tuple[int, int]]:
    settings = planned.settings
    if settings.sft.has_texts:
        return [(1, (settings.sft.row_tokens or settings.model.max_sequence_length) - 1)]
    if planned.supervised is None:
        return []
    examples = planned.supervised.train
    some = [example.rows[-1] for example in examples[:: -(-len(examples) // SOME)]]
    fill = {"padding": settings.sft.padding, "sampling": settings.sampling}
    fill["longest"] = max(len(row.ids) for row in some)
    return [(row.prompt, padded_length(row, **fill) - row.prompt) for row in some]


def _lengths(planned: Planned | Resolved, prompts: Sequence[Prompt]) -> list[int]:
    if planned.tokenizer is not None:
        return [len(ids) for ids in planned.tokenizer.encode_prompts(prompts)]
    return [_by_characters(prompt) for prompt in prompts]


def _by_characters(prompt: Prompt) -> int:
    if not isinstance(prompt, Chat):
        return -(-len(prompt) // CHARACTERS)
    texts = [message.content for message in prompt.messages]
    return TEMPLATE + -(-sum(map(len, texts)) // CHARACTERS)
