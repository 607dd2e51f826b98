"""The engine against plain forwards: what it decides, and that batch and block sizes change nothing."""

import copy
import gc
import itertools
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from engine_cases import POLICY, SAMPLING, SETTINGS, run
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import motab
from motab.engine import Engine
from motab.steps import token_bytes
from motab.writer import Writer
from motab_kernels import model_attention
from motab_kernels.backend import HAS_LIBRARY

DELIMITER = ".\n\n"


def generated(model, prompt, vocab_size, max_new_tokens=40):
    """Greedy text by transformers' own generate; padding ids are kept out of it."""
    ids = torch.tensor([prompt])
    suppress = list(range(vocab_size, model.config.vocab_size)) or None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        suppress_tokens=suppress,
    )
    return out[0, len(prompt) :].tolist()


def logprobs(model, context, vocab_size):
    with torch.no_grad():
        return model(torch.tensor([context])).logits[0, :, :vocab_size].double().log_softmax(-1)


def check_by_definition(trajectory, policy, teacher, tokenizer):
    """Values, boundaries, breach and rollback by the definition of MOTAB, from the finished trajectory alone."""
    prompt, steps, size = trajectory.prompt_ids, trajectory.steps, len(tokenizer)
    text = [
        token
        for token, author in zip(trajectory.token_ids, trajectory.author, strict=True)
        if author in ("student", "flawed")
    ]
    table = logprobs(teacher, prompt + text, size)[len(prompt) - 1 :]
    assert [step.start for step in steps] == [0, *(step.end for step in steps[:-1])]
    values = []
    for number, step in enumerate(steps):
        tokens = text[step.start : step.end]
        if number == trajectory.breach_step and step_lost_its_end(trajectory, tokenizer):
            values.append(step.value)  # its end token is not in the target, so nothing here can tell its value
            continue
        assert DELIMITER in tokenizer.decode(tokens) or number == len(steps) - 1
        assert DELIMITER not in tokenizer.decode(tokens[:-1])
        values.append(math.exp(sum(float(table[step.start + i, t]) for i, t in enumerate(tokens)) / len(tokens)))
        first = table[step.start]
        if policy.entropy_top_k is not None:
            first = first.topk(policy.entropy_top_k).values.log_softmax(-1)
        assert step.value == pytest.approx(values[-1], rel=1e-4)
        assert step.threshold == pytest.approx(
            policy.epsilon0 * math.exp(policy.theta * float((first.exp() * first).sum())), rel=1e-4
        )
        assert step.accepted == (step.value >= step.threshold)
    if trajectory.breach_step is None:
        assert all(step.accepted for step in steps)
        return
    t = trajectory.breach_step
    assert [step.accepted for step in steps] == [True] * t + [False]
    drops = [values[k] - values[k - 1] for k in range(1, t + 1)]
    assert trajectory.rollback_step == (1 + drops.index(min(drops)) if drops else 0)
    keep = steps[trajectory.rollback_step].start
    flawed = len(text) - keep
    assert trajectory.author[: len(text)] == ["student"] * keep + ["flawed"] * flawed
    own = [t for t, author in zip(trajectory.token_ids, trajectory.author, strict=True) if author == "teacher"]
    budget = SETTINGS["max_new_tokens"] - keep
    assert own == generated(teacher, prompt + text[:keep], size, budget)


def step_lost_its_end(trajectory, tokenizer):
    """Whether the breaching step ended with an end token, which a target leaves out when text follows."""
    last = trajectory.steps[-1]
    piece = trajectory.token_ids[last.start : last.end]
    return last.end < SETTINGS["max_new_tokens"] and DELIMITER not in tokenizer.decode(piece)


def test_boundary_zero_is_the_student(student, teacher, tokenizer, prompts):
    policy = replace(POLICY, epsilon0=0.0)
    for trajectory, prompt in zip(run(student, teacher, tokenizer, prompts, policy), prompts, strict=True):
        assert trajectory.token_ids == generated(student, prompt, len(tokenizer))
        assert set(trajectory.author) == {"student"}
        assert trajectory.breach_step is None


