"""Training on what the student writes as it trains."""

import copy
import dataclasses
import functools
import gc
import itertools
import types
import weakref

import pytest
import torch
from conftest import make_model
from test_trainer import StopAt, config
from transformers import GenerationConfig

import motab
import motab_kernels as mk
from motab.trajectory_file import read_trajectories

POLICIES = {
    "on-policy": motab.OnPolicy(),
    "motab": motab.MotabPolicy(0.3, 0.5, stitch="ab,"),
    "token skd": motab.TokenSKD(2),
}
SETTINGS = {"max_new_tokens": 12, "batch_size": 3, "block_size": 4, "temperature": 1.0, "top_k": 9, "min_p": 0.01}


@dataclasses.dataclass(frozen=True)
class Kept(motab.Rollouts):
    """Keeps all that is written."""

    kept: list[motab.Trajectory] = dataclasses.field(default_factory=list)

    def write(self, *arguments, **settings):
        written = super().write(*arguments, **settings)
        self.kept.extend(written)
        return written


class Recording(motab.MotabTrainer):
    """Keeps the student that wrote, what it wrote, and the batches that were made of it."""

    def __init__(self, *arguments, **settings):
        self.steps = []
        super().__init__(*arguments, **settings)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        student, before = copy.deepcopy(self.model), len(self.rollouts.kept)
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.steps.append((student.eval(), self.rollouts.kept[before:], batches, count))
        return batches, count


