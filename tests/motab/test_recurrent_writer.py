"""Monitored generation by models with recurrent states: the same text, whatever is cut and read again."""

import copy
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from engine_cases import POLICY, run
from test_engine import check_by_definition
from test_speculation import deeper
from test_trainer import config
from transformers import MambaConfig, MambaForCausalLM

import motab
from motab import memory
from motab.recurrent_writer import RecurrentWriter
from motab.speculation import drafts_for
from tests.recurrent_models import VOCAB, recurrent_model

KINDS = ["qwen3_5_text", "falcon_h1", "lfm2", "granitemoehybrid"]
POLICIES = {
    "motab": POLICY,
    "motab, four times": replace(POLICY, max_interventions=4),
    "step skd": motab.StepSKD(0.7),
    "token skd": motab.TokenSKD(2),
    "adaswitch": motab.AdaSwitch(2.0, 4),
    "relay": motab.RelayOPD(words=("a", "c"), student_top_k=1, paragraphs=2, relay_tokens=7),
}


def pair_of(name, tokenizer, **settings):
    """A student, and a teacher that is the student with noise and padding, so that it agrees with some steps."""
    sizes = dict(initializer_range=0.3, eos_token_id=0, bos_token_id=None, **settings)
    student = recurrent_model(name, 1, vocab_size=len(tokenizer), **sizes)
    teacher = recurrent_model(name, 2, vocab_size=len(tokenizer) + 4, **sizes)
    own = dict(student.named_parameters())
    for key, parameter in teacher.named_parameters():
        rows = own[key].shape[0]
        parameter.data[:rows] = own[key].data + 0.18 * parameter.data[:rows]
    return student, teacher


@pytest.mark.parametrize("name", KINDS)
def test_breaches_and_rollbacks_by_definition(name, tokenizer, prompts):
    student, teacher = pair_of(name, tokenizer)
    found = run(student, teacher, tokenizer, prompts[:5], POLICY)
    for trajectory in found:
        check_by_definition(trajectory, POLICY, teacher, tokenizer)
    assert sum(trajectory.breach_step is not None for trajectory in found) >= 3


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_and_blocks_change_nothing(policy, tokenizer, prompts):
    """Nor do rows that wait for pages, and are read again."""
    pair, settings = pair_of("lfm2", tokenizer), {"temperature": 1.0, "seed": 7}
    policy, prompts = POLICIES[policy], prompts[:6]
    expected = run(*pair, tokenizer, prompts, policy, **settings, block_size=1, batch_size=6)
    assert any("teacher" in trajectory.author for trajectory in expected)
    for sizes in ({"batch_size": 2, "block_size": 7}, {"batch_size": 4, "max_cached_tokens": 3 * 64}):
        found = run(*pair, tokenizer, prompts, policy, **settings, **sizes)
        assert [(t.token_ids, t.author) for t in found] == [(t.token_ids, t.author) for t in expected]


@pytest.mark.parametrize("policy", ["step skd", "motab, four times"])
def test_a_text_is_read_from_its_beginning_once(policy, tokenizer, prompts, monkeypatch):
    """By each model, however often the teacher steps in: it goes on from before the step that is rewritten."""
    begun, feed = [], RecurrentWriter._feed

    def counted(writer, texts):
        begun.extend((writer, row) for row in texts if writer.lengths[row] == 0)
        feed(writer, texts)

    monkeypatch.setattr(RecurrentWriter, "_feed", counted)
    prompts = [[*prompt] * 2 for prompt in prompts]  # of at least two tokens, of which all but the last are read
    found = run(*pair_of("lfm2", tokenizer), tokenizer, prompts, replace_backtrack(POLICIES[policy]), block_size=3)
    assert sum(not step.accepted for t in found for step in t.steps) > 2 * len(found)
    assert len(begun) == 2 * len(found)


def replace_backtrack(policy):
    """To the breaching step, as nearly always; further back a text is read from its beginning."""
    return replace(policy, backtrack="breach") if isinstance(policy, motab.MotabPolicy) else policy


def test_one_model_alone(tokenizer, prompts):
    student, teacher = pair_of("lfm2", tokenizer)
    alone = run(student, None, tokenizer, prompts, motab.OnPolicy())
    scored = run(student, teacher, tokenizer, prompts, motab.OnPolicy())
    assert [t.token_ids for t in scored] == [t.token_ids for t in alone]


def test_a_student_does_not_draft_for_a_teacher(student, teacher, tokenizer):
    """Each would read again what the teacher confirms of a draft. Where they keep no states, it is worth it."""
    small, _ = pair_of("lfm2", tokenizer)
    _, large = pair_of("lfm2", tokenizer, layer_types=["conv", "full_attention"] * 8)
    plain = deeper(teacher, 16)
    for pair in ((small, large), (student, large), (small, plain)):
        assert not drafts_for(*pair, 4, False)
    assert drafts_for(student, plain, 4, False)


