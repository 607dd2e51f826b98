"""Solutions that somebody else has written, as trajectories: for fine-tuning, or distillation, on existing texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from motab.prompts import Prompt, encode_prompts
from motab.stitching import LAST_WORDS, encode_behind, readable, thinking_tags
from motab.trajectory import Trajectory


def as_trajectories(
    prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Trajectory]:
    """Trajectories of texts that answer the prompts, as if a teacher had written them, with the tokenizer's end token.

    If a prompt opens the thinking (``<think>``), as some chat templates do, the text does not open it again.

    Args:
        prompts: as for `motab.synthesize`.
        texts: one for each prompt.
        tokenizer: the student's.

    Returns:
        An iterator of `Trajectory` in order, all tokens by ``"teacher"``, without steps and statistics.

    Raises:
        ValueError: at once: another number of texts, an empty one, a tokenizer without an end token, or a prompt that
            `motab.synthesize` refuses.
    """
    if len(texts) != len(prompts):
        raise ValueError(f"texts must be one for each of {len(prompts)} prompts, got {len(texts)}")
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {place} must be a text that is not empty, got {text!r}; leave its prompt out")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer must have an end token, got one without; set its eos_token")
    encoded = encode_prompts(prompts, tokenizer)
    opening = [tokenizer.convert_ids_to_tokens(token) for token in thinking_tags(tokenizer)]

    def trajectory(index: int) -> Trajectory:
        prompt_ids = encoded[index]
        before = tokenizer.decode(prompt_ids[-LAST_WORDS:])
        text = texts[index]
        if text.rstrip().endswith(tokenizer.eos_token):
            text = text.rstrip()  # as some chat templates break the line behind it
        ids = encode_behind(tokenizer, before, _opens_once(before, text, opening))
        ids = ids if ids[-1:] == [end] else [*ids, end]
        written = readable(tokenizer, ids)
        return Trajectory(index, prompt_ids, ids, ["teacher"] * len(ids), written, [], None, None, "eos")

    return map(trajectory, range(len(encoded)))


def _opens_once(before: str, text: str, opening: Sequence[str]) -> str:
    """The text without the tag that opens the thinking, if what is before it ends with this tag."""
    for tag in opening:
        if before.rstrip().endswith(tag) and text.lstrip().startswith(tag):
            return text.lstrip().removeprefix(tag).removeprefix(before[len(before.rstrip()) :])
    return text
