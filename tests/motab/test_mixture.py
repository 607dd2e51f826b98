"""Training on a mixture of given trajectories and of those that the student writes as it trains."""

import copy
import itertools
import json

import pytest
import torch
from test_cli import TINY
from test_rollouts import SETTINGS, StopAt, config, rollouts_of
from transformers import GenerationConfig

import motab
from motab.cli import main
from motab.dataset import TrajectoryDataset
from motab.trajectory_file import read_trajectories


@pytest.fixture(scope="module")
def texts(student, teacher, tokenizer, prompts):
    """What the teacher wrote beforehand."""
    return list(motab.synthesize(student, teacher, tokenizer, prompts, policy=motab.TeacherOnly(), **SETTINGS))


class Recording(motab.MotabTrainer):
    """Keeps the students, the batches, and what was written for each row, None where a given text stands."""

    def __init__(self, *arguments, **settings):
        self.students, self.batches, self.found = [], [], []
        super().__init__(*arguments, **settings)
        write = self.rollouts.write

        def kept(*arguments, **settings):
            self.found.append(write(*arguments, **settings))
            return self.found[-1]

        object.__setattr__(self.rollouts, "write", kept)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.students.append(copy.deepcopy(self.model).eval())
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert int(count) == sum(int((batch["labels"] != -100).sum()) for batch in batches)
        self.batches.append(batches)
        return batches, count


def train(folder, student, teacher, tokenizer, prompts, lmbda=0.5, policy=None, resume=None, stop=None, **settings):
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 3, "loss_type": "jsd", **settings}
    trainer = Recording(
        *(copy.deepcopy(student), teacher, config(folder, lr_scheduler_type="constant", **settings)),
        train_dataset=motab.Rollouts(prompts, policy or motab.OnPolicy(), lmbda=lmbda, **SETTINGS),
        processing_class=tokenizer,
    )
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows_of(batches):
    """Ids and labels of each row, without padding."""
    for batch in batches:
        lengths = batch["attention_mask"].sum(1).tolist()
        for length, ids, labels in zip(lengths, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            yield {"input_ids": ids[:length], "labels": labels[:length]}


def test_each_row_is_given_or_written_now(tmp_path, student, teacher, tokenizer, texts):
    given = TrajectoryDataset(texts, ignore_authors=["flawed"])
    of = {tuple(t.prompt_ids): given[place] for place, t in enumerate(texts)}
    settings = {"ignore_authors": ["flawed"], "gradient_accumulation_steps": 2, "num_train_epochs": 4}
    trainer = train(tmp_path, student, teacher, tokenizer, given, **settings)
    kinds = {prompt: [] for prompt in of}
    for writer, batches, found in zip(trainer.students, trainer.batches, trainer.found, strict=True):
        written = [t for t in found if t is not None]
        expected = motab.synthesize(
            *(writer, teacher, tokenizer, [t.prompt_ids for t in written]),
            policy=motab.OnPolicy(),
            seed=trainer.args.seed,
            indices=[t.index for t in written],
            **SETTINGS,
        )
        assert [t.token_ids for t in expected] == [t.token_ids for t in written]
        for row, trajectory in zip(rows_of(batches), found, strict=True):
            prompt = tuple(row["input_ids"][: row["labels"].count(-100)])
            kinds[prompt].append(trajectory is None)
            if trajectory is None:
                assert row == of[prompt]
            else:
                assert row["input_ids"] == [*prompt, *trajectory.token_ids]
                assert row["labels"] == [-100] * len(prompt) + trajectory.token_ids
    assert {prompt: len(drawn) for prompt, drawn in kinds.items()} == dict.fromkeys(of, 4)  # once in each epoch
    assert {True, False} in map(set, kinds.values())  # and drawn anew


@pytest.mark.parametrize("lmbda", [0.2, 0.9])
def test_the_share_that_is_written(student, tokenizer, texts, lmbda, monkeypatch):
    def written(student, teacher, tokenizer, prompts, *, indices, **settings):
        return [
            motab.Trajectory(i, list(p), [1], ["student"], "", [], None, None, "length")
            for i, p in zip(indices, prompts, strict=True)
        ]

    monkeypatch.setattr("motab.rollouts.synthesize", written)
    rollouts = motab.Rollouts(TrajectoryDataset(texts), motab.OnPolicy(), lmbda=lmbda)
    places = [i % len(texts) for i in range(2000)]

    def drawn(seed, first, last):
        return rollouts.write(student, None, tokenizer, places[first:last], seed=seed, indices=range(first, last))

    found = drawn(0, 0, 2000)
    assert [t.index for t in found if t] == [index for index, t in enumerate(found) if t]
    assert all(t.prompt_ids == texts[place].prompt_ids for t, place in zip(found, places, strict=True) if t)
    assert abs(sum(t is not None for t in found) / 2000 - lmbda) < 4 * (lmbda * (1 - lmbda) / 2000) ** 0.5
    assert drawn(0, 700, 900) == found[700:900]  # by its index alone
    assert [t is None for t in drawn(1, 0, 2000)] != [t is None for t in found]


def test_all_are_written_with_lmbda_1(tmp_path, student, teacher, tokenizer, texts, prompts):
    """As on the prompts alone, whatever was given."""
    mixed, alone = (
        train(tmp_path / name, student, teacher, tokenizer, data, lmbda=1.0, max_steps=3)
        for name, data in (("mixed", TrajectoryDataset(texts)), ("alone", prompts))
    )
    assert [[t.token_ids for t in step] for step in mixed.found] == [
        [t.token_ids for t in step] for step in alone.found
    ]
    assert all(map(torch.equal, mixed.model.parameters(), alone.model.parameters()))


def test_resumes(tmp_path, student, teacher, tokenizer, texts):
    given = TrajectoryDataset(texts)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "save_rollouts": True}
    whole = train(tmp_path / "whole", student, teacher, tokenizer, given, **settings)
    train(tmp_path / "halves", student, teacher, tokenizer, given, stop=3, **settings)
    resumed = train(tmp_path / "halves", student, teacher, tokenizer, given, resume=True, **settings)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    found, expected = (read_trajectories(rollouts_of(tmp_path / name)) for name in ("halves", "whole"))
    assert found == expected == [t for step in whole.found for t in step if t is not None]


