"""Trajectories as the trainer's examples."""

import tracemalloc

import pytest
from conftest import make_model
from test_trainer import TRAJECTORIES, config, trajectory

import motab
from motab.dataset import TrajectoryDataset, collate


def test_labels_and_padding():
    batch = collate([TrajectoryDataset(TRAJECTORIES)[i] for i in (0, 1)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, 5, 6, 7], [-100, 9, 0, -100, -100, -100, -100]]
    ignoring = TrajectoryDataset(TRAJECTORIES, ["flawed", "stitch"] * 2)  # as often as there are authors
    assert ignoring[0]["labels"] == [-100, -100, 3, -100, -100, 6, 7]


def test_reads_the_file_of_a_synthesis(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(t.to_json() + "\n" for t in TRAJECTORIES) + TRAJECTORIES[0].to_json()[:-9])
    for source in (path, str(path)):
        read = TrajectoryDataset(source, ["teacher"])
        assert list(read) == list(TrajectoryDataset(TRAJECTORIES, ["teacher"]))
        assert len(read) == 2


@pytest.mark.parametrize("in_file", [False, True])
def test_a_few_bytes_a_token(tmp_path, in_file):
    count, length = 20, 2000
    token_ids = list(range(1000, 1000 + length))
    statistics = {name: [0.1 * i for i in range(length)] for name in motab.trajectory.STATISTICS}
    path = tmp_path / "trajectories.jsonl"
    with path.open("w") as file:
        for index in range(count):
            whole = trajectory(index, [1, 2], token_ids, ["student"] * length)
            whole.statistics = statistics
            file.write(whole.to_json() + "\n")
    source = path if in_file else motab.read_trajectories(path)
    tracemalloc.start()
    try:
        dataset = TrajectoryDataset(source)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset[count - 1]["labels"] == [-100, -100, *token_ids]
    assert kept < 6 * count * length
    assert peak < kept + 1000 * length  # of one trajectory while it is read


def test_tokens_and_authors_that_differ_in_number():
    with pytest.raises(ValueError, match="trajectory 7 has 2 tokens and 1 authors"):
        TrajectoryDataset([trajectory(7, [1], [2, 3], ["student"])])


def test_trajectories_that_are_too_long():
    """Of 7 and 3 tokens."""
    assert len(TrajectoryDataset(TRAJECTORIES, max_length=7)) == 2
    with pytest.warns(UserWarning, match="1 of 2 trajectories have more than max_length 6 tokens; they are left out"):
        assert list(TrajectoryDataset(TRAJECTORIES, max_length=6)) == [TrajectoryDataset(TRAJECTORIES)[1]]
    with pytest.raises(
        ValueError, match=r"2 of 2 trajectories have more than max_length 2 tokens: none is left; raise max_length$"
    ):
        TrajectoryDataset(TRAJECTORIES, max_length=2)


def test_trajectories_without_a_token_to_train_on(tmp_path):
    """The second is the student's alone: a step on it would do nothing, and the first's loss count as half."""
    message = "1 of 2 trajectories have no token to train on"
    with pytest.warns(UserWarning, match=f"{message}; they are left out"):
        kept = TrajectoryDataset(TRAJECTORIES, "student")
    assert list(kept) == [TrajectoryDataset(TRAJECTORIES[:1], "student")[0]]
    assert kept.end_tokens == {7}
    with pytest.raises(ValueError, match=r"1 of 1 trajectories have no token .*: none is left; ignore fewer authors$"):
        TrajectoryDataset(TRAJECTORIES[1:], "student")
    args = config(tmp_path, ignore_authors=["student"], per_device_train_batch_size=1, num_train_epochs=1)
    with pytest.warns(UserWarning, match=message):
        trainer = motab.MotabTrainer(make_model(3), args=args, train_dataset=TRAJECTORIES)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.filterwarnings("ignore:1 of 2 trajectories")
def test_the_trainer_leaves_them_out(tmp_path):
    short, both = {"max_length": 6}, {"a": TRAJECTORIES}
    trainer = motab.MotabTrainer(
        make_model(3), args=config(tmp_path, **short), train_dataset=TRAJECTORIES, eval_dataset=both
    )
    assert (len(trainer.train_dataset), len(trainer.eval_dataset["a"])) == (1, 1)
    assert len(trainer.get_eval_dataloader(TRAJECTORIES).dataset) == 1
    with pytest.raises(ValueError, match=r"max_length must be at least 1, or None .* got 0"):
        config(tmp_path, max_length=0)
