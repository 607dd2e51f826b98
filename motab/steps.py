"""Reasoning steps: an automaton over each token's bytes that finds the delimiter on the device.

A delimiter may be one token, spread over several, or buried inside one; a table of delimiter states by vocabulary
entries finds it in every case with one gather per token, without decoding and without waiting for the device.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The bytes each token id writes; empty for special tokens and for ids beyond the tokenizer's vocabulary.

    Raises:
        ValueError: a tokenizer that is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"steps and words need a fast tokenizer, whose decoder tells the bytes of each token, got "
            f"{type(tokenizer).__name__}; convert it to a PreTrainedTokenizerFast"
        )
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    byte_level = {char: value for value, char in bytes_to_unicode().items()} if "ByteLevel" in decoder else None
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    texts = []
    for index in range(vocab_size):
        token = tokenizer.convert_ids_to_tokens(index)
        if token is None or index in special:
            texts.append(b"")
        elif index in added:
            texts.append(token.encode())
        elif byte_level is not None:
            # A token that holds other characters, as some were added to vocabularies by hand, writes them.
            texts.append(b"".join(bytes([byte_level[c]]) if c in byte_level else c.encode() for c in token))
        elif match := _BYTE_TOKEN.fullmatch(token):
            texts.append(bytes([int(match[1], 16)]))
        else:
            texts.append(token.replace("\u2581", " ").encode())
    return texts


def tokens_of_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], vocab_size: int) -> list[int]:
    """The ids of all tokens that are one of the words, ignoring case and surrounding space.

    Raises:
        ValueError: no word is a token.
    """
    wanted = {word.strip().casefold() for word in words}
    texts = (text.decode(errors="replace").strip().casefold() for text in token_bytes(tokenizer, vocab_size))
    ids = [index for index, text in enumerate(texts) if text in wanted]
    if not ids:
        raise ValueError(f"none of the words {', '.join(words)} is a token of this tokenizer; give others")
    return ids


def _byte_transitions(delimiter: bytes) -> Tensor:
    """(len(delimiter) + 1, 256): how many bytes of the delimiter are matched after one more byte.
    Matches do not overlap."""
    table = torch.zeros(len(delimiter) + 1, 256, dtype=torch.long)
    for matched in range(len(delimiter) + 1):
        for byte in range(256):
            text = delimiter[: matched % len(delimiter)] + bytes([byte])
            table[matched, byte] = next(
                n for n in range(min(len(text), len(delimiter)), -1, -1) if text.endswith(delimiter[:n])
            )
    return table


class DelimiterAutomaton:
    """Finds ``delimiter`` in a stream of tokens.

    Attributes:
        next_state: (S, V) int64, the state after a token; S is the delimiter's length in bytes plus one.
        completes: (S, V) bool, whether the delimiter is completed within that token.

    Raises:
        ValueError: an empty delimiter, or one that no sequence of tokens spells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiter: str, vocab_size: int, device: torch.device):
        if not delimiter:
            raise ValueError("the step delimiter must hold at least one character, got ''")
        texts = token_bytes(tokenizer, vocab_size)
        transitions = _byte_transitions(delimiter.encode())
        length = max(map(len, texts))
        padded = torch.tensor([list(text) + [-1] * (length - len(text)) for text in texts])  # (V, length)
        states = len(transitions)
        state = torch.arange(states)[:, None].repeat(1, vocab_size)
        completes = torch.zeros(states, vocab_size, dtype=torch.bool)
        for column in padded.T:
            written = column >= 0
            state = torch.where(written, transitions[state, column.clamp(min=0)], state)
            completes |= written & (state == states - 1)
        state[:, torch.tensor([not text for text in texts])] = 0  # a special token ends what stood before it
        self.next_state, self.completes = state, completes
        self._check_spellable(delimiter)  # before a GPU has them: the host would wait for each state
        self.next_state, self.completes = state.to(device), completes.to(device)

    def _check_spellable(self, delimiter: str) -> None:
        reached, fresh = {0}, [0]
        while fresh:
            state = fresh.pop()
            if self.completes[state].any():
                return
            after = set(self.next_state[state].unique().tolist()) - reached
            reached |= after
            fresh += after
        raise ValueError(
            f"no sequence of this tokenizer's tokens spells the step delimiter {delimiter!r}; "
            "choose another with delimiter="
        )

    def scan(self, state: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Follow (B, T) tokens from state (B,); returns the states after each token and where a step ends, (B, T)."""
        states, ends = [], []
        for token in token_ids.unbind(1):
            ends.append(self.completes[state, token])
            state = self.next_state[state, token]
            states.append(state)
        return torch.stack(states, 1), torch.stack(ends, 1)


#: Cached: a trainer asks at every step, and building it takes a second for a large vocabulary.
delimiter_automaton = functools.lru_cache(maxsize=4)(DelimiterAutomaton)
