"""The teacher's text as the student drafts it: the same as the teacher writes alone, in fewer passes of the teacher."""

import copy
import math
from dataclasses import replace
from itertools import cycle, pairwise

import pytest
import torch
from engine_cases import POLICY, SAMPLING, run

import motab
from motab.drawing import Sampling
from motab.engine import Engine
from motab.row import TEACHER
from motab.speculation import Plan, Speculation, drafts_for, speculation_of
from motab.writer import Writer

ALONE = Plan(4, speculates=False)
POLICIES = [
    replace(POLICY, epsilon0=0.5),
    replace(POLICY, epsilon0=0.9, max_interventions=3, stitch=None),
    motab.StepSKD(0.9),
    motab.TokenSKD(2),
    motab.AdaSwitch(1.5, 3),
    motab.RelayOPD(words=("a", "b", "ab"), student_top_k=1, relay_tokens=5, paragraphs=2),
]


def fixed(monkeypatch, plan):
    """Let every round that may hold text of the teacher's be written so."""
    monkeypatch.setattr(Speculation, "plan", lambda self, *rows: plan)


def deeper(model, layers):
    """The same model with layers that add nothing, up to this many."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    found = type(model)(config).to(model.dtype).eval()
    for layer in found.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight.data.zero_()
    found.load_state_dict(model.state_dict(), strict=False)
    return found


@pytest.fixture
def passes(monkeypatch):
    """The models' passes while they draft and score, the model and the number of tokens per row of each."""
    found = []
    advance = Writer._advance

    def counted(writer, rows, token_ids):
        found.append((writer.model, token_ids.shape[1]))
        return advance(writer, rows, token_ids)

    monkeypatch.setattr(Writer, "_advance", counted)
    return found


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("sampling", SAMPLING[::2])
def test_the_teacher_writes_the_same(student, teacher, tokenizer, prompts, monkeypatch, policy, sampling):
    """Whatever the draft's length, to the token; the statistics to rounding."""
    prompts = prompts[:6]
    fixed(monkeypatch, ALONE)
    alone = run(student, teacher, tokenizer, prompts, policy, **sampling)
    assert any("teacher" in t.author for t in alone)
    for length in (2, 7):
        fixed(monkeypatch, Plan(length, speculates=True))
        drafted = run(student, teacher, tokenizer, prompts, policy, block_size=7, **sampling)
        for a, b in zip(alone, drafted, strict=True):
            assert replace(a, steps=[], statistics={}) == replace(b, steps=[], statistics={})
            assert [(s.start, s.end, s.accepted) for s in a.steps] == [(s.start, s.end, s.accepted) for s in b.steps]
            assert_same_statistics(a, b)


def assert_same_statistics(a, b):
    """But for rounding."""
    assert list(a.statistics) == list(b.statistics)
    for name, column in a.statistics.items():
        pairs = list(zip(column, b.statistics[name], strict=True))
        assert all((x is None) == (y is None) for x, y in pairs)
        assert all(x == pytest.approx(y, rel=1e-5, abs=2e-6) for x, y in pairs if x is not None)


@pytest.mark.parametrize("sampling", [*SAMPLING, {"temperature": 1.0, "top_p": 0.8}])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
def test_a_student_changes_nothing_of_what_the_teacher_alone_writes(
    student, teacher, tokenizer, prompts, monkeypatch, passes, sampling, max_new_tokens
):
    """Whatever the sizes. A budget's last token is drafted by nobody."""
    settings = {**sampling, "policy": motab.TeacherOnly(), "max_new_tokens": max_new_tokens}
    alone = run(None, teacher, tokenizer, prompts, **settings)
    assert {t.finish_reason for t in alone} == {"eos", "length"}
    for length, block_size, batch_size in ((1, 1, 4), (2, 5, 1), (5, 5, 16), (16, 16, 5)):
        passes.clear()
        fixed(monkeypatch, Plan(length, speculates=True))
        found = run(student, teacher, tokenizer, prompts, **settings, block_size=block_size, batch_size=batch_size)
        assert any(model is student for model, _ in passes) == (max_new_tokens > 1)
        for a, b in zip(alone, found, strict=True):
            assert replace(a, statistics={}) == replace(b, statistics={})
            assert_same_statistics(a, b)