def test_boundary_two_is_the_teacher(student, teacher, tokenizer, prompts):
    policy = replace(POLICY, epsilon0=2.0, theta=0.0, stitch=None)
    for trajectory, prompt in zip(run(student, teacher, tokenizer, prompts, policy), prompts, strict=True):
        assert trajectory.token_ids == generated(teacher, prompt, len(tokenizer))
        assert (trajectory.breach_step, trajectory.rollback_step) == (0, 0)
        assert trajectory.steps[0].discarded_ids


def test_teacher_only_and_on_policy_alone(student, teacher, tokenizer, prompts):
    for trajectory in run(None, teacher, tokenizer, prompts, motab.TeacherOnly()):
        assert trajectory.token_ids == generated(teacher, trajectory.prompt_ids, len(tokenizer))
        assert set(trajectory.author) == {"teacher"}
    for trajectory in run(student, None, tokenizer, prompts, motab.OnPolicy()):
        assert trajectory.token_ids == generated(student, trajectory.prompt_ids, len(tokenizer))
    scored = run(student, teacher, tokenizer, prompts, motab.OnPolicy())
    assert all(step.accepted and 0 <= step.value <= 1 for trajectory in scored for step in trajectory.steps)
    assert sum(len(trajectory.steps) for trajectory in scored) > len(prompts)


def test_padding_is_neither_written_nor_scored(teacher, tokenizer, prompts):
    """Ids that the tokenizer does not have, in both models; TeacherOnly looks at no student's vocabulary."""
    padded = make_model(5, len(tokenizer) + 9)
    pairs = [(None, teacher, motab.TeacherOnly()), (padded, teacher, motab.TeacherOnly()), (padded, teacher, POLICY)]
    for student, writer, policy in [*pairs, (padded, None, motab.OnPolicy())]:
        for t in run(student, writer, tokenizer, prompts, policy, temperature=2.0, seed=1):
            assert max(t.token_ids) < len(tokenizer)
            if policy is not POLICY and writer is not None:
                context = t.prompt_ids + t.token_ids
                table = logprobs(teacher, context, len(tokenizer))[len(t.prompt_ids) - 1 :]
                expected = [float(table[place, token]) for place, token in enumerate(t.token_ids)]
                assert t.statistics["teacher_logprob"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="tokenizer has 12 tokens, but LlamaForCausalLM knows only 7"):
        run(make_model(0, 7), teacher, tokenizer, prompts, motab.TeacherOnly())


