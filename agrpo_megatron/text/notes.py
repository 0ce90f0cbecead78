"""Notes on texts that a tokenizer or a model reads otherwise than people do."""

from collections.abc import Sequence

from agrpo_megatron.text.tokenizer import Tokenizer
from agrpo_megatron.types import Chat, Prompt


def text_notes(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], encoded: Sequence[list[int]], *, what: str
) -> list[str]:
    """Return notes on texts that the model reads otherwise than people do."""
    notes, unknown = [], sum(tokenizer.unknown_id in ids for ids in encoded)
    if unknown:
        notes.append(f"{unknown} of {len(prompts)} {what} hold text that the tokenizer lacks")
    control = tokenizer.special - {tokenizer.unknown_id}
    texts = [
        "\n".join(message.content for message in prompt.messages)  # without the template's tokens
        if isinstance(prompt, Chat)
        else prompt
        for prompt, ids in zip(prompts, encoded, strict=True)
        if not control.isdisjoint(ids)
    ]
    held = [found for ids in tokenizer.to_ids(texts) if (found := control.intersection(ids))]
    if held:
        name = tokenizer.decode_raw([min(held[0])])
        notes.append(f"{len(held)} of {len(prompts)} {what} hold control tokens such as {name}")
    return notes
