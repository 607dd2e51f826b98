"""The phrase that follows a text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from motab.stitching import phrase_behind


@pytest.mark.parametrize(("end", "blank"), [("ab", "\n\n"), (".\n", "\n"), (".\n\n", ""), ("", "")])
def test_one_blank_line_before_the_phrase(tokenizer, end, blank):
    phrase = phrase_behind(tokenizer, tokenizer.encode(end), "ab,")
    assert tokenizer.decode(phrase) == f"{blank}ab,\n\n"


def metaspace_tokenizer():
    """As SentencePiece's: a text that stands alone begins with a space, and line breaks are bytes."""
    words = ["<eos>", "<0x0A>", "▁", "a", "b", ",", "ab", "▁ab"]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=[("a", "b"), ("▁", "ab")],
        byte_fallback=True,
        unk_token="<eos>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize(("end", "blank"), [(["ab"], "\n\n"), (["ab", "<0x0A>"], "\n"), (["<0x0A>"] * 2, "")])
def test_no_space_before_the_phrase(end, blank):
    tokenizer = metaspace_tokenizer()
    phrase = phrase_behind(tokenizer, tokenizer.convert_tokens_to_ids(end), "ab,")
    assert tokenizer.convert_ids_to_tokens(phrase) == ["<0x0A>"] * len(blank) + ["ab", ",", "<0x0A>", "<0x0A>"]


def test_a_token_across_the_end_of_the_flawed_text():
    """Where the line break and the phrase's first letter would make one token, the phrase is encoded alone."""
    vocab = {word: index for index, word in enumerate(["<eos>", "Ċ", "a", "b", ",", "ab", "Ċa"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "a"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    assert tokenizer.decode(phrase_behind(tokenizer, [1, 1], "ab,")) == "ab,\n\n"
