"""The losses from hidden states and heads, and the models whose heads give them."""

import pytest
import torch
from conftest import make_model
from test_trainer import TRAJECTORIES
from transformers import OPTConfig, OPTForCausalLM

from motab import distillation
from motab.dataset import TrajectoryDataset, collate
from motab.distillation import (
    Divergence,
    cross_entropy_from_head,
    has_plain_head,
    last_hidden_states,
    loss_from_heads,
    loss_from_logits,
)


def test_a_head_with_an_adapter_is_not_its_weight():
    model = make_model(3)
    assert has_plain_head(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert not has_plain_head(model)
    assert not model.training


def test_a_model_is_left_as_it_was_where_its_head_is_looked_at():
    """Without dropout, under which no two passes are alike; no hook stays, which would keep hidden states."""
    model = make_model(3).train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert has_plain_head(model)
    assert model.training
    assert not model.model._forward_hooks


def test_states_that_the_output_names_otherwise(monkeypatch):
    """They are taken from the output where the model is compiled."""
    model = make_model(3)
    forward = model.forward

    def shifted(*args, **settings):
        output = forward(*args, **settings)
        if output.hidden_states is not None:
            output.hidden_states = output.hidden_states[:-1]
        return output

    monkeypatch.setattr(model, "forward", shifted)
    assert not has_plain_head(model)


def opt_model():
    config = OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    return OPTForCausalLM(config)


def model_of_another_base():
    model = make_model(3)
    model.base_model_prefix = "language_model"
    return model


@pytest.mark.parametrize("make", [opt_model, model_of_another_base])
def test_a_model_whose_states_are_not_found(make):
    """OPT runs only the decoder of its base model, and Llama 4 has none of the name that it tells."""
    assert not has_plain_head(make())


def biased_model(seed):
    model = make_model(seed)
    model.lm_head = torch.nn.Linear(32, 12, dtype=torch.float64)
    return model


@torch.no_grad()
def test_heads_with_biases():
    """As Phi's."""
    models = student, _ = biased_model(3), biased_model(4)
    batch = collate([TrajectoryDataset(TRAJECTORIES)[i] for i in (0, 1)])
    labels, ids = batch["labels"], batch["input_ids"]
    assert has_plain_head(student)
    hidden = [last_hidden_states(model, input_ids=ids) for model in models]
    logits = [model(ids).logits for model in models]
    settings, mask = Divergence("jsd", 0.3, 0.2, 1.5), labels[:, 1:] != -100
    loss = loss_from_heads(models, hidden, mask, settings, None)
    torch.testing.assert_close(loss, loss_from_logits(logits, mask, settings, None), rtol=1e-5, atol=0)
    expected = torch.nn.functional.cross_entropy(logits[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = cross_entropy_from_head(student, hidden[0], labels, None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_a_batch_without_a_token_to_train_on():
    """As of what ignored authors write during training: nothing, not NaN."""
    model = make_model(3)
    hidden = last_hidden_states(model, input_ids=torch.tensor([[1, 2, 3]]))
    for count in (None, 0, torch.tensor(0)):
        assert cross_entropy_from_head(model, hidden, torch.full((1, 3), -100), count) == 0


def test_logits_are_computed_again_for_the_gradient(monkeypatch):
    """None is held: of 7 targets two at a time, and so again."""
    monkeypatch.setattr(distillation, "BUDGET", 2 * 12 * 24)
    product, calls = distillation.linear, []
    monkeypatch.setattr(distillation, "linear", lambda x, *rest: calls.append(len(x)) or product(x, *rest))
    model, batch = make_model(3), collate([TrajectoryDataset(TRAJECTORIES)[i] for i in (0, 1)])
    hidden = last_hidden_states(model, input_ids=batch["input_ids"])
    loss = cross_entropy_from_head(model, hidden, batch["labels"], None)
    assert calls == [2, 2, 2, 1]
    loss.backward()
    assert sorted(calls) == [1, 1, 2, 2, 2, 2, 2, 2]
