"""Chat templates: LLaDA's, Dream's, plain text, and Jinja templates.

Every template ends at the start of the assistant's turn; the prefill follows it.
"""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrpo_megatron.config.values import did_you_mean
from agrpo_megatron.types import Chat, Message, Prompt

type Template = Callable[[Chat], str]

# Tokens of the published templates; a template needs a tokenizer with all of its tokens.
CONTROL_TOKENS = {
    "llada": ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "dream": ("<|im_start|>", "<|im_end|>"),
}
DEFAULT = "default"  # name of a tokenizer's template that is used without a choice
DREAM_SYSTEM = Message("system", "You are a helpful assistant.")


def llada(chat: Chat) -> str:
    """Format a chat for LLaDA-8B-Instruct.

    Source: the chat template of GSAI-ML/LLaDA-8B-Instruct, tokenizer_config.json.
    """
    turns = [
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"
        for role, content in chat.messages
    ]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return "<|startoftext|>" + "".join(turns) + header + chat.prefill


def dream(chat: Chat) -> str:
    """Format a chat for Dream-v0-Instruct-7B: ChatML, with a default system message.

    Source: the chat template of Dream-org/Dream-v0-Instruct-7B, tokenizer_config.json.
    """
    begins_with_system = chat.messages and chat.messages[0].role == "system"
    messages = chat.messages if begins_with_system else (DREAM_SYSTEM, *chat.messages)
    turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages]
    return "".join(turns) + "<|im_start|>assistant\n" + chat.prefill


def plain(chat: Chat) -> str:
    """Format a chat without roles, for base models: one blank line after each text."""
    return "".join(f"{message.content.strip()}\n\n" for message in chat.messages) + chat.prefill


BUILT_IN: dict[str, Template] = {"llada": llada, "dream": dream, "plain": plain}


@dataclass(frozen=True)
class Jinja:
    """A template written in Jinja; it is rendered in a sandbox."""

    text: str
    special_tokens: Mapping[str, Any]  # names for use in the text, such as bos_token
    source: str  # of the text, for errors

    @property
    def is_dated(self) -> bool:
        """Whether the text may print today's date."""
        return "strftime_now" in self.text

    def __call__(self, chat: Chat) -> str:
        """Format a chat.

        Raises:
            ValueError: the text cannot be rendered, or leaves out a message.
        """
        messages = chat.messages
        try:
            rendered = self._render(messages)
            for place, message in enumerate(messages):
                other = message._replace(content=f"{message.content}?")  # does it show at all?
                others = (*messages[:place], other, *messages[place + 1 :])
                if message.content.strip() not in rendered and self._render(others) == rendered:
                    raise ValueError(f"it leaves out the text of {message.role}")
        except Exception as error:  # a template may compute anything, such as 1 / 0
            roles = ", ".join(message.role for message in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"the chat template of {self.source} cannot write a chat of {roles} ({reason}); "
                f"use tokenizer.chat_template={'|'.join(BUILT_IN)}, or a .jinja file that can"
            ) from None
        return rendered + chat.prefill

    def _render(self, messages: Sequence[Message]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        (rendered,), _ = render_jinja_template(
            conversations=[[message._asdict() for message in messages]],
            chat_template=self.text,
            add_generation_prompt=True,
            **self.special_tokens,
        )
        return rendered


def choose_template(
    chosen: str | None,
    own: Mapping[str, str],
    *,
    vocabulary: Container[str],
    special_tokens: Mapping[str, Any],
    source: str = "",
) -> Template:
    """Return the template that `tokenizer.chat_template` names; null: the tokenizer's own, if any.

    Args:
        own: the tokenizer's Jinja texts by name.
        source: of these, for errors.

    Raises:
        ValueError: no such template, or the tokenizer lacks tokens of the template.
    """
    if chosen is None:
        if not own:
            return _by_tokens(vocabulary)
        if DEFAULT not in own:
            return _refuse(
                f"{source} has no chat template named {DEFAULT}; set tokenizer.chat_template to "
                f"one of {', '.join([*own, *BUILT_IN])}, or a .jinja file"
            )
        chosen = DEFAULT
    if chosen in own and chosen not in BUILT_IN:
        return Jinja(own[chosen], special_tokens, source)
    if chosen in BUILT_IN:
        missing = [t for t in CONTROL_TOKENS.get(chosen, ()) if t not in vocabulary]
        if missing:
            raise ValueError(
                f"tokenizer.chat_template={chosen} writes {', '.join(missing)}, which this "
                "tokenizer lacks; use plain, or null for the tokenizer's own"
            )
        return BUILT_IN[chosen]
    path = Path(chosen)
    if path.suffix != ".jinja" or not os.path.isfile(path):
        names = [*BUILT_IN, *own]
        raise ValueError(
            f"tokenizer.chat_template={chosen} must be one of {', '.join(names)}, an existing "
            f".jinja file, or null for the tokenizer's own{did_you_mean(chosen, names)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"tokenizer.chat_template={chosen} is not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    return Jinja(text, special_tokens, source=chosen)


def _by_tokens(vocabulary: Container[str]) -> Template:
    """Return the published template whose tokens a tokenizer has; plain if it has neither set."""
    sets = CONTROL_TOKENS.items()
    known = [name for name, tokens in sets if all(token in vocabulary for token in tokens)]
    if len(known) < 2:
        return BUILT_IN[known[0]] if known else plain

    return _refuse(
        f"the tokenizer has no chat template, but the tokens of {' and '.join(known)}; set "
        f"tokenizer.chat_template to one of {', '.join(known)}"
    )


def _refuse(message: str) -> Template:
    """Return a template that refuses the first chat: tasks of plain texts need none."""

    def refuse(chat: Chat) -> str:
        raise ValueError(message)

    return refuse


def shown_prompt(prompt: Prompt) -> str:
    """Return a prompt as readable text: the last message of a chat, and the prefill."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content + prompt.prefill
