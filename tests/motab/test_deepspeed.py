"""Training under DeepSpeed in two processes, against one without it; where DeepSpeed is installed."""

import os
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from conftest import make_model
from forks import RANKS, run_ranks
from processes_cases import PROMPTS, TRAININGS, few, join, make_models, message, train, train_few, train_in_halves
from test_rollouts import Kept
from test_trainer import TRAJECTORIES, config
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import motab
from motab.fingerprint import hash_of_weights
from motab.models import load_model
from motab.sharding import is_sharded

STAGES = (1, 2, 3)
CASES = [(1, "heads"), *((stage, kind) for stage in (2, 3) for kind in (*TRAININGS, "by name"))]
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


# What a process runs: `rank` of `count`.


def zero(stage):
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    weights = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {"deepspeed": {"zero_optimization": {"stage": stage, **weights}, **dict.fromkeys(sizes, "auto")}}


def names(folder):
    return tuple(str(folder / who) for who in ("student", "teacher"))


def written():
    return Kept(PROMPTS, motab.OnPolicy(), max_new_tokens=9, temperature=1.0)


def evaluate_first(folder, **settings):
    trainer = motab.MotabTrainer(
        make_model(3), args=config(folder, **settings), train_dataset=TRAJECTORIES, eval_dataset=TRAJECTORIES
    )
    trainer.evaluate()


def train_by_deepspeed(rank, count, folder):
    """As accelerate starts it on GPUs, as one of which it is told to take a CPU."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    join(rank, count, folder)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would need a compiler
    deepspeed.init_distributed("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.DEEPSPEED)
    heads, backward = [], Accelerator.backward

    def noting(self, *arguments, **settings):
        heads.append(len(self._models[0].get_output_embeddings().weight))
        backward(self, *arguments, **settings)

    Accelerator.backward = noting
    # Made first: transformers shards what is made or read once ZeRO-3 is set.
    models = {(stage, kind): make_models(kind) for stage, kind in CASES if kind in TRAININGS}
    models |= {(stage, "by name"): names(folder) for stage in STAGES}
    pairs = {stage: [make_models("heads") for _ in range(2)] for stage in STAGES}
    pairs_of_few = [few() for _ in range(3)]
    found = {}
    for stage, kind in CASES:
        like = kind if kind in TRAININGS else "heads"
        found[stage, kind] = train(folder / f"{kind} {stage}", count, like, 2, models[stage, kind], **zero(stage))
    for stage in STAGES:
        heads.clear()
        found[stage, "resumed"] = train_in_halves(folder / f"resumed {stage}", count, pairs[stage], **zero(stage))
        found[stage, "heads in backward passes"] = {*heads}
        found[stage, "evaluation"] = message(evaluate_first, folder, **zero(stage))
    found["afresh"] = train_few(folder / "afresh", written(), count, pair=pairs_of_few[2], **zero(2))
    found |= {
        name: train_few(folder / name, written(), count, steps=2, pair=pair, **zero(stage))
        for name, stage, pair in (
            ("twice 2", 2, pairs_of_few[0]),
            ("twice 3", 3, pairs_of_few[1]),
            ("twice 3 by name", 3, [f"{name} of few" for name in names(folder)]),
        )
    }
    in_parts = zero(3)
    del in_parts["deepspeed"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    found["saved in parts"] = message(train_few, folder / "parts", TRAJECTORIES, count, **in_parts)
    read = [load_model(names(folder)[0])]  # in parts, as the last training was
    unset_hf_deepspeed_config()
    read.append(load_model(names(folder)[0]))
    found["hashes of weights"] = [hash_of_weights(model) for model in read]
    assert list(map(is_sharded, read)) == [True, False]
    assert all(not len(weight) for weight in read[0].parameters())
    torch.save(found, folder / f"deepspeed-{rank}.pt")


# What it must come to.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def alone(folder):
    """By this process, which saves the models for the others too."""
    for models, of in ((make_models("heads"), ""), (few(), " of few")):
        for model, name in zip(models, names(folder), strict=True):
            model.save_pretrained(name + of)
    return {kind: train(folder / "alone", 1, kind, 2) for kind in TRAININGS}


@pytest.fixture(scope="module")
def ranks(folder, alone):
    codes, written = run_ranks(folder, train_by_deepspeed)
    assert codes == {"train_by_deepspeed": [0] * RANKS}, written
    return [torch.load(folder / f"deepspeed-{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_training(ranks, alone, stage, kind):
    """Losses, norms of gradients, and the weights that were saved; without full logits, which `train` checks."""
    expected = alone["heads" if kind == "by name" else kind]
    for found in ranks:
        torch.testing.assert_close(found[stage, kind], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_that_is_resumed(ranks, alone, stage):
    logged, weights = alone["heads"]
    for found in ranks:
        again, same = found[stage, "resumed"]
        torch.testing.assert_close((again[-4:], same), (logged[-4:], weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_head_is_whole_only_while_the_loss_is_taken(ranks, stage):
    for found in ranks:
        assert found[stage, "heads in backward passes"] == {0 if stage == 3 else 12}


def test_training_on_what_both_write(ranks, tmp_path):
    """Where each process has whole weights, as under ZeRO-2."""
    (first, weights), (second, same) = (found["afresh"] for found in ranks)
    torch.testing.assert_close(weights, same, rtol=0, atol=0)
    _, expected = train_few(tmp_path, first + second)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["twice 3", "twice 3 by name"])
def test_what_models_in_parts_write(ranks, name):
    """As under ZeRO-2: also in the second step, with the weights of then."""
    for found in ranks:
        (expected, weights), (trajectories, same) = found["twice 2"], found[name]
        assert len(expected) == 4
        assert [t.token_ids for t in trajectories] == [t.token_ids for t in expected]
        torch.testing.assert_close(same, weights, rtol=1e-5, atol=1e-6)


def test_a_model_in_parts_is_known_by_its_weights(ranks):
    assert len({each for found in ranks for each in found["hashes of weights"]}) == 1


def test_what_is_refused(ranks):
    for found in ranks:
        assert found["saved in parts"].startswith("ZeRO-3 must save whole models, got a file for DeepSpeed without it")
        assert all(found[stage, "evaluation"].startswith("evaluate must follow train") for stage in STAGES)
