"""A model of this package for lm-evaluation-harness, by the name `agrpo`.

Importing this module registers it. `agrpo lm-eval RUN --tasks ...` runs the harness with it, also
on several ranks: the main rank runs the harness, and the others follow.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, override

from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, setup_logging
from tqdm import tqdm

from agrpo_megatron.evaluation.target import find_target
from agrpo_megatron.serving.likelihood import MASKS, Score, Scoring, noise_of
from agrpo_megatron.serving.model import Generation, Model, lead, open_model, resolved_model
from agrpo_megatron.serving.requests import CHANGES, check_room, noise_index, request_sampling
from agrpo_megatron.serving.texts import completion
from agrpo_megatron.types import Chat, Message

SAMPLES = 128  # masks of a likelihood, as in LLaDA's evaluation
BATCH = 128  # requests of a replica between two signs of progress


class AgrpoLM(TemplateLM):
    """Completions of the sampler of `evaluation`, and likelihoods by the evidence lower bound.

    Args:
        pretrained: run or Hugging Face directory, as TARGET of `agrpo evaluate`.
        checkpoint: of a run; by default the latest.
        settings: settings, each `section.key=value`, separated by `;`.
        mc_samples: masks of each likelihood.
        masks: how they are drawn: counts, or coupled_counts (each with its complement).
    """

    opened: ClassVar[Model | None] = None  # by `agrpo lm-eval`, on all its ranks

    def __init__(
        self,
        pretrained: str,
        checkpoint: str | None = None,
        settings: str = "",
        mc_samples: int = SAMPLES,
        masks: str = "counts",
        **others: Any,
    ):
        super().__init__()
        ignored = {"batch_size", "max_batch_size", "device"}  # the token budget and the ranks rule
        if unknown := sorted(others.keys() - ignored):
            raise ValueError(
                f"model_args {unknown[0]}={others[unknown[0]]} is not known; use pretrained, "
                "checkpoint, settings, mc_samples or masks"
            )
        check_masks(mc_samples, masks)
        self._samples, self._masks = mc_samples, masks
        self._closing = contextlib.ExitStack()
        if self.opened is not None:
            self.model = self.opened
        else:
            overrides = [part for part in settings.split(";") if part]
            self.model = self._closing.enter_context(_opened(pretrained, checkpoint, overrides))
        self._tokenizer = self.model.run.tokenizer

    def close(self) -> None:
        """Free the model, if this object opened it."""
        self._closing.close()

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries that lm-eval adds to the configuration in its results."""
        sampling = self.model.settings.evaluation_sampling
        return {
            "likelihood": "evidence lower bound",
            "likelihood_mc_samples": self._samples,
            "likelihood_masks": self._masks,
            "unmasking": sampling.unmasking,
            "block_length": sampling.block_length,
            "denoising_steps_per_token": sampling.denoising_steps / sampling.completion_length,
            "seed": self.model.settings.run.seed,
        }

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-text id, which stands before a text without context."""
        return self.model.run.eos_id

    @property
    def max_length(self) -> int:
        """Return the longest row."""
        return self.model.settings.model.max_sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Return a name for caches of requests."""
        chosen = self.model.settings.tokenizer
        return f"{chosen.path}-{chosen.chat_template}".replace("/", "__")

    @override
    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of the chat template: it is chosen by `tokenizer.chat_template`."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"--apply_chat_template {chat_template}: name it by tokenizer.chat_template, and "
                "use --apply_chat_template alone"
            )
        return self.model.settings.tokenizer.chat_template or "the tokenizer's own"

    @override
    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text; without a generation prompt, its last message is continued."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        prefill = "" if add_generation_prompt else messages.pop().content
        return self._tokenizer.text_of(Chat(tuple(messages), prefill))

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any):
        """Return the ids of a text, without added tokens."""
        return self._tokenizer.encode(string)

    @override
    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (texts, ids of the context, ids of the continuation) each."""
        pairs = [(context, text) for _, context, text in requests]
        found = [
            (score.logprob, score.is_greedy)
            for score in self._scores(pairs, disable_tqdm=disable_tqdm, decodes=True)
        ]
        for (texts, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    @override
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows of the longest row where they are longer."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, text in map(make_disjoint_window, windows):
                pairs.append((context, text))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._scores(pairs, disable_tqdm=disable_tqdm, decodes=False)
        for number, score in zip(owners, scores, strict=True):
            totals[number] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scores(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        *,
        disable_tqdm: bool,
        decodes: bool,
    ) -> Iterator[Score]:
        """Yield the score of each continuation after its context."""
        for context, text in pairs:
            if len(context) + len(text) > self.max_length:
                raise ValueError(
                    f"a text of {len(context)} + {len(text)} tokens does not fit "
                    f"model.max_sequence_length={self.max_length}; raise it"
                )
        size = self._batch(len(pairs))
        for part in _batches(pairs, size, disable_tqdm=disable_tqdm, what="likelihoods"):
            contexts, texts = zip(*part, strict=True)
            filled = [number for number, text in enumerate(texts) if text]
            job = Scoring(
                [contexts[n] for n in filled],
                [texts[n] for n in filled],
                self._samples,
                self._masks,
                decodes,
            )
            scores = dict(zip(filled, lead(self.model, job), strict=True))
            yield from (scores.get(n, Score(0.0, True)) for n in range(len(part)))

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete contexts with the options of each; a text ends before the first of `until`."""
        seen: Counter[str] = Counter()
        results = [""] * len(requests)
        by_sampling: dict[Any, list[tuple[int, list[int], int, int, tuple[str, ...]]]] = {}
        for number, request in enumerate(requests):
            context, options = list(request.args)
            sampling, most, stops = self._asked(options)
            ids = self.tok_encode(context)
            check_room(self.model.settings, ids, sampling)
            noise = noise_index(noise_of(ids), seen[context])
            seen[context] += 1  # a task may ask for several completions
            row = (number, ids, noise, most, stops)
            by_sampling.setdefault(sampling, []).append(row)
        for sampling, rows in by_sampling.items():
            size = self._batch(len(rows))
            for part in _batches(rows, size, disable_tqdm=disable_tqdm, what="completions"):
                numbers, prompts, noise, most, stops = zip(*part, strict=True)
                tokens = lead(self.model, Generation(prompts, noise, sampling, stops)).tokens
                for n, ids, limit, ends in zip(numbers, tokens.tolist(), most, stops, strict=True):
                    done = completion(self._tokenizer, ids, most=limit, stops=ends)
                    results[n] = done.text
                    self.cache_hook.add_partial("generate_until", requests[n].args, done.text)
        return results

    def _asked(self, options: dict[str, Any]) -> tuple[Any, int, tuple[str, ...]]:
        """Return the sampler, the most tokens and the stop texts of generation options."""
        settings = self.model.settings
        asked: dict[str, Any] = dict(
            normalize_gen_kwargs(options, settings.sampling.completion_length)
        )
        if options.keys().isdisjoint({"do_sample", "temperature"}):
            asked.pop("temperature", None)  # that of `evaluation`
        asked.pop("do_sample")
        most, stops = asked.pop("max_gen_toks"), tuple(text for text in asked.pop("until") if text)
        if unknown := sorted(asked.keys() - set(CHANGES)):
            raise ValueError(
                f"generation option {unknown[0]}={asked[unknown[0]]} is not known; use do_sample, "
                f"until, max_gen_toks, {', '.join(CHANGES)}"
            )
        return request_sampling(settings, most=most, **asked), most, stops

    def _batch(self, count: int) -> int:
        """Return how many requests go to the ranks at once."""
        return max(1, min(count, BATCH * self.model.network.ranks.data.size))


