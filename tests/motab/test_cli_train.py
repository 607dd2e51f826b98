"""motab train: on a file or as it writes, again, with other settings, and what it refuses."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from test_cli import TASK, TINY
from transformers import AutoTokenizer

import motab
from motab.arguments import TrainArguments
from motab.cli import main
from motab.fingerprint import hash_of_weights
from motab.lock import Lock
from motab.models import load_model, with_lora
from motab.parsing import parse
from motab.resume import DECISIVE, decisive_settings, last_checkpoint, record


def test_an_unfinished_synthesis(training, tmp_path, capsys):
    """Of which the settings beside it tell; and, where there are none, a last line cut short."""
    command, path = training
    settings = tmp_path / "trajectories.jsonl.settings.json"
    settings.write_text('{"prompts": 12}')
    AutoTokenizer.from_pretrained(TINY / "student").save_pretrained(tmp_path)
    missing = f"{path} holds 4 of 12 trajectories, unfinished: run the same motab synthesize again to continue"
    assert main(["verify", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"motab verify: {missing}\n")
    assert main(["report", "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"motab report: {missing}\n"
    assert main([*command, "--eval_file", str(path)]) == 0
    assert capsys.readouterr().err.count(f"motab train: {missing}\n") == 2
    path.write_text(path.read_text() * 2)
    assert main(["verify", "--output_dir", str(tmp_path)]) == 2
    assert "trajectory 4 has index 1" in capsys.readouterr().err
    settings.unlink()
    line = motab.Trajectory(0, [1], [2], ["student"], "", [], None, None, "eos").to_json() + "\n"
    path.write_text(line + line[:9])
    assert main(["verify", "--output_dir", str(tmp_path)]) == 2
    assert "holds 1 trajectories and a line cut short, unfinished" in capsys.readouterr().err
    path.write_text(line)
    assert main(["verify", "--output_dir", str(tmp_path)]) == 0


def test_training_as_it_writes(tmp_path, capsys):
    """From problems to a model, and again from its last checkpoint."""
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--output_dir", str(tmp_path / "model")]
    command += ["--teacher_model_name_or_path", str(TINY / "teacher"), "--loss_type", "reverse_kl", "--use_cpu"]
    command += ["--max_new_tokens", "24", "--per_device_train_batch_size", "3", "--report_to", "none"]
    command += ["--save_steps", "1", "--logging_steps", "1", "--num_train_epochs", "1"]
    assert main(command) == 2
    assert "give either --train_file or --dataset_name" in capsys.readouterr().err
    command += ["--dataset_name", TASK, "--policy", "step_skd"]
    assert main(command) == 2
    assert "give --gamma" in capsys.readouterr().err
    command += ["--gamma", "0.5", "--save_total_limit", "2"]
    assert main(command) == 0
    model = tmp_path / "model"
    shutil.rmtree(model / "checkpoint-2")
    settings = json.loads((model / "motab_training.json").read_text())["settings"]
    (model / "motab_training.json").write_text(json.dumps({"settings": settings, "finished": False}))
    assert main([*command, "--rollout_temperature", "0.5"]) == 2
    assert "(rollout temperature: 0.6 there, 0.5 now)" in capsys.readouterr().err
    assert main([*command, "--gamma", "0.4"]) == 2
    assert "(policy gamma: 0.5 there, 0.4 now)" in capsys.readouterr().err
    assert main([*command, "--dataset_name", TASK.replace("seed=5", "seed=6")]) == 2
    assert "(prompts: " in capsys.readouterr().err
    assert main([*command, "--rollout_batch_size", "2", "--block_size", "4"]) == 0
    state = json.loads((tmp_path / "model" / "checkpoint-2" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert [(entry["step"], entry["trajectories"]) for entry in steps] == [(1, 3), (2, 3)]
    assert any(entry["teacher_share"] > 0 for entry in steps)


@pytest.fixture
def training(tmp_path):
    """A command that trains four steps on four trajectories, and its file of them."""
    tokens = AutoTokenizer.from_pretrained(TINY / "student").encode("1 + 2 = 3")
    path = tmp_path / "trajectories.jsonl"
    author = ["student"] * len(tokens)
    path.write_text(
        "".join(
            motab.Trajectory(i, tokens[:-i], tokens, author, "", [], None, None, "length").to_json() + "\n"
            for i in range(1, 5)
        )
    )
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--train_file", str(path), "--use_cpu"]
    command += ["--num_train_epochs", "1", "--per_device_train_batch_size", "1", "--report_to", "none"]
    return [*command, "--output_dir", str(tmp_path / "model")], path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
def test_low_rank_adapters(training, tmp_path, capsys):
    """They alone are trained and saved, and load with the model they adapt, in every command."""
    command, path = training
    command += ["--use_peft", "--lora_r", "4", "--lora_alpha", "16", "--learning_rate", "0.01", "--save_steps", "2"]
    assert main(command) == 0
    folder = tmp_path / "model"
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000
    assert not (folder / "model.safetensors").exists()
    tokens = torch.tensor([motab.read_trajectories(path)[0].token_ids])
    base, adapted = (load_model(str(name)) for name in (TINY / "student", folder))
    with torch.no_grad():
        losses = [model(tokens, labels=tokens).loss for model in (base, adapted)]
    assert losses[1] < losses[0]
    main([*command[:-2], "--lora_r", "8"])
    there = "lora: {'r': 4, 'alpha': 16, 'dropout': 0.05, 'target_modules': 'all-linear'} there"
    assert there in capsys.readouterr().err
    generate = ["--model_name_or_path", str(folder), "--dataset_name", TASK, "--max_new_tokens", "4"]
    assert main(["evaluate", *generate]) == 0
    assert main([*command, "--lora_target_modules", "nowhere", "--output_dir", str(tmp_path / "other")]) == 2
    assert "LoRA with r=4 on ['nowhere'] does not fit" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_seed_is_that_of_the_adapters_too(training, tmp_path):
    """Of two trainings by the same settings the weights are the same, whatever was drawn before."""
    weights = []
    for place, seed in enumerate(("7", "7", "8")):
        torch.manual_seed(place)
        folder = tmp_path / str(place)
        flags = ["--use_peft", "--lora_r", "4", "--save_strategy", "no", "--seed", seed, "--output_dir", str(folder)]
        assert main([*training[0], *flags, "--max_steps", "1"]) == 0
        weights.append((folder / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_on(training, tmp_path, capsys):
    """A second training begins where the first ended, whether the adapters go on or are merged; nothing is lost,
    overwritten or set otherwise."""
    command, path = training
    tokens = torch.tensor([motab.read_trajectories(path)[0].token_ids])

    def loss(folder):
        with torch.no_grad():
            return float(load_model(str(folder))(tokens, labels=tokens).loss)

    assert main([*command, "--use_peft", "--lora_r", "4", "--learning_rate", "0.01", "--save_strategy", "no"]) == 0
    first = tmp_path / "model"
    again = command.copy()
    again[again.index(str(TINY / "student"))] = str(first)
    assert abs(loss(first) - loss(TINY / "student")) > 0.1
    for name, flags in (("adapters", ["--use_peft"]), ("merged", [])):
        folder = tmp_path / name
        assert main([*again, *flags, "--learning_rate", "1e-9", "--output_dir", str(folder)]) == 0
        assert loss(folder) == pytest.approx(loss(first), rel=1e-4)
        assert (folder / "adapter_config.json").exists() == (name == "adapters")
        assert (folder / "model.safetensors").exists() == (name == "merged")
        settings = json.loads((folder / "motab_training.json").read_text())["settings"]
        assert settings.get("lora") == ("that of model_name_or_path" if flags else None)
        before = {path: path.read_bytes() for path in first.iterdir()}
        capsys.readouterr()
        assert main([*again, *flags]) == 2
        assert "output_dir must be another folder than those of the models" in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in first.iterdir()}
    assert main([*again, "--use_peft", "--lora_r", "16", "--output_dir", str(tmp_path / "other")]) == 2
    assert f"--lora_r set new adapters, got those of {str(first)!r}, which are trained" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has adapters already, which would be lost"):
        with_lora(load_model(str(first)), 4, 8, 0.0, "all-linear")


def test_settings_of_adapters_that_nobody_asked_for(training, capsys):
    assert main([*training[0], "--lora_r", "4", "--lora_dropout", "0"]) == 2
    assert "--lora_r, --lora_dropout set adapters, which --use_peft trains" in capsys.readouterr().err


def test_a_teacher_that_is_missing_is_named_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("motab.cli.load_tokenizer", None)
    command = ["train", "--model_name_or_path", "nowhere", "--dataset_name", TASK]
    for flags in ([], ["--policy", "on_policy", "--loss_type", "reverse_kl"]):
        assert main([*command, *flags]) == 2
        assert "give --teacher_model_name_or_path" in capsys.readouterr().err


def test_a_push_to_a_hub_that_is_not_reached(training, capsys, monkeypatch):
    """Is refused before anything is loaded: after a training it would be too late."""

    class ConnectError(Exception):  # as that of httpx, which is no OSError
        pass

    def whoami(api):
        raise ConnectError("no\nname")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    monkeypatch.setattr("motab.cli.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert main([*training[0], "--push_to_hub"]) == 2
    told = capsys.readouterr().err
    assert "--push_to_hub needs the hub and a user known to it, got no name; log in" in told


def test_a_folder_that_cannot_be_made(training, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*training[0][:-1], str(tmp_path / "file" / "model")]) == 2
    assert "motab train: [Errno 20] Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--only_correct"], "only_correct applies to finished trajectories, got Rollouts"),
        (["--max_length", "9"], "max_length applies to finished trajectories, got 9"),
        (["--policy", "teacher_only"], "Rollouts need a policy under which the student writes, got TeacherOnly"),
    ],
)
def test_what_rollouts_do_not_take(flags, named, capsys, monkeypatch):
    """Refused before a model is loaded."""
    monkeypatch.setattr("motab.cli.load_model", None)
    pair = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", str(TINY / "teacher")]
    assert main(["train", *pair, "--dataset_name", TASK, "--use_cpu", *flags]) == 2
    assert named in " ".join(capsys.readouterr().err.split())


def test_what_the_trainer_cannot_do_here(training, capsys):
    assert main([*training[0], "--report_to", "comet_ml"]) == 2
    assert "comet" in capsys.readouterr().err
    if find_spec("bitsandbytes") is None:
        assert main([*training[0], "--optim", "adamw_bnb_8bit"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("motab train: You need to install `bitsandbytes`")
        assert error.count("\n") == 1


def test_a_model_that_cannot_be_saved(training, tmp_path, capsys):
    """As on a full disk: safetensors raises an error of its own."""
    command, _ = training
    (tmp_path / "model" / "model.safetensors").mkdir(parents=True)
    assert main([*command, "--save_strategy", "no"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("motab train: Error while serializing: I/O error: ")


def test_a_training_that_is_finished(training, tmp_path, capsys, monkeypatch):
    command, _ = training
    assert main(command) == 0
    assert "model: the trained model" in " ".join(capsys.readouterr().out.split())
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(motab.MotabTrainer, "train", None)
    moved = tmp_path / "student"
    shutil.copytree(TINY / "student", moved)
    moved_command = [str(moved) if part == str(TINY / "student") else part for part in command]
    for again in (command, moved_command):
        assert main([*again, "--logging_steps", "1", "--save_steps", "2"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "model: already trained with these settings" in out
        assert "the trained model" not in out
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == content
    (moved / "model.safetensors").write_bytes(content)  # as in the next round of a loop
    assert main(moved_command) == 2
    assert "a training with other settings (student: other weights)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rate", "1e-3"], "learning_rate: 5e-05 there, 0.001 now"),
        (["--num_train_epochs", "2"], "num_train_epochs: 1.0 there, 2.0 now"),
        (["--max_steps", "9", "--seed", "7"], "max_steps: -1 there, 9 now, seed: 42 there, 7 now"),
        (["--gradient_accumulation_steps", "2"], "trajectories of a step: 1 there, 2 now"),
        (["--ignore_authors", "flawed"], "ignore_authors: [] there, ['flawed'] now"),
        (["--lr_scheduler_type", "linear"], "lr_scheduler_kwargs: {'min_lr': 1e-06} there, None now"),
        (["--dtype", "bfloat16"], "dtype: 'float32' there, 'bfloat16' now"),
        (
            ["--loss_type", "jsd", "--teacher_model_name_or_path", str(TINY / "teacher")],
            "loss_type: 'cross_entropy' there, 'jsd' now, teacher: None there, one now, teacher_dtype: not set",
        ),
        (["--model_name_or_path", str(TINY / "teacher")], "(student: other weights)"),
        ([], "content of train_file: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_training_with_other_settings(training, tmp_path, capsys, flags, named, finished):
    """In a folder with a checkpoint of the first."""
    command, path = training
    model = tmp_path / "model"
    (model / "checkpoint-1").mkdir(parents=True)
    (model / "checkpoint-1" / "trainer_state.json").touch()
    args, config = parse((TrainArguments, motab.MotabConfig), command[1:], "train")
    weights = {"student": hash_of_weights(load_model(args.model_name_or_path, args.dtype)), "teacher": None}
    record(model, decisive_settings(args, config, str(path), weights), finished=finished)
    if not flags:
        path.write_text(path.read_text() * 2)
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert f"{model} holds checkpoints of a training with other settings (" in error
    assert named in error
    assert "give another --output_dir, remove it to start again, or name the checkpoint to continue from" in error


def test_the_last_checkpoint_is_that_of_most_steps(tmp_path):
    """By number; other folders beside them are somebody else's."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").touch()
    (tmp_path / "checkpoint-10" / "rng_state.pth").touch()
    record(tmp_path, {"seed": 1}, finished=False)
    assert last_checkpoint(tmp_path, {"seed": 1}) == (str(tmp_path / "checkpoint-10"), False)