def train(folder, student, teacher, tokenizer, prompts, policy, trainer=Recording, resume=None, stop=None, **settings):
    settings = {"learning_rate": 3e-2, "per_device_train_batch_size": 2, "logging_steps": 1, **settings}
    rollouts = Kept(prompts, policy, **SETTINGS)
    args = config(folder, lr_scheduler_type="constant", **settings)
    trainer = trainer(copy.deepcopy(student), teacher, args, train_dataset=rollouts, processing_class=tokenizer)
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("loss_type", ["reverse_kl", "cross_entropy"])
def test_each_step_trains_on_what_its_own_student_writes(
    tmp_path, student, teacher, tokenizer, prompts, name, loss_type
):
    trainer = train(
        tmp_path,
        *(student, teacher, tokenizer, prompts, POLICIES[name]),
        loss_type=loss_type,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    places, texts = [], []
    assert len(trainer.steps) == 4
    for writer, trajectories, batches, count in trainer.steps:
        assert len(trajectories) == 4  # two micro-batches of two
        offset = trajectories[0].index
        expected = motab.synthesize(
            *(writer, teacher, tokenizer, [t.prompt_ids for t in trajectories]),
            policy=POLICIES[name],
            seed=trainer.args.seed,
            indices=range(offset, offset + 4),
            **SETTINGS,
        )
        assert [t.token_ids for t in expected] == [t.token_ids for t in trajectories]
        rows = [row for batch in batches for row in batch["input_ids"].tolist()]
        for row, t in zip(rows, trajectories, strict=True):
            assert row[: len(t.prompt_ids + t.token_ids)] == t.prompt_ids + t.token_ids
        assert int(count) == sum(len(t.token_ids) for t in trajectories)
        places += [t.index for t in trajectories]
        texts += [t.token_ids for t in trajectories]
    assert len(set(places)) == len(places)
    assert sorted(t.prompt_ids for _, ts, *_ in trainer.steps[:3] for t in ts) == sorted(prompts)  # an epoch
    # The student learned, so that what the first one would write is not what the last one wrote.
    writer, trajectories, *_ = trainer.steps[3]
    stale = motab.synthesize(
        *(student, teacher, tokenizer, [t.prompt_ids for t in trajectories]),
        policy=POLICIES[name],
        seed=trainer.args.seed,
        indices=[t.index for t in trajectories],
        **SETTINGS,
    )
    assert [t.token_ids for t in stale] != [t.token_ids for t in trajectories]


def test_the_log_holds_the_figures(tmp_path, student, teacher, tokenizer, prompts):
    trainer = train(tmp_path, student, teacher, tokenizer, prompts, POLICIES["motab"], loss_type="jsd", max_steps=3)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (_, trajectories, *_) in zip(entries, trainer.steps, strict=True):
        assert entry["breach_rate"] == sum(t.breach_step is not None for t in trajectories) / len(trajectories)
        assert entry["tokens"] == sum(len(t.token_ids) for t in trajectories)
        entropies = [x for t in trajectories for x in t.statistics["student_entropy"] if x is not None]
        assert entry["student_entropy"] == pytest.approx(sum(entropies) / len(entropies))
        assert 0 < entry["writing_seconds"] < entry["seconds"]
    assert sum(entry["seconds"] for entry in entries) <= trainer.state.log_history[-1]["train_runtime"]
    assert trainer.model.training


def test_an_entry_of_the_log_holds_all_since_the_last(tmp_path, student, teacher, tokenizer, prompts, monkeypatch):
    """And an evaluation between takes none of them. By a clock that ticks once whenever it is asked."""
    monkeypatch.setattr("motab.trainer.time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    held_out = list(motab.synthesize(student, teacher, tokenizer, prompts[:2], **SETTINGS))
    trainer = train(
        tmp_path,
        *(student, teacher, tokenizer, prompts, POLICIES["motab"]),
        trainer=functools.partial(motab.MotabTrainer, eval_dataset=held_out),
        **{"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
    )
    names = ("trajectories", "writing_seconds", "seconds")
    entries = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    assert entries == [[4, 2, 4], [4, 2, 5]]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert not any("trajectories" in entry for entry in evaluations)


def test_nothing_written_is_kept_where_nothing_is_logged(tmp_path, student, teacher, tokenizer, prompts):
    """But its figures, of a training that may take days."""
    trainer = train(
        *(tmp_path, student, teacher, tokenizer, prompts, POLICIES["motab"]),
        trainer=motab.MotabTrainer,
        max_steps=4,
        logging_strategy="no",
    )
    kept, found = trainer.rollouts.kept, trainer.written.figures()
    assert (found["trajectories"], found["tokens"]) == (8, sum(len(t.token_ids) for t in kept))
    references = [weakref.ref(t) for t in kept]
    kept.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * 8


@pytest.mark.parametrize("training", [False, True])
def test_the_student_is_left_in_its_mode(student, tokenizer, training):
    student = copy.deepcopy(student).train(training)
    rollouts = motab.Rollouts([[1], []], motab.OnPolicy(), **SETTINGS)
    rollouts.write(student, None, tokenizer, [0], seed=0, indices=[0])
    assert student.training == training
    with pytest.raises(ValueError, match="is empty"):
        rollouts.write(student, None, tokenizer, [1], seed=0, indices=[1])
    assert student.training == training


def test_places_of_prompts():
    """As many as there are prompts: of a dataset that raises nothing a list never ends."""
    rollouts = motab.Rollouts(["a", "b"])
    assert list(itertools.islice(rollouts, 3)) == [0, 1]
    assert rollouts[-1] == 1


@pytest.mark.parametrize("prompts", [iter(["a"]), None])
def test_prompts_that_cannot_be_counted(prompts):
    with pytest.raises(ValueError, match=f"prompts must be a sequence, .* got {type(prompts).__name__}; make a list"):
        motab.Rollouts(prompts)


@pytest.mark.parametrize("prompts", ["ab", {"role": "user", "content": "a"}])
def test_a_prompt_alone(prompts):
    with pytest.raises(ValueError, match=f"prompts must be a list of prompts, got {type(prompts).__name__} .* alone"):
        motab.Rollouts(prompts)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumes(tmp_path, student, teacher, tokenizer, prompts, dropout):
    student = copy.deepcopy(student)
    student.config.attention_dropout = dropout  # which must not be there when it writes
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = dropout
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "loss_type": "forward_kl"}
    settings["save_rollouts"] = True
    arguments = (student, teacher, tokenizer, prompts, POLICIES["motab"])
    whole = train(tmp_path / "whole", *arguments, **settings)
    train(tmp_path / "halves", *arguments, stop=3, **settings)
    before, files = read_trajectories(rollouts_of(tmp_path / "halves")), (tmp_path / "whole", tmp_path / "halves")
    assert len(before) == 3 * 2  # a step beyond the checkpoint
    resumed = train(tmp_path / "halves", *arguments, resume=True, **settings)
    for x, y in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(x, y)
    found, expected = (read_trajectories(rollouts_of(folder)) for folder in files)
    assert found == expected == [t for _, trajectories, *_ in whole.steps for t in trajectories]


def rollouts_of(folder):
    return folder / "rollouts" / "trajectories.jsonl"


@pytest.mark.parametrize("fuses_head", [True, False])
def test_a_step_of_which_no_token_counts(tmp_path, student, teacher, tokenizer, prompts, monkeypatch, fuses_head):
    """A teacher that never steps in leaves the student's alone, which are ignored: a loss of 0, and no NaN."""
    monkeypatch.setattr("motab.trainer.has_plain_head", lambda model: fuses_head)
    policy = motab.TokenSKD(16)  # the whole vocabulary
    settings = {"ignore_authors": ["student"], "max_steps": 2, "logging_nan_inf_filter": False}
    trainer = train(tmp_path, student, teacher, tokenizer, prompts, policy, **settings)
    assert [set(t.author) for _, written, *_ in trainer.steps for t in written] == [{"student"}] * 4
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(entry["loss"], entry["grad_norm"]) for entry in entries] == [(0, 0)] * 2
    assert all(map(torch.equal, trainer.model.parameters(), student.parameters()))


def test_brings_the_student_to_the_teacher(tmp_path, student, teacher, tokenizer, prompts):
    settings = {"learning_rate": 1e-2, "num_train_epochs": 40, "per_device_train_batch_size": 12}
    trainer = train(
        tmp_path,
        *(make_model(3), teacher, tokenizer, prompts, motab.OnPolicy()),
        trainer=motab.MotabTrainer,
        loss_type="reverse_kl",
        **settings,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_saved_model_ends_where_either_model_does(tmp_path, student, teacher, tokenizer, prompts):
    teacher = copy.deepcopy(teacher)
    teacher.generation_config.eos_token_id = [0, 9]
    trainer = train(tmp_path, student, teacher, tokenizer, prompts, POLICIES["motab"], max_steps=1)
    trainer.save_model()
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 9]


def test_held_out_trajectories(tmp_path, student, teacher, tokenizer, prompts):
    """Written beforehand, evaluated as the student trains on what it writes."""
    held_out = list(motab.synthesize(student, teacher, tokenizer, prompts, **SETTINGS))
    trainer = train(
        tmp_path,
        *(student, teacher, tokenizer, prompts, motab.OnPolicy()),
        trainer=functools.partial(motab.MotabTrainer, eval_dataset=held_out),
        **{"loss_type": "forward_kl", "max_steps": 30, "eval_strategy": "steps", "learning_rate": 3e-3},
    )
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataset": motab.Rollouts([])}, "at least one trajectory or prompt, got none"),
        (
            {"train_dataset": motab.Rollouts([[1]], motab.TeacherOnly())},
            "Rollouts need a policy under which the student writes, got TeacherOnly",
        ),
        (
            {"ignore_authors": ["student"]},
            "ignore_authors must leave a token to train on, got student, who alone writes under OnPolicy",
        ),
        ({"processing_class": None}, "Rollouts need the tokenizer; give processing_class"),
        ({"max_length": 9}, "max_length applies to finished trajectories, got 9 with Rollouts; give them max_new"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy group_by_length applies to finished trajectories, got Rollouts",
        ),
        ({"teacher_model": None}, "loss_type jsd compares the student with a teacher"),
    ],
)
def test_bad_input(tmp_path, student, teacher, tokenizer, change, message):
    arguments_of_trainer = ("train_dataset", "processing_class", "teacher_model")
    settings = {name: value for name, value in change.items() if name not in arguments_of_trainer}
    change = {name: value for name, value in change.items() if name not in settings}
    arguments = {
        "model": copy.deepcopy(student),
        "teacher_model": teacher,
        "args": config(tmp_path, loss_type="jsd", **settings),
        "train_dataset": motab.Rollouts([[1]], motab.OnPolicy()),
        "processing_class": tokenizer,
    }
    with pytest.raises(ValueError, match=message):
        motab.MotabTrainer(**{**arguments, **change})


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([1] * 250, "prompt 2 has 250 tokens and max_new_tokens is 12"),
        (None, "prompt 2 must be a string"),
    ],
)
def test_all_prompts_are_looked_at_before_training(tmp_path, student, teacher, tokenizer, last, message):
    """In an order of its own the trainer might come to them after days."""
    prompts = [[1], [2], last]
    with pytest.raises(ValueError, match=message):
        motab.MotabTrainer(
            *(copy.deepcopy(student), teacher, config(tmp_path)),
            train_dataset=motab.Rollouts(prompts, motab.OnPolicy(), **SETTINGS),
            processing_class=tokenizer,
        )