def test_a_student_that_only_drafts_has_no_say(student, teacher, tokenizer, prompts, monkeypatch, passes):
    """Its end tokens end nothing, its context may be shorter than the text, and its weights may be broken."""
    alone = run(None, teacher, tokenizer, prompts, motab.TeacherOnly())
    assert any(7 in t.token_ids[:-1] for t in alone)
    other = copy.deepcopy(student)
    other.generation_config.eos_token_id = [0, 7]
    other.config.max_position_embeddings = 16
    other.model.embed_tokens.weight.data[8] = torch.nan
    fixed(monkeypatch, Plan(4, speculates=True))
    found = run(other, teacher, tokenizer, prompts, motab.TeacherOnly())
    assert any(model is other for model, _ in passes)
    assert [t.token_ids for t in found] == [t.token_ids for t in alone]


def test_a_small_student_spares_the_teacher_passes(student, tokenizer, prompts, passes):
    """One that costs a quarter of the teacher and always agrees drafts what it can of a text."""
    teacher = deeper(student, 8)
    lengths = {}
    for drafter in (None, student):
        passes.clear()
        found = run(drafter, teacher, tokenizer, prompts, motab.TeacherOnly(), block_size=16, temperature=1.0)
        lengths[drafter] = [length for model, length in passes if model is teacher]
        assert {author for t in found for author in t.author} == {"teacher"}
    assert set(lengths[None]) == {1}
    assert max(lengths[student]) > 3
    assert 3 * len(lengths[student]) < len(lengths[None])


@pytest.mark.parametrize("layers", [2, 4])
def test_a_student_that_is_too_slow_does_not_even_read(student, tokenizer, prompts, monkeypatch, layers):
    """One as large as the teacher, and one half as large."""
    made = []
    monkeypatch.setattr("motab.engine.Writer", lambda model, *sizes: made.append(model) or Writer(model, *sizes))
    teacher = deeper(student, layers)
    run(student, teacher, tokenizer, prompts, motab.TeacherOnly(), block_size=16)
    assert made == [teacher]
    assert not drafts_for(student, teacher, 16, is_compiled=False)
    assert drafts_for(student, deeper(student, 8), 16, is_compiled=False)
    assert not drafts_for(student, deeper(student, 8), 1, is_compiled=False)  # a block of one saves no pass


def test_the_teacher_needs_fewer_passes(student, tokenizer, prompts, monkeypatch, passes):
    """A teacher that always agrees confirms whole drafts, its own rows' in the passes that judge the others."""
    teacher, policy = copy.deepcopy(student), replace(POLICY, epsilon0=2.0, theta=0.0)
    fixed(monkeypatch, Plan(8, speculates=True))
    trajectories = run(student, teacher, tokenizer, prompts, policy, block_size=8)
    of_teacher = sum(t.author.count("teacher") for t in trajectories)
    counts = [length for model, length in passes if model is teacher]
    assert of_teacher > 200
    assert 3 * len(counts) < of_teacher / 3  # the passes of the teacher alone, for three rows at a time


def test_no_row_waits_for_plans_that_disagree(student, teacher, tokenizer, prompts, monkeypatch):
    """Those of one round: without speculation for the student's turn, with it for the teacher's."""
    policy = replace(POLICY, epsilon0=2.0, theta=0.0)
    fixed(monkeypatch, ALONE)
    alone = run(student, teacher, tokenizer, prompts, policy)
    plans = cycle([ALONE, Plan(4, speculates=True)])
    monkeypatch.setattr(Speculation, "plan", lambda self, *rows: next(plans))
    rounds, student_round = [], Engine._student_round

    def counted(engine, plan):
        rounds.append(plan)
        assert len(rounds) < 500, "rows are never written"
        student_round(engine, plan)

    monkeypatch.setattr(Engine, "_student_round", counted)
    assert [t.token_ids for t in run(student, teacher, tokenizer, prompts, policy)] == [t.token_ids for t in alone]


