"""The estimated time of a forward pass."""

import copy

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, MixtralConfig, MixtralForCausalLM

import motab
from motab.pass_time import CPU, GPU, PassTime


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def in_memory(model):
    return sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))


def test_times_add_up_on_a_cpu(student):
    """A pass over 3 rows of 4 tokens each, after 50 of each: 2 layers, 2 heads of 8, float64."""
    read = in_memory(student) + 3 * 50 * 2 * 2 * 2 * 8 * 8
    expected = 2 * CPU.layer + read / CPU.bandwidth + 2 * 12 * numbers(student) / CPU.arithmetic
    assert PassTime(student)(3, 4, 50) == pytest.approx(expected, rel=1e-12)


def test_the_longest_counts_on_a_gpu(student, monkeypatch):
    time = PassTime(student)
    monkeypatch.setattr(time, "machine", GPU)
    assert time(1, 1, 0) == 2 * GPU.layer
    many = 10**9
    assert time(many, 4, 0) == pytest.approx(2 * 4 * many * numbers(student) / GPU.arithmetic, rel=1e-12)
    read = in_memory(student) + many * 5000 * 2 * 2 * 2 * 8 * 8
    assert time(many, 1, 5000) == pytest.approx(read / GPU.bandwidth, rel=1e-12)


def test_a_compiled_model_launches_nothing_and_reads_blocks(student):
    time, launched = PassTime(student, 16), PassTime(student)
    assert time(3, 1, 50) == pytest.approx(launched(3, 1, 50) - 2 * CPU.layer, rel=1e-9)
    assert time(3, 2, 50) == time(3, 16, 50)
    assert time(3, 16, 50) == pytest.approx(launched(3, 16, 50) - 2 * CPU.layer, rel=1e-9)


def test_a_shared_model_counts_for_its_part(student):
    """Its weights are the whole model's, and its cache is this process's."""
    shared = copy.deepcopy(student)
    shared._tp_size = 4
    part, whole = PassTime(shared, 16), PassTime(student, 16)
    assert part(3, 16, 0) == pytest.approx(whole(3, 16, 0) / 4, rel=1e-12)
    assert part(3, 16, 50) - part(3, 16, 0) == pytest.approx(whole(3, 16, 50) - whole(3, 16, 0), rel=1e-9)


def test_layers_whose_caches_differ(tokenizer):
    """As of Gemma 4: heads of 8 in two layers, of 16 in a third."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=12,
        vocab_size_per_layer_input=12,
        hidden_size_per_layer_input=0,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        max_position_embeddings=64,
    )
    model = Gemma4ForCausalLM(config).eval()
    time = PassTime(model)
    assert time(1, 1, 10) - time(1, 1, 0) == pytest.approx(10 * 4 * 2 * (8 + 8 + 16) / CPU.bandwidth, rel=1e-6)
    (found,) = motab.synthesize(model, model, tokenizer, [[1, 2]], max_new_tokens=3)
    assert found.token_ids


def test_of_experts_those_that_tokens_choose():
    """2 of 8: few tokens read a part of them, many read all, and each is multiplied by a quarter."""
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    experts = 2 * 8 * 3 * 8 * 32
    dense = numbers(model) - experts
    time = PassTime(model, 16)
    for tokens, read in ((1, 0.25), (2, 1 - 0.75**2), (1000, 1.0)):
        expected = (in_memory(model) + 2 * (read - 1) * experts) / CPU.bandwidth
        expected += 2 * tokens * (dense + experts / 4) / CPU.arithmetic
        assert time(tokens, 1, 0) == pytest.approx(expected, rel=1e-9)