def test_a_tokenizer_that_leaves_ids_out(tokenizer, prompts):
    """As Phi-4's, whose end token lies beyond as many ids as it has tokens; delimiters are found there too."""
    tokenizer = copy.deepcopy(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {word: index + 5 * (index > 3) for word, index in state["model"]["vocab"].items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert len(tokenizer) == 12
    model = make_model(5, 20)
    texts = run(model, None, tokenizer, [[1, 13]], motab.OnPolicy(), temperature=2.0, max_new_tokens=200)
    assert set(range(12, 17)) & set(texts[0].token_ids)
    assert max(texts[0].token_ids) < 17
    assert token_bytes(tokenizer, 17)[11:] == [b"\n\n", b"a", b"b", b"c", b",", b"ab"]


@pytest.mark.parametrize("entropy_top_k", [None, 3])
@pytest.mark.parametrize("epsilon0", [0.1, 0.2, 0.3, 0.5])
def test_decisions_by_definition(student, teacher, tokenizer, prompts, epsilon0, entropy_top_k):
    policy = replace(POLICY, epsilon0=epsilon0, entropy_top_k=entropy_top_k)
    trajectories = run(student, teacher, tokenizer, prompts, policy)
    for trajectory in trajectories:
        check_by_definition(trajectory, policy, teacher, tokenizer)


@pytest.mark.parametrize("policy", [POLICY, replace(POLICY, stitch=None), motab.OnPolicy()])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_batch_and_block_change_nothing(student, teacher, tokenizer, prompts, policy, sampling):
    one = run(student, teacher, tokenizer, prompts, policy, batch_size=1, block_size=1, **sampling)
    for batch_size, block_size in ((3, 4), (7, 16), (16, 64)):
        other = run(
            student,
            teacher,
            tokenizer,
            prompts,
            policy,
            batch_size=batch_size,
            block_size=block_size,
            **sampling,
        )
        for a, b in zip(one, other, strict=True):
            assert (a.token_ids, a.author, a.text) == (b.token_ids, b.author, b.text)
            assert (a.breach_step, a.rollback_step, a.finish_reason) == (
                b.breach_step,
                b.rollback_step,
                b.finish_reason,
            )
            assert [(s.start, s.end, s.accepted) for s in a.steps] == [(s.start, s.end, s.accepted) for s in b.steps]


@pytest.mark.parametrize("policy", [POLICY, motab.StepSKD(0.7), motab.TeacherOnly()])
def test_a_long_prompt_arrives_beside_a_long_text(student, teacher, tokenizer, policy):
    """A prompt of 60 tokens and a text of up to 40 in caches of 60 + 40 + 4."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, len(tokenizer), (60,), generator=generator).tolist() for _ in range(8)]
    together = run(student, teacher, tokenizer, prompts, policy, temperature=1.0)
    alone = run(student, teacher, tokenizer, prompts, policy, temperature=1.0, batch_size=1)
    assert [t.token_ids for t in together] == [t.token_ids for t in alone]
    assert len({len(t.token_ids) for t in together}) > 2  # they end one by one


@pytest.mark.parametrize("policy", [POLICY, motab.TokenSKD(2), motab.TeacherOnly()])
def test_a_table_of_positions_that_ends_with_the_budget(tokenizer, policy):
    """GPT-2's has as many as prompt and budget need, and rows with less left to write are padded beyond them."""
    torch.manual_seed(0)
    sizes = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
    pair = [GPT2LMHeadModel(config).double().eval() for _ in range(2)]
    prompts = [[1 + (7 * i + j) % 11 for j in range(length)] for i, length in enumerate((20, 3, 11, 20, 19, 1))]
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    alone = run(*pair, tokenizer, prompts, policy, **settings, batch_size=1, block_size=1)
    together = run(*pair, tokenizer, prompts, policy, **settings, batch_size=4, block_size=16)
    assert any(len(t.prompt_ids) + len(t.token_ids) >= 40 for t in alone)
    assert [t.token_ids for t in together] == [t.token_ids for t in alone]


@pytest.mark.parametrize("max_cached_tokens", [None, 8 * 64])
def test_prompts_are_read_some_tokens_at_a_time(student, teacher, tokenizer, monkeypatch, max_cached_tokens):
    """Short ones beside one that fills the cache but for a few tokens, in passes that do not grow with the rows."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 100, 7, 20, 21, 3, 1, 60)
    prompts = [torch.randint(1, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
    settings = {"batch_size": 8, "max_new_tokens": 3, "block_size": 2, "max_cached_tokens": max_cached_tokens}
    together = run(student, teacher, tokenizer, prompts, POLICY, **settings)
    passes = []
    feed = Writer._feed
    monkeypatch.setattr(Writer, "_feed", lambda writer, texts: passes.append(texts) or feed(writer, texts))
    monkeypatch.setattr("motab.writer.PREFILL", 24)
    found = run(student, teacher, tokenizer, prompts, POLICY, **settings)
    assert [t.token_ids for t in found] == [t.token_ids for t in together]
    assert all(len(texts) * max(map(len, texts.values())) <= 24 for texts in passes)
    assert any(len(texts) > 1 for texts in passes)


@pytest.mark.parametrize("backtrack", ["td", "breach", "none"])
@pytest.mark.parametrize("budget", [1, 2, 3, 17])
def test_short_budgets(student, teacher, tokenizer, prompts, backtrack, budget):
    policy = replace(POLICY, epsilon0=2.0, theta=0.0, backtrack=backtrack)
    for trajectory in run(student, teacher, tokenizer, prompts, policy, max_new_tokens=budget, block_size=8):
        assert trajectory.breach_step == 0
        context = [a for a in trajectory.author if a in ("student", "teacher")]
        assert len(context) <= budget
        assert (trajectory.finish_reason == "eos") == (trajectory.token_ids[-1:] == [tokenizer.eos_token_id])
        assert trajectory.finish_reason == "eos" or len(context) == budget
        assert tokenizer.eos_token_id not in trajectory.token_ids[:-1]
        assert "stitch" in trajectory.author
        assert len(trajectory.author) == len(trajectory.token_ids)
        assert all(len(column) == len(trajectory.token_ids) for column in trajectory.statistics.values())


def test_trajectory_survives_json(student, teacher, tokenizer, prompts):
    for trajectory in run(student, teacher, tokenizer, prompts, replace(POLICY, stitch=None)):
        assert motab.Trajectory.from_json(trajectory.to_json()) == trajectory


def test_a_router_that_would_have_a_loss(tokenizer, prompts):
    """It cannot be taken from the masks of "eager"."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    config = MixtralConfig(vocab_size=12, num_key_value_heads=2, max_position_embeddings=256, **sizes, **experts)
    model = MixtralForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = run(model, model, tokenizer, prompts[:2], motab.OnPolicy())[0].token_ids
    assert ids == run(model, model, tokenizer, prompts[:1], motab.TeacherOnly())[0].token_ids
    assert model.config.output_router_logits  # training has the loss


def test_caller_keeps_gradients(student, teacher, tokenizer, prompts):
    trajectories = motab.synthesize(student, teacher, tokenizer, prompts, **SETTINGS)
    next(trajectories)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("taken", [1, None], ids=["abandoned", "whole"])
def test_caches_go_with_the_run(student, teacher, tokenizer, prompts, monkeypatch, taken):
    """Not when Python looks for cycles of references: a trainer needs their memory at once."""
    engines = []

    class Watched(Engine):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            engines.append(weakref.ref(self))

    monkeypatch.setattr("motab.generation.Engine", Watched)
    gc.collect()
    gc.disable()
    try:
        trajectories = motab.synthesize(student, teacher, tokenizer, prompts, max_new_tokens=12)
        assert len(list(itertools.islice(trajectories, taken))) == (taken or len(prompts))
        assert taken is None or engines[0]() is not None
        trajectories.close()
        assert engines[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}])