@pytest.mark.parametrize("both", [False, True])
def test_an_ignored_author_is_ignored_in_all_rows(tmp_path, student, teacher, tokenizer, prompts, both):
    """Set where the dataset is made, as its message says, and in the config or not."""
    policy = motab.MotabPolicy(0.5, 0.5, stitch="ab,")
    texts = list(motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **SETTINGS))
    given = TrajectoryDataset(texts, ignore_authors=["flawed", "stitch"])
    settings = {"ignore_authors": ["flawed", "stitch"]} if both else {}
    trainer = train(tmp_path, student, teacher, tokenizer, given, policy=policy, max_steps=4, **settings)
    rows = [row for batches in trainer.batches for row in rows_of(batches)]
    found = itertools.chain.from_iterable(trainer.found)
    written = [(t, row) for t, row in zip(found, rows, strict=True) if t is not None]
    assert any("flawed" in t.author for t, _ in written)
    for t, row in written:
        trained = [a not in ("flawed", "stitch") for a in t.author]
        expected = [token if does else -100 for token, does in zip(t.token_ids, trained, strict=True)]
        assert row["labels"] == [-100] * len(t.prompt_ids) + expected


def test_a_dataset_that_ignores_all_that_is_written(tmp_path, student, teacher, tokenizer, prompts):
    given = TrajectoryDataset(
        motab.synthesize(student, teacher, tokenizer, prompts, policy=motab.TeacherOnly(), **SETTINGS), "student"
    )
    with pytest.raises(ValueError, match="must leave a token to train on, got student, who alone writes under OnPol"):
        train(tmp_path, student, teacher, tokenizer, given)


def test_the_log_counts_those_that_were_written(tmp_path, student, teacher, tokenizer, texts):
    trainer = train(tmp_path, student, teacher, tokenizer, TrajectoryDataset(texts), 0.3, logging_steps=1)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("trajectories", 0) for entry in entries] == [
        sum(t is not None for t in step) for step in trainer.found
    ]
    assert not all("trajectories" in entry for entry in entries)
    assert all(0 <= entry["writing_seconds"] < entry["seconds"] for entry in entries)  # of that step alone, each


def test_the_saved_model_ends_where_a_given_text_does(tmp_path, student, teacher, tokenizer, prompts):
    given = [motab.Trajectory(0, prompts[0], [5, 9], ["teacher"] * 2, "", [], None, None, "eos")]
    trainer = train(tmp_path, student, teacher, tokenizer, TrajectoryDataset(given), max_steps=1)
    trainer.save_model()
    assert 9 in GenerationConfig.from_pretrained(tmp_path).eos_token_id