def test_beside_a_model_without_states(student, tokenizer, prompts):
    """Of which each keeps what it can."""
    _, teacher = pair_of("lfm2", tokenizer)
    found = run(student, teacher, tokenizer, prompts[:5], POLICY)
    for trajectory in found:
        check_by_definition(trajectory, POLICY, teacher, tokenizer)


@pytest.fixture
def reading(tokenizer):
    """A writer with two rows, and the ids of each pass that it reads."""
    student, _ = pair_of("lfm2", tokenizer)
    writer, passes = RecurrentWriter(student, 2, 64, len(tokenizer)), []
    forward = writer.model.forward

    def kept(input_ids, **inputs):
        passes.append(input_ids.tolist())
        return forward(input_ids=input_ids, **inputs)

    writer.model.forward = kept
    return writer, passes


@torch.no_grad()
def test_texts_are_read_without_padding(reading):
    """In powers of two, together where they can be; and only what the cache does not hold."""
    writer, passes = reading
    writer.start({0: [*range(1, 12)], 1: [*range(1, 5)]})  # but for the last token of each
    assert passes == [[[1, 2, 3, 4, 5, 6, 7, 8]], [[9, 10], [1, 2]], [[3]]]
    assert (writer.lengths, writer.settled) == ([10, 3], [10, 3])
    passes.clear()
    writer.draft([0, 1], torch.tensor([11, 4]), 3, lambda step, offset: step.argmax(-1))
    assert (writer.lengths, len(passes)) == ([13, 6], 3)
    writer.rollback({0: 12, 1: 6})  # of row 0 it keeps what it held before the draft
    assert (writer.lengths, writer.settled, writer.cache.lengths.tolist()) == ([10, 6], [10, 6], [10, 6])
    writer.rollback({0: 9})  # and of that nothing
    assert (writer.lengths, writer.settled, writer.cache.lengths.tolist()) == ([0, 6], [0, 6], [0, 6])
    writer.rollback({1: 6}, {1: 7})
    writer.draft([1], torch.tensor([4]), 2, lambda step, offset: step.argmax(-1))
    writer.rollback({1: 8}, {1: 7})
    assert (writer.lengths, writer.settled, writer.anchored) == ([0, 8], [0, 8], [0, 6])
    writer.rollback({1: 7})  # what it held before the last rollback, which was safe
    assert (writer.lengths, writer.cache.lengths.tolist()) == ([0, 6], [0, 6])
    assert writer.anchored == writer.cache.states.anchored_lengths.tolist() == [0, 6]
    writer.rollback({1: 0})
    assert writer.anchored == writer.cache.states.anchored_lengths.tolist() == [0, 0]


@torch.no_grad()
def test_a_pass_reads_a_limited_number_of_tokens(reading, monkeypatch):
    """Of a row, and of all."""
    writer, passes = reading
    monkeypatch.setattr("motab.recurrent_writer.PREFILL", 4)
    writer.start({row: [*range(1, 12)] for row in (0, 1)})
    first, second, last = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]
    assert passes == [[first], [second], [first], [second], [last, last]]
    assert writer.lengths == writer.cache.lengths.tolist() == [10, 10]


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "falcon_h1"])
@torch.no_grad()
def test_any_operations_in_any_order(name, seed):
    """Every logit is that of a pass over the whole text, and host and device agree on what the cache holds."""
    random, rows = Random(seed), 4
    torch.manual_seed(seed)
    model = recurrent_model(name)
    writer = RecurrentWriter(model, rows, 128, VOCAB)

    def new_text():
        return [random.randrange(3, VOCAB) for _ in range(random.randint(1, 20))]

    texts = [new_text() for _ in range(rows)]
    writer.start(dict(enumerate(texts)))
    for _ in range(12):
        fed, count = sorted(random.sample(range(rows), random.randint(1, rows))), random.randint(1, 5)
        behind = {row: texts[row][writer.lengths[row] :] for row in fed if writer.lengths[row] < len(texts[row]) - 1}
        writer.catch_up(behind, 4)
        pending, tokens = torch.tensor([texts[row][-1] for row in fed]), torch.randint(3, VOCAB, (len(fed), count))
        if random.random() < 0.5:
            _, logits = writer.draft(fed, pending, count, lambda step, offset, tokens=tokens: tokens[:, offset])
        else:
            logits = writer.score(fed, pending, tokens)
        for place, row in enumerate(fed):
            texts[row] = texts[row] + tokens[place].tolist()
            fresh = model(torch.tensor([texts[row][:-1]]), use_cache=False).logits[0, -count:]
            torch.testing.assert_close(logits[place], fresh, rtol=0, atol=1e-5)
            # All is kept, a part of the block or of the text.
            least = len(texts[row]) - random.choice([0, 0, count, len(texts[row]) - 1])
            texts[row] = texts[row][: random.randint(max(1, least), len(texts[row]))]
        safe = {row: random.randrange(len(texts[row])) for row in fed} if random.random() < 0.7 else None
        writer.rollback({row: len(texts[row]) - 1 for row in fed}, safe)
        if random.random() < 0.3 or len(texts[fed[0]]) > 80:
            texts[fed[0]] = new_text()
            writer.start({fed[0]: texts[fed[0]]})
        states = writer.cache.states
        assert writer.cache.lengths.tolist() == writer.lengths
        assert states.settled_lengths.tolist() == writer.settled
        assert states.anchored_lengths.tolist() == writer.anchored