def test_both_models_sample_as_told(student, teacher, tokenizer, prompts, settings):
    """Where a single token is left, it is the greedy one."""
    greedy = run(student, teacher, tokenizer, prompts, POLICY)
    assert [t.token_ids for t in run(student, teacher, tokenizer, prompts, POLICY, temperature=1.0, **settings)] == [
        t.token_ids for t in greedy
    ]
    assert {author for t in greedy for author in t.author} >= {"student", "teacher"}


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")
def test_ragged_attention_writes_what_the_models_own_would(student, teacher, tokenizer, prompts, monkeypatch):
    """In float32, for which there are kernels; the models are left as they were."""
    calls = []
    own = model_attention.ragged_attention
    monkeypatch.setattr(model_attention, "ragged_attention", lambda *x, **kw: calls.append(kw["rows"]) or own(*x, **kw))
    pair = [copy.deepcopy(model).float() for model in (student, teacher)]
    ragged = run(*pair, tokenizer, prompts, POLICY, block_size=8)
    assert any(rows is None for rows in calls)
    assert any(rows is not None for rows in calls)
    assert [model.config._attn_implementation for model in pair] == ["sdpa", "sdpa"]
    calls.clear()
    for model in pair:
        model.set_attn_implementation("eager")
    eager = run(*pair, tokenizer, prompts, POLICY, block_size=8)
    assert not calls
    assert any(t.breach_step is not None for t in eager)
    for ours, theirs in zip(ragged, eager, strict=True):
        assert (ours.token_ids, ours.author, ours.breach_step) == (theirs.token_ids, theirs.author, theirs.breach_step)
        values = ([step.value for step in t.steps] for t in (ours, theirs))
        torch.testing.assert_close(*(torch.tensor(x) for x in values), rtol=1e-4, atol=1e-4)
