"""What the engine refuses, before it writes and where a model's logits are no numbers."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from engine_cases import POLICY, SETTINGS, run

import motab


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("policy", "with_teacher", "broken"),
    [(POLICY, True, "student"), (motab.OnPolicy(), False, "student"), (motab.TeacherOnly(), True, "teacher")],
)
def test_logits_that_are_no_numbers(student, teacher, tokenizer, policy, with_teacher, broken, temperature):
    """A model that cannot go on from "b" (8), which only the second prompt holds; silent last ids came of it."""
    models = {"student": copy.deepcopy(student), "teacher": copy.deepcopy(teacher) if with_teacher else None}
    models[broken].model.embed_tokens.weight.data[8] = torch.nan
    trajectories = motab.synthesize(
        *models.values(), tokenizer, [[1, 2], [1, 8, 3]], policy=policy, **{**SETTINGS, "temperature": temperature}
    )
    message = f"got NaN, infinity or only -inf from the {broken} at token 0 of trajectory 1: .* float16"
    with pytest.raises(ValueError, match=message):
        list(trajectories)


@pytest.mark.parametrize(
    "policy", [motab.OnPolicy(), motab.Truncated(30), motab.RelayOPD(words=("c",), student_top_k=12)]
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_scores_that_are_no_numbers(student, teacher, tokenizer, policy, block_size):
    """Of a teacher that does not take over for them; steps with NaN came of it, which `motab verify` refused."""
    teacher = copy.deepcopy(teacher)
    teacher.model.embed_tokens.weight.data[8] = torch.nan
    prompts = [[1, 2], [1, 3]]
    whole = run(student, None, tokenizer, prompts, motab.OnPolicy(), temperature=1.0)
    index, place = next((t.index, t.token_ids.index(8)) for t in whole if 8 in t.token_ids[:-1])
    with pytest.raises(ValueError, match=f"only -inf from the teacher at token {place + 1} of trajectory {index}: "):
        run(student, teacher, tokenizer, prompts, policy, temperature=1.0, batch_size=1, block_size=block_size)


def test_broken_logits_behind_a_rollback_do_not_count(student, teacher, tokenizer, prompts):
    """The student strays before it would write them, whatever the block."""
    student = copy.deepcopy(student)
    student.model.embed_tokens.weight.data[4] = torch.nan  # ".\n\n", which ends a step
    prompts, policy = [prompt for prompt in prompts if 4 not in prompt], replace(POLICY, epsilon0=2.0, theta=0.0)
    for block_size in (1, 4, 16):
        assert all(t.breach_step == 0 for t in run(student, teacher, tokenizer, prompts, policy, block_size=block_size))


def test_no_prompts(student, teacher, tokenizer):
    assert run(student, teacher, tokenizer, [], POLICY) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 250]}, "prompt 0 has 250 tokens and max_new_tokens is 40.* at most 256"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1, got True"),
        ({"temperature": -1.0}, "temperature: expected 0 for the likeliest token, or a number .*, got -1.0"),
        ({"top_k": -1}, "top_k: expected an integer >= 0, got -1"),
        ({"top_k": 2.5}, "top_k: expected an integer >= 0, got 2.5"),
        ({"min_p": 1.5}, r"min_p: expected a number in \[0, 1\].*, got 1.5"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\].*, got 0.0"),
        ({"student": None}, "MotabPolicy needs a student"),
        ({"student": make_model(0, 7)}, "tokenizer has 12 tokens, but LlamaForCausalLM knows only 7"),
        ({"teacher": None}, "MotabPolicy needs a teacher"),
        ({"policy": motab.MotabPolicy(delimiter="z")}, "no sequence of this tokenizer's tokens spells .*'z'"),
    ],
)
def test_bad_input(student, teacher, tokenizer, prompts, change, message):
    arguments = {
        "student": student,
        "teacher": teacher,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "policy": POLICY,
    }
    with pytest.raises(ValueError, match=message):
        run(**{**arguments, **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backtrack": "far"}, "backtrack must be .* got 'far'"),
        ({"max_interventions": 0}, "max_interventions must be an integer of at least 1, got 0"),
        ({"stitch": " "}, "stitch must hold text"),
        ({"epsilon0": -0.1}, "epsilon0"),
    ],
)
def test_bad_policy(settings, message):
    with pytest.raises(ValueError, match=message):
        motab.MotabPolicy(**settings)