register_model("agrpo")(AgrpoLM)


def check_masks(samples: int, masks: str) -> None:
    """Check the number and the kind of masks.

    Raises:
        ValueError: there are too few, or the kind is unknown.
    """
    if masks not in MASKS:
        raise ValueError(f"masks={masks} must be one of {', '.join(MASKS)}")
    if samples < 1 or (masks == "coupled_counts" and samples % 2):
        rule = "an even number of at least 2" if masks == "coupled_counts" else "at least 1"
        raise ValueError(f"mc_samples={samples} must be {rule} with masks={masks}; use {SAMPLES}")


def run_harness(arguments: Sequence[str], target: str, options: dict[str, Any]) -> None:
    """Run lm-eval's own command on an open model; called by the main rank.

    Args:
        arguments: of `lm-eval run`, without those of the model.
        target: names the model in the results.
        options: the model's other arguments.
    """
    stated = ",".join(f"{key}={value}" for key, value in {"pretrained": target, **options}.items())
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--model", "agrpo", "--model_args", stated, *arguments]
    try:
        setup_logging()
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = before


@contextlib.contextmanager
def _opened(target: str, checkpoint: str | None, overrides: list[str]) -> Iterator[Model]:
    """Open a model for a harness that runs in one process."""
    found = find_target(Path(target), checkpoint=checkpoint, overrides=overrides)
    resolved = resolved_model(found.settings, world_size=1)
    with open_model(resolved, found.checkpoint) as model:
        yield model


def _batches[Item](
    items: Sequence[Item], size: int, *, disable_tqdm: bool, what: str
) -> Iterator[Sequence[Item]]:
    """Yield parts of the items, and show the progress."""
    with tqdm(total=len(items), desc=what, disable=disable_tqdm) as bar:
        for first in range(0, len(items), size):
            yield items[first : first + size]
            bar.update(len(items[first : first + size]))