def test_a_model_that_begins_anew_with_each_part_is_refused(tokenizer, prompts):
    """transformers' Mamba layers do, where several tokens are read."""
    pair = pair_of("jamba", tokenizer)
    with pytest.raises(ValueError, match="go on from them where it reads several tokens, got JambaForCausalLM"):
        run(*pair, tokenizer, prompts, POLICY)


def test_a_model_whose_states_do_not_begin_with_zeros_is_refused():
    """Zaya's, if its projections have biases: a row that begins beside others would be wrong."""
    RecurrentWriter(recurrent_model("zaya"), 2, 64, VOCAB)
    biased = recurrent_model("zaya", attention_bias=True)
    for layer in biased.model.layers:
        layer.self_attn.qkv_proj.v_proj_delayed.bias.data.fill_(1)
    with pytest.raises(ValueError, match=r"must begin with zeros, and go on from them .*, got ZayaForCausalLM"):
        RecurrentWriter(biased, 2, 64, VOCAB)


def test_another_expert_for_a_token_is_no_reason_to_refuse(monkeypatch):
    """As rounding in low precision has it."""
    model = recurrent_model("lfm2", dtype=torch.bfloat16)
    forward = model.forward

    def disturbed(input_ids, **inputs):
        out = forward(input_ids=input_ids, **inputs)
        if input_ids.shape[1] == 12:
            out.logits[:, 9, 3] += out.logits.std()
        return out

    monkeypatch.setattr(model, "forward", disturbed)
    RecurrentWriter(model, 2, 64, VOCAB)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_weights_that_are_not_finite_are_named(broken, tokenizer, prompts):
    """Not the states, which cannot be compared."""
    student, teacher = pair_of("lfm2", tokenizer)
    {"student": student, "teacher": teacher}[broken].model.layers[0].conv.in_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"infinity or only -inf from the {broken} .*: look for NaN in its weights"):
        run(student, teacher, tokenizer, prompts, motab.StepSKD(0.7))


def test_a_router_whose_loss_is_asked_for(tokenizer, prompts):
    """It cannot be taken from a mask of four dimensions."""
    pair = pair_of("qwen3_next", tokenizer, output_router_logits=True)
    assert run(*pair, tokenizer, prompts[:2], POLICY)


def test_a_model_of_states_alone_is_refused(teacher, tokenizer, prompts):
    sizes = MambaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, eos_token_id=0)
    with pytest.raises(ValueError, match="at least one layer with attention"):
        run(MambaForCausalLM(sizes), teacher, tokenizer, prompts, POLICY)


def test_compiled_models_are_refused(tokenizer, prompts):
    pair = [model.float() for model in pair_of("lfm2", tokenizer)]
    with pytest.raises(ValueError, match=r"torch_compile: .* got Lfm2ForCausalLM, which keeps recurrent states"):
        run(*pair, tokenizer, prompts, POLICY, torch_compile=True)


def test_states_count_where_memory_is_shared_out(tokenizer, monkeypatch):
    """Three times for each row: as passes change them, settled and anchored."""
    student, _ = pair_of("lfm2", tokenizer)
    size = memory.cache_bytes(student)
    # Keys and values of 2 heads of 8, and the last three inputs of 32 channels, in float64.
    assert size == (2 * 2 * 8 * 8, 3 * 32 * 8)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(memory, "cache_bytes", lambda model: size)
    for name, value in {"memory_reserved": 5, "memory_allocated": 5, "mem_get_info": (100_000, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.tokens_that_fit([on_gpu, on_gpu], 6) == (80_000 - 3 * 6 * 2 * size.of_row) // (2 * size.of_token)
    assert memory.tokens_that_fit([on_gpu], 600) == 0


def test_rows_without_a_prompt_take_no_states(tokenizer, prompts, monkeypatch):
    student, teacher = pair_of("lfm2", tokenizer)
    asked = []
    monkeypatch.setattr(memory, "tokens_that_fit", lambda models, rows: asked.append(rows))
    motab.synthesize(student, teacher, tokenizer, prompts[:2], batch_size=8, max_new_tokens=9)
    motab.synthesize(student, teacher, tokenizer, prompts[:3], batch_size=2, max_new_tokens=9)
    assert asked == [2, 2]


def test_training_on_what_it_writes(tmp_path, tokenizer, prompts):
    student, teacher = pair_of("lfm2", tokenizer)
    before = copy.deepcopy(student)
    trainer = motab.MotabTrainer(
        *(student, teacher, config(tmp_path, loss_type="jsd", max_steps=2, per_device_train_batch_size=3)),
        train_dataset=motab.Rollouts(prompts, POLICY, max_new_tokens=12, block_size=4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert not all(map(torch.equal, student.parameters(), before.parameters()))