def test_what_decides_is_a_setting():
    """A name that is none, or no longer, would be passed over in silence."""
    assert [name for name in DECISIVE if name not in motab.MotabConfig.__dataclass_fields__] == []


def test_where_a_training_goes_on(training, tmp_path, capsys):
    """From its last whole checkpoint; from another with other settings when it is named; never from an unknown one."""
    command, _ = training
    command += ["--save_steps", "1", "--save_total_limit", "4", "--logging_steps", "1"]
    model, file = tmp_path / "model", tmp_path / "model" / "motab_training.json"
    assert main(command) == 0
    known = json.loads(file.read_text())
    assert known["finished"]
    content = (model / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "checkpoint-4/trainer_state.json", "checkpoint-3/trainer_state.json"):
        (model / name).unlink()  # as if it had been cut short while it saved
    file.write_text(json.dumps(known | {"finished": False}))
    assert last_checkpoint(model, known["settings"]) == (str(model / "checkpoint-2"), False)
    assert main(command) == 0
    assert (model / "model.safetensors").read_bytes() == content

    longer = [*command, "--num_train_epochs", "2", "--resume_from_checkpoint", str(model / "checkpoint-4")]
    assert main(longer) == 0
    assert json.loads((model / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    assert json.loads(file.read_text())["settings"]["num_train_epochs"] == 2
    file.unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert "other settings (unknown: there is no motab_training.json)" in capsys.readouterr().err


def test_a_checkpoint_of_the_model_alone(training, tmp_path, capsys):
    """From it optimizer and schedule would begin anew, and end elsewhere; a finished training needs none of them."""
    command, _ = training
    command += ["--save_steps", "1", "--save_total_limit", "4", "--save_only_model"]
    file = tmp_path / "model" / "motab_training.json"
    assert main(command) == 0
    assert main(command) == 0
    assert "already trained" in capsys.readouterr().out
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": False}))
    shutil.rmtree(tmp_path / "model" / "checkpoint-4")
    assert main(command) == 2
    assert "checkpoint-3 must hold the state of a training, got the model alone" in capsys.readouterr().err


def test_a_folder_is_trained_into_by_one_process_at_a_time(training, tmp_path, capsys):
    """Two would remove each other's checkpoints, and write into one file of rollouts."""
    command, _ = training
    lock = Lock(tmp_path / "model" / "motab_training.json")
    lock.place.write_text("1")  # the number of another process
    assert main(command) == 2
    assert "motab_training.json is being written by another process (1)" in capsys.readouterr().err
    lock.release()
    assert main(command) == 0
    assert not lock.place.exists()


def test_files_that_are_not_there(tmp_path, capsys):
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--output_dir", str(tmp_path / "model")]
    assert main([*command, "--train_file", "none.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "--train_file must name an existing file, got 'none.jsonl'; motab synthesize writes" in error
    file = tmp_path / "t.jsonl"
    file.touch()
    assert main([*command, "--train_file", str(file), "--eval_file", "no.jsonl"]) == 2
    assert "--eval_file must name an existing file, got 'no.jsonl'" in capsys.readouterr().err
    assert main([*command, "--config", "none.yaml"]) == 2
    assert "--config must name an existing file, got 'none.yaml'" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("stitch: [")
    assert main([*command, "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml must hold settings in YAML, got invalid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy", "motab"], "--policy"),
        (["--gamma", "0.5"], "--gamma"),
        (["--stitch", ""], "--stitch"),
        (["--dataset_split", "train"], "--dataset_split"),
        (["--rollout_temperature", "0"], "--rollout_temperature"),
        (["--max_new_tokens", "1024", "--top_p", "1"], "--max_new_tokens, --top_p"),
        (["--rollout_batch_size", "8", "--block_size", "16"], "--rollout_batch_size, --block_size"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_settings_of_writing_where_nothing_is_written(tmp_path, capsys, flags, named, in_file):
    """The defaults too: who gives one thinks that something is written."""
    if in_file:
        path = tmp_path / "config.yaml"
        pairs = zip(flags[::2], flags[1::2], strict=True)
        path.write_text("".join(f"{name[2:]}: {value!r}\n" for name, value in pairs))
        flags = ["--config", str(path)]
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--output_dir", str(tmp_path / "model")]
    assert main([*command, "--train_file", "none.jsonl", *flags]) == 2
    error = capsys.readouterr().err
    assert f"--train_file takes no settings of writing, got {named}" in error
    assert "leave them out, or give --dataset_name instead of --train_file" in error
