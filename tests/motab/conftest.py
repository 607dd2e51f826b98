"""A tiny tokenizer and tiny random models in float64, in which every kind of step end is likely."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ".\n\n" comes whole, in two halves, letter by letter, and buried in a longer token.
WORDS = ["<eos>", ".", "Ċ", ".Ċ", ".ĊĊ", "a.ĊĊb", "ĊĊ", "a", "b", "c", ",", "ab"]


@pytest.fixture(scope="session")
def tokenizer():
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_model(seed: int, vocab_size: int = len(WORDS)) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="session")
def student():
    return make_model(1)


@pytest.fixture(scope="session")
def teacher(student):
    """The student with noise, so that it agrees with some steps; its vocabulary is padded by four ids."""
    model = make_model(2, len(WORDS) + 4)
    own = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        rows = own[name].shape[0]
        parameter.data[:rows] = own[name].data + 0.18 * parameter.data[:rows]
    return model


@pytest.fixture(scope="session")
def prompts():
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 9, 4, 2, 13, 6, 3, 5, 8, 1, 7, 2)
    return [torch.randint(1, len(WORDS), (length,), generator=generator).tolist() for length in lengths]
