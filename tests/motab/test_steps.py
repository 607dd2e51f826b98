"""The delimiter automaton against a plain search in the decoded text."""

import copy
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from motab.steps import DelimiterAutomaton, token_bytes, tokens_of_words


@pytest.mark.parametrize("delimiter", [".\n\n", "\n\n", "a", "aba", "ab.\n"])
def test_finds_what_a_search_finds(tokenizer, delimiter):
    size = len(tokenizer) + 3
    automaton = DelimiterAutomaton(tokenizer, delimiter, size, torch.device("cpu"))
    ids = torch.randint(1, size, (20, 60), generator=torch.Generator().manual_seed(0))
    state = torch.zeros(20, dtype=torch.long)
    _, ends = automaton.scan(state, ids)
    texts = token_bytes(tokenizer, size)
    target = delimiter.encode()
    for row, row_ends in zip(ids.tolist(), ends.tolist(), strict=True):
        # 0xFF, in no delimiter, stands for a token without text, which ends what stood before it.
        pieces = [texts[token] or b"\xff" for token in row]
        found = [match.end() for match in re.finditer(re.escape(target), b"".join(pieces))]
        after = 0
        for piece, end in zip(pieces, row_ends, strict=True):
            before, after = after, after + len(piece)
            assert end == any(before < place <= after for place in found)
    assert ends.any()


def test_blocks_continue_each_other(tokenizer):
    automaton = DelimiterAutomaton(tokenizer, ".\n\n", len(tokenizer), torch.device("cpu"))
    ids = torch.tensor([[1, 2, 2, 7, 3, 2]])  # ". \n \n a .\n \n"
    state, ends = torch.zeros(1, dtype=torch.long), []
    for token in ids.T:
        states, end = automaton.scan(state, token[:, None])
        state = states[:, -1]
        ends.append(bool(end))
    assert ends == [False, False, True, False, False, True]


def test_special_token_ends_what_stood_before(tokenizer):
    automaton = DelimiterAutomaton(tokenizer, ".\n\n", len(tokenizer), torch.device("cpu"))
    _, ends = automaton.scan(torch.zeros(1, dtype=torch.long), torch.tensor([[1, 2, 0, 2]]))
    assert not ends.any()


def test_a_token_outside_of_the_byte_alphabet():
    """As some vocabularies hold by hand; byte-level ones write a space as \u0120."""
    inner = Tokenizer(models.BPE(vocab={"<unk>": 0, "\u0120a": 1, "a b": 2}, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert token_bytes(tokenizer, 3) == [b"", b" a", b"a b"]


def test_an_added_token_writes_its_own_text(tokenizer):
    """Its letters do not stand for bytes, as those of byte-level tokens do."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["\u00e9.\n\n"])
    assert token_bytes(tokenizer, 13)[12] == "\u00e9.\n\n".encode()


def test_sentencepiece_bytes():
    words = {"<unk>": 0, "\u2581the": 1, "<0x0A>": 2, "\u00e9": 3}
    inner = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert token_bytes(tokenizer, 5) == [b"", b" the", b"\n", "\u00e9".encode(), b""]


def test_a_tokenizer_that_is_not_fast():
    with pytest.raises(ValueError, match="of each token, got ByT5Tokenizer; convert it"):
        token_bytes(ByT5Tokenizer(), 384)


def test_a_word_is_a_token_with_or_without_space():
    words = ["<unk>", "\u2581wait", "Wait", "waiting", "WAIT\u2581", "wai", "but"]
    model = models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")
    tokenizer._tokenizer.decoder = decoders.Replace("\u2581", " ")
    assert tokens_of_words(tokenizer, [" wait", "Hmm"], 7) == [1, 2, 4]