def test_a_given_prompt_needs_room_for_what_is_written(tmp_path, student, teacher, tokenizer):
    given = [motab.Trajectory(0, [1] * 250, [5], ["teacher"], "", [], None, None, "length")]
    with pytest.raises(ValueError, match=r"has 250 tokens and max_new_tokens is 12.*, or --max_length of a train_file"):
        train(tmp_path, student, teacher, tokenizer, TrajectoryDataset(given))


@pytest.mark.parametrize("lmbda", [0, -0.5, 1.5, float("nan"), "0.5", None, True])
def test_an_lmbda_that_is_no_share(texts, lmbda):
    with pytest.raises(ValueError, match=f"lmbda must be above 0 and at most 1, got {lmbda!r}; to train on given"):
        motab.Rollouts(TrajectoryDataset(texts), lmbda=lmbda)


def test_prompts_alone():
    with pytest.raises(ValueError, match="mixes in given trajectories, got prompts alone; give Rollouts a"):
        motab.Rollouts(["a"], lmbda=0.5)


@pytest.mark.parametrize("settings", [{"max_length": 99}, {"ignore_authors": ["flawed"]}, {"only_correct": True}])
def test_settings_that_are_not_those_of_the_dataset(tmp_path, student, teacher, tokenizer, texts, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"a TrajectoryDataset is taken as it is, got {name}: set them when it is"):
        train(tmp_path, student, teacher, tokenizer, TrajectoryDataset(texts), **settings)
    for t in texts:
        t.correct = True
    train(tmp_path, student, teacher, tokenizer, TrajectoryDataset(texts, **settings), max_steps=1, **settings)


@pytest.fixture
def command(tmp_path):
    """A training of two epochs on two given solutions, half of it on what the student writes."""
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 2 =", "solution": f"So {i + 2}."}) + "\n" for i in (1, 3)))
    student, folder = str(TINY / "student"), str(tmp_path / "given")
    made = ["import", "--model_name_or_path", student, "--dataset_name", str(file), "--output_dir", folder]
    assert main(made) == 0
    found = ["train", "--model_name_or_path", student, "--teacher_model_name_or_path", str(TINY / "teacher")]
    found += ["--train_file", f"{folder}/trajectories.jsonl", "--loss_type", "jsd", "--use_cpu", "--report_to", "none"]
    found += ["--num_train_epochs", "2", "--per_device_train_batch_size", "1", "--logging_steps", "1"]
    return [*found, "--output_dir", str(tmp_path / "model"), "--lmbda", "0.5"]


def test_from_the_command_line(command, tmp_path, capsys):
    writing = ["--policy", "on_policy", "--max_new_tokens", "8", "--ignore_authors", "flawed"]
    assert main([*command, *writing, "--max_length", "400", "--save_rollouts"]) == 0
    (state,) = (tmp_path / "model").glob("checkpoint-*/trainer_state.json")
    steps = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    written = sum(entry.get("trajectories", 0) for entry in steps)
    assert (len(steps), written) == (4, len(read_trajectories(rollouts_of(tmp_path / "model"))))
    assert 0 < written < 4
    assert main([*command, *writing, "--max_length", "400", "--lmbda", "0.6"]) == 2
    assert "(lmbda: 0.5 there, 0.6 now)" in capsys.readouterr().err


def test_an_lmbda_of_0_is_none(command, capsys):
    """The same training as without the flag."""
    *without, flag, _ = command
    assert main([*without, flag, "0"]) == 0
    assert main(without) == 0
    assert "already trained with these settings" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--only_correct"], "only_correct needs graded trajectories, got trajectory 0 of"),
        (["--lmbda", "2"], "lmbda must be above 0 and at most 1, got 2.0"),
        (
            ["--grade"],
            "--train_file takes no settings of problems, got --grade: leave them out, or give --dataset_name",
        ),
        (["--policy", "teacher_only"], "Rollouts need a policy under which the student writes, got TeacherOnly"),
        (["--lmbda", "0", "--top_p", "0.9"], "--train_file takes no settings of writing, got --top_p"),
        (["--train_file", "", "--dataset_name", "x.jsonl"], "--lmbda 0.5 mixes what the student writes with --train_f"),
    ],
)
def test_bad_flags(command, change, message, capsys, monkeypatch):
    monkeypatch.setattr("motab.cli.load_model", None)  # before a model is loaded
    assert main([*command, *change]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