def test_a_truncated_rollout_needs_room_for_what_it_writes(tmp_path, student, teacher, tokenizer):
    trainer = train(tmp_path, student, teacher, tokenizer, [[1] * 250, [2]], motab.Truncated(6), max_steps=1)
    (_, written, _, _) = trainer.steps[0]
    assert all(0 < len(trajectory.token_ids) <= 6 for trajectory in written)
    assert 250 in [len(trajectory.prompt_ids) for trajectory in written]


def test_a_policy_without_its_teacher(tmp_path, student, tokenizer, prompts):
    with pytest.raises(ValueError, match="MotabPolicy needs a teacher, got None"):
        train(tmp_path, student, None, tokenizer, prompts, motab.MotabPolicy(), trainer=motab.MotabTrainer)


#: As transformers calls it; 5.17 knows the old name alone.
CHECKPOINTING = (
    "activation" if hasattr(motab.MotabConfig, "activation_checkpointing") else "gradient"
) + "_checkpointing"


@pytest.mark.parametrize("loss_type", ["reverse_kl", "cross_entropy"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision(tmp_path, student, teacher, tokenizer, prompts, monkeypatch, loss_type, checkpointing):
    """Float32 weights under autocast write in its precision, keys and values too, what they write there otherwise."""
    caches = []
    make = mk.RaggedKVCache.__init__
    monkeypatch.setattr(
        mk.RaggedKVCache, "__init__", lambda *x, dtype, **kw: caches.append(dtype) or make(*x, dtype=dtype, **kw)
    )
    pair = [copy.deepcopy(model).float() for model in (student, teacher)]
    settings = {"bf16": True, "max_steps": 2, "loss_type": loss_type, CHECKPOINTING: checkpointing}
    trainer = train(tmp_path, *pair, tokenizer, prompts, POLICIES["motab"], **settings)
    assert set(caches) == {torch.bfloat16}
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    _, trajectories, *_ = trainer.steps[0]
    assert any(t.breach_step is not None for t in trajectories)
    with torch.autocast("cpu", torch.bfloat16):
        again = motab.synthesize(
            *(*pair, tokenizer, [t.prompt_ids for t in trajectories]),
            policy=POLICIES["motab"],
            seed=trainer.args.seed,
            indices=[t.index for t in trajectories],
            **SETTINGS,
        )
        assert [t.token_ids for t in again] == [t.token_ids for t in trajectories]
