"""Monitored generation as a call: `synthesize`, its settings, and what it refuses before anything is generated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab import memory
from motab.drawing import Sampling
from motab.engine import Engine
from motab.policies import MotabPolicy, Policy, check_number, check_policy, needs_student, needs_teacher, token_budget
from motab.prompts import Prompt, check_vocabulary, encode_prompts
from motab.speculation import drafts_for
from motab.trajectory import Trajectory
from motab_kernels.arguments import is_integer


def synthesize(
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    policy: Policy | None = None,
    max_new_tokens: int = 1024,
    batch_size: int = 8,
    block_size: int = 16,
    temperature: float = 0.6,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    in_order: bool = True,
    torch_compile: bool = False,
    max_cached_tokens: int | None = None,
) -> Iterator[Trajectory]:
    """Write one trajectory per prompt, the student monitored by the teacher as the policy says.

    A trajectory depends on its prompt, its place among the prompts and the settings, not on ``batch_size`` or
    ``block_size``, except through rounding of a model's logits in another batch.

    Args:
        student, teacher: causal language models on one device that share a tokenizer; their vocabulary sizes may
            differ by padding, which gets no probability. `TeacherOnly` needs no student, and one changes the pace
            alone; `OnPolicy` and `Truncated` need no teacher (None: nothing is scored).
        tokenizer: a fast tokenizer.
        prompts: strings, message lists (rendered with the tokenizer's chat template), or token ids: lists, or tensors
            and arrays of integers with one dimension.
        policy: `MotabPolicy` (default), `OnPolicy`, `TeacherOnly`, `StepSKD`, `TokenSKD`, `AdaSwitch`, `RelayOPD` or
            `Truncated`.
        max_new_tokens: budget in tokens for what the models write after the prompt; the flawed steps and the phrase of
            a stitched target do not count.
        batch_size: trajectories in progress at a time.
        block_size: the most tokens that the student drafts before the teacher scores them. Where that is faster, the
            student also drafts what the teacher writes, see `motab.speculation`.
        temperature: 0 is greedy, else at least 1e-30.
        top_k, top_p, min_p: as in transformers, for both models, see `motab.drawing.Sampling`: sample among the k
            likeliest tokens, then among the fewest likeliest with this total probability, then among those with at
            least this share of the likeliest one's probability.
        seed: random seed for sampling.
        indices: the place of each prompt among all, ascending, if these are only a part.
        in_order: yield trajectories in the order of their prompts; False: each as soon as it is finished, however long
            those before it take.
        torch_compile: draft and score with compiled models (`torch.compile`, with CUDA graphs on a GPU; by
            `model.generation_config.compile_config` if set). Faster if forward passes wait for Python, as those of one
            token do; compiling takes a minute or more. Compiled models round differently, so trajectories may differ.
        max_cached_tokens: tokens whose keys and values each model holds for all rows together: at least a prompt,
            ``max_new_tokens`` and a block; never more than ``batch_size`` such rows need. Rows then share pages; if
            these run out, the trajectories that have written least wait and are read again. None: what the free memory
            of a GPU holds, elsewhere no limit.

    Returns:
        An iterator of `Trajectory`.

    Raises:
        ValueError: at once, before anything is generated: an invalid or empty prompt, a prompt and budget longer
            than a model's context, a tokenizer larger than a model's vocabulary, a setting out of range, a delimiter
            that no token sequence spells, a model whose cache cannot be rolled back exactly or, with
            ``torch_compile``, does not run on `motab_kernels.ragged_attention`. During generation: logits that are NaN
            or infinite.
    """
    policy = MotabPolicy() if policy is None else policy
    check_policy(policy)
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "block_size": block_size}
    for name, value in counts.items():
        check_number(name, value, 1)
    if not is_integer(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    sampling = Sampling(temperature, top_k, top_p, min_p)
    rules = policy.rules
    if student is None and needs_student(policy):
        raise ValueError(f"{type(policy).__name__} needs a student, got None; only TeacherOnly needs none")
    if teacher is None and needs_teacher(policy):
        raise ValueError(f"{type(policy).__name__} needs a teacher, got None; only OnPolicy and Truncated need none")
    if student is not None and not needs_student(policy):
        check_vocabulary(student, tokenizer)  # it is to be trained on what the teacher writes
        if not drafts_for(student, teacher, block_size, torch_compile):
            student = None  # its cache would take memory, and its reading of prompts time
    max_new_tokens = int(token_budget(policy, max_new_tokens))
    if student is not None and teacher is not None and student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    models = [model for model in (student, teacher) if model is not None]
    authors = models if needs_student(policy) else models[-1:]
    encoded = encode_prompts(prompts, tokenizer, authors, max_new_tokens)
    places = list(range(len(encoded)) if indices is None else indices)
    whole = all(is_integer(place) and place >= 0 for place in places)
    if len(places) != len(encoded) or not whole or any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"indices must be {len(encoded)} ascending places, one for each prompt, got {places}")
    if not encoded:
        return iter(())
    engine = Engine(
        student,
        teacher,
        tokenizer,
        encoded,
        rules,
        max_new_tokens=max_new_tokens,
        batch_size=int(batch_size),
        block_size=int(block_size),
        sampling=sampling,
        seed=int(seed),
        indices=list(map(int, places)),
        torch_compile=torch_compile,
        max_cached_tokens=memory.tokens_that_fit(models, min(batch_size, len(encoded)))
        if max_cached_tokens is None
        else max_cached_tokens,
    )
    return _without_gradients(engine, in_order)


#: The generation settings of `synthesize` and their defaults.
SETTINGS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(synthesize).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("policy", "indices", "in_order")
}
#: Those that change the pace, and no trajectory but for rounding.
PACE = ("batch_size", "block_size", "torch_compile", "max_cached_tokens")


def _without_gradients(engine: Engine, in_order: bool) -> Iterator[Trajectory]:
    trajectories = engine.run(in_order)
    while True:
        # Entered for each trajectory: a suspended generator must not leave its caller in no-grad mode.
        with torch.no_grad():
            trajectory = next(trajectories, None)
        if trajectory is None:
            return
        yield trajectory
