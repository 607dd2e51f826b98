"""The whole copy of a sharded model; what only several processes show is in test_processes.py."""

import pytest
import torch
from conftest import make_model

from motab.sharding import copy_weights_, whole_copy


def test_a_copy_follows_its_model():
    """In its own dtype, but for buffers, whose dtype the model's class decides."""
    model = make_model(3).float()
    copied = whole_copy(model, torch.bfloat16, torch.device("cpu"))
    assert type(copied) is type(model)
    assert not copied.training
    assert not any(x.requires_grad for x in copied.parameters())
    for _ in range(2):
        copy_weights_(copied, model)
        own = dict(copied.named_parameters())
        assert list(own) == [name for name, _ in model.named_parameters()]
        for name, x in model.named_parameters():
            assert torch.equal(own[name], x.bfloat16())
        for x, y in zip(copied.buffers(), model.buffers(), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.add_(0.1)


def test_a_model_with_adapters_is_refused():
    with pytest.raises(
        ValueError, match=r"copy the weights of a transformers model .* got Linear; merge adapters .* or use DDP"
    ):
        whole_copy(torch.nn.Linear(2, 2), torch.float32, torch.device("cpu"))
