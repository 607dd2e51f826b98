"""Trajectories for other people's trainers."""

import pytest
import torch
from conftest import make_model
from test_trainer import TRAJECTORIES, config, trajectory

import motab
from motab.cli import main

datasets = pytest.importorskip("datasets")
IGNORE = ["flawed", "stitch"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "trajectories.jsonl").write_text("".join(t.to_json() + "\n" for t in TRAJECTORIES))
    return ["export", "--output_dir", str(tmp_path)]


def load(path):
    kind = {".parquet": "parquet", ".jsonl": "json"}[path.suffix]
    return datasets.load_dataset(kind, data_files=str(path), split="train")


@pytest.mark.parametrize("name", ["new/data.parquet", "data.jsonl"])
@pytest.mark.parametrize("ignore", [[], IGNORE])
def test_round_trip(tmp_path, capsys, monkeypatch, run, name, ignore):
    """Also in several parts."""
    monkeypatch.setattr("motab.export._ROWS", 1)
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / name
    assert main([*run, "--output_file", str(path), *(["--ignore_authors", *ignore] if ignore else [])]) == 0
    assert f"{path}: 2 trajectories of at most 7 tokens" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir() if "data" in file.name] == [path.name]
    table = load(path)
    assert sorted(table.column_names) == ["attention_mask", "input_ids", "labels"]
    expected = list(motab.TrajectoryDataset(TRAJECTORIES, ignore))
    assert [{name: row[name] for name in ("input_ids", "labels")} for row in table] == expected
    assert [row["attention_mask"] for row in table] == [[1] * 7, [1] * 3]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
@pytest.mark.parametrize("size", [1, 2])
def test_a_step_of_trl(tmp_path, tokenizer, size):
    """On the file as it is the loss is that of the definition and of our trainer, whatever the micro-batch."""
    trl = pytest.importorskip("trl")
    motab.export_dataset(motab.TrajectoryDataset(TRAJECTORIES, IGNORE), tmp_path / "data.parquet")
    model, total, count = make_model(3), 0.0, 0
    for t in TRAJECTORIES:
        ids = t.prompt_ids + t.token_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, author in enumerate(t.author, len(t.prompt_ids)):
            if author not in IGNORE:
                total, count = total - float(logprobs[place - 1, ids[place]]), count + 1
    assert count == 5
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size, "max_steps": 1}
    settings |= {"logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "optim": "sgd"}
    args = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False}
    theirs = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path / "theirs"), **args, **settings),
        train_dataset=load(tmp_path / "data.parquet"),
        processing_class=tokenizer,
    )
    ours = motab.MotabTrainer(
        make_model(3), args=config(tmp_path / "ours", ignore_authors=IGNORE, **settings), train_dataset=TRAJECTORIES
    )
    for trainer in (theirs, ours):
        trainer.train()
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert logged == pytest.approx(total / count, rel=1e-4)
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-7)


def test_examples_without_a_token_to_train_on(tmp_path):
    """The second trajectory is the student's alone."""
    path = tmp_path / "data.parquet"
    with pytest.warns(UserWarning, match="1 of 2 trajectories have no token to train on; they are left out"):
        assert motab.export_dataset(motab.TrajectoryDataset(TRAJECTORIES, "student"), path) == 1
    assert load(path)["input_ids"] == [[1, 2, 3, 4, 5, 6, 7]]
    with pytest.raises(ValueError, match="dataset must hold at least one trajectory, got none"):
        motab.export_dataset(motab.TrajectoryDataset([]), tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


@pytest.mark.filterwarnings("ignore:1 of 2 trajectories have more")
def test_trajectories_that_are_too_long(tmp_path, run):
    assert main([*run, "--output_file", str(tmp_path / "data.parquet"), "--max_length", "6"]) == 0
    assert load(tmp_path / "data.parquet")["input_ids"] == [[8, 9, 0]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --output_file, as a flag or in the file of --config"),
        (["--output_file", "data.csv"], "output_file must end in .parquet or .jsonl, got 'data.csv'"),
        (
            ["--output_file", "data.jsonl", "--output_dir", "none"],
            "trajectories.jsonl does not exist; motab synthesize",
        ),
        (["--output_file", "data.jsonl", "--ignore_authors", "flawd"], "ignore_authors must be among student, flawed"),
        (["--output_file", "trajectories.jsonl", "--output_dir", "."], "--output_file must not be the traj"),
    ],
)
def test_refusals_leave_nothing(tmp_path, capsys, monkeypatch, run, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main([*run, *flags]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["trajectories.jsonl"]
    assert len(motab.read_trajectories("trajectories.jsonl")) == 2


def test_an_unfinished_file(tmp_path, capsys, run):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(path.read_text()[:-9])
    assert main([*run, "--output_file", str(tmp_path / "data.jsonl")]) == 0
    assert "holds 1 trajectories and a line cut short, unfinished" in capsys.readouterr().err
    assert len(load(tmp_path / "data.jsonl")) == 1
    path.write_text("")
    assert main([*run, "--output_file", str(tmp_path / "none.jsonl")]) == 2
    assert "trajectories.jsonl holds no trajectory yet" in capsys.readouterr().err


def test_what_a_dataset_refuses():
    with pytest.raises(ValueError, match=r"ignore_authors must be among student, .* got nobody"):
        motab.TrajectoryDataset(TRAJECTORIES, ["nobody"])
    with pytest.raises(ValueError, match="ignore_authors names every author"):
        motab.TrajectoryDataset([trajectory(0, [1], [2], ["student"])], motab.trajectory.AUTHORS)
