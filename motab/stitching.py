"""What a target needs to read as one text though several wrote it: the phrase between them, and tags of thinking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

LAST_WORDS = 16  # tokens that show how many blank lines a text ends with; all would take long at every takeover


def phrase_behind(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stitch: str) -> list[int]:
    """The phrase, set apart by one blank line from the text that ends with these tokens."""
    before = tokenizer.decode([*token_ids])
    breaks = len(before) - len(before.rstrip("\n"))
    blank = "\n" * max(2 - breaks, 0) if before else ""
    return encode_behind(tokenizer, "" if not before else "a" if blank else "\n", f"{blank}{stitch}\n\n")


def encode_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """The tokens of a text that follows another; some tokenizers begin what stands alone with a space."""
    first, whole = (tokenizer.encode(part, add_special_tokens=False) for part in (before, before + text))
    if before and whole[: len(first)] == first:
        return whole[len(first) :]
    return tokenizer.encode(text, add_special_tokens=False)


def thinking_tags(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """The tokens that open the thinking, such as <think> and <thinking>, each with the one that closes it."""
    added = tokenizer.get_added_vocab()
    opening = [text for text in added if text.startswith("<") and "think" in text and "</" + text[1:] in added]
    return {added[text]: added["</" + text[1:]] for text in opening}


def opens_once(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[tuple[int, bool]]) -> list[bool]:
    """Which tokens, each given with whether it is flawed, stay: if flawed text opened the thinking, no later `<think>`
    until it is closed."""
    closing = thinking_tags(tokenizer)
    opened: set[int] = set()  # by flawed tokens, which close none
    stays = []
    for token, is_flawed in tokens:
        stays.append(token not in opened)
        if is_flawed and token in closing:
            opened.add(token)
        opened -= {opening for opening in opened if closing[opening] == token}
    return stays


def readable(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text without special tokens, except for thinking tags: by these an answer is told from the thinking."""
    added = tokenizer.added_tokens_decoder
    closing = thinking_tags(tokenizer)
    hidden = {token for token in added if added[token].special} - {*closing, *closing.values()}
    return str(tokenizer.decode([token for token in token_ids if token not in hidden]))