def test_a_token_instead_of_another_needs_no_pass(student, teacher, tokenizer, prompts, passes):
    """Of the teacher's: what it would write is known where it judged the other."""
    trajectories = run(student, teacher, tokenizer, prompts, motab.TokenSKD(2), block_size=8, temperature=1.0)
    models = [model for model, _ in passes]
    assert sum(t.author.count("teacher") for t in trajectories) > 50
    assert all(a is student or b is student for a, b in pairwise(models))


def test_choices_of_few_rows_are_made_together(student, teacher, tokenizer, prompts, monkeypatch):
    """Of as many positions as take no more memory than a step of a draft by the whole batch."""
    fixed(monkeypatch, Plan(6, speculates=True))
    corrected, draw, drawn, shapes = Engine._corrected, Sampling.draw, [], []

    def noting(sampling, logits, numbers):
        drawn.append(numbers.numel())
        return draw(sampling, logits, numbers)

    def counted(engine, draft, rows, teacher_logits):
        with monkeypatch.context() as patch:
            patch.setattr(Sampling, "draw", noting)
            found = corrected(engine, draft, rows, teacher_logits)
        if drawn:
            shapes.append((sum(row.author == TEACHER for row in rows), draft.tokens.shape[1], [*drawn]))
            drawn.clear()
        return found

    monkeypatch.setattr(Engine, "_corrected", counted)
    run(student, teacher, tokenizer, prompts[:5], replace(POLICY, epsilon0=0.5), block_size=6, batch_size=5)
    assert {1, 2} < {teachers for teachers, _, _ in shapes}
    for teachers, tokens, sizes in shapes:
        assert sum(sizes) == teachers * tokens
        assert max(sizes) <= 5
        assert len(sizes) == math.ceil(tokens / (5 // teachers))


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_whose_logits_are_no_numbers(student, teacher, tokenizer, monkeypatch, broken):
    """In the teacher's text only its own count."""
    models = {"student": copy.deepcopy(student), "teacher": copy.deepcopy(teacher)}
    prompts, policy = [[1, 2], [2]], replace(POLICY, epsilon0=2.0, theta=0.0)
    fixed(monkeypatch, Plan(4, speculates=True))
    whole = run(*models.values(), tokenizer, prompts, policy, temperature=1.0)
    words = {token for t in whole for token, author in zip(t.token_ids, t.author, strict=True) if author == "teacher"}
    others = {token for t in whole for token, author in zip(t.token_ids, t.author, strict=True) if author == "flawed"}
    token = min(words - others - {0, 1, 2})
    models[broken].model.embed_tokens.weight.data[token] = torch.nan
    if broken == "student":
        found = run(*models.values(), tokenizer, prompts, policy, temperature=1.0)
        assert [t.token_ids for t in found] == [t.token_ids for t in whole]
        assert not any(math.isnan(x) for t in found for x in t.statistics["teacher_logprob"] if x is not None)
    else:
        with pytest.raises(ValueError, match="got NaN, infinity or only -inf from the teacher at token"):
            run(*models.values(), tokenizer, prompts, policy, temperature=1.0)


def test_agreement_is_counted(student, teacher, tokenizer, prompts, monkeypatch):
    """Drafted tokens of the teacher's, up to the first that differs: where the student's own choice is another."""
    fixed(monkeypatch, Plan(4, speculates=True))
    found = []
    monkeypatch.setattr(Speculation, "observe", lambda self, *counts: found.append(counts))
    policy = replace(POLICY, epsilon0=2.0, theta=0.0, stitch=None)
    trajectories = run(student, teacher, tokenizer, prompts, policy)
    agree = written = 0
    for t in trajectories:
        context = t.prompt_ids + t.token_ids
        with torch.no_grad():
            logits = student(torch.tensor([context])).logits[0, len(t.prompt_ids) - 1 : -1]
        places = [place for place, author in enumerate(t.author) if author == "teacher"]
        # The last token of the budget is written by the teacher alone.
        if len(t.token_ids) == 40:
            places = places[:-1]
        agree += sum(int(logits[place].argmax()) == t.token_ids[place] for place in places)
        written += len(places)
    confirmed, drafted = (sum(column) for column in zip(*found, strict=True))
    assert 0 < agree < written
    assert written <= drafted <= written + len(prompts)
    assert agree <= confirmed <= agree + len(prompts)


@pytest.mark.parametrize("cost", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("per_token", [0.0, 0.01, 0.2])
@pytest.mark.parametrize(("confirmed", "drafted"), [(0, 0), (0, 90), (30, 30), (90, 90)])
def test_the_plan_yields_most(cost, per_token, confirmed, drafted):
    """By counting a draft's tokens one by one."""
    T = 16

    def teacher(rows, width, cached):
        return 1 + rows * (width * per_token + cached / 1000)

    def student(rows, width, cached):
        return cost * teacher(rows, width, cached)

    speculation = Speculation(T, student, teacher)
    speculation.observe(confirmed, drafted)
    agreement = (8 + confirmed) / (10 + drafted)

    def tokens_per_second(students, teachers, cached, plan):
        if not plan.speculates:
            own = sum(student(students, 1, cached) for _ in range(T)) + teacher(students, T, cached)
            theirs = sum(teacher(teachers, 1, cached) for _ in range(T))
            return (students + teachers) * T / (theirs + (own if students else 0))
        kept = 1 + sum(math.prod([agreement] * i) for i in range(1, plan.length))
        rows, drafts = students + teachers, range(plan.length)
        seconds = sum(student(rows, 1, cached) for _ in drafts) + teacher(rows, plan.length, cached)
        return (students * plan.length + teachers * kept) / seconds

    plans = [Plan(T, speculates=False), *(Plan(length, speculates=True) for length in range(1, T + 1))]
    for students in (0, 1, 5, 20):
        for teachers in (1, 4, 16):
            for cached in (0, 300):
                plan = speculation.plan(students, teachers, cached)
                assert tokens_per_second(students, teachers, cached, plan) == pytest.approx(
                    max(tokens_per_second(students, teachers, cached, other) for other in plans)
                )
        assert speculation.plan(students, 0, 0) == Plan(T, speculates=False)


def test_many_rows_are_not_drafted_and_long_ones_are():
    """Where arithmetic sets the pace each token that is drafted in vain costs as much as one that is kept; where the
    cache does, a block is read in one pass."""

    def seconds(rows, width, cached):
        return max(1, rows * width / 100, rows * cached / 10_000)

    speculation = Speculation(16, lambda *sizes: 0.2 * seconds(*sizes), seconds)
    assert speculation.plan(0, 4, 0).speculates
    assert not speculation.plan(0, 200, 0).speculates
    assert speculation.plan(0, 200, 1000).speculates


def test_a_plan_is_made_for_rows_as_long_as_they_are(student, teacher, tokenizer, monkeypatch):
    """On average."""
    plan, asked = Speculation.plan, []
    monkeypatch.setattr(Speculation, "plan", lambda self, *rows: asked.append(rows) or plan(self, *rows))
    monkeypatch.setattr("motab.engine.end_tokens", lambda models, tokenizer: [99])
    run(student, teacher, tokenizer, [[1, 2, 3], [4] * 9], motab.OnPolicy(), block_size=4, max_new_tokens=8)
    assert {rows for rows in asked if rows[0]} == {(2, 0, 6), (2, 0, 10)}


def test_without_a_pair_nothing_is_drafted_for_the_teacher(student):
    for pair in ((None, student), (student, None)):
        speculation = speculation_of(*pair, 16, is_compiled=False)
        assert speculation.plan(0, 3, 0) == speculation.plan(2, 3, 0) == Plan(16, speculates=False)
