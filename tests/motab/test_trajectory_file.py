"""Reading the file of a synthesis: what a damaged line says of itself."""

import json

import pytest

import motab
from motab.cli import main
from motab.dataset import TrajectoryDataset

WHOLE = motab.Trajectory(0, [1], [2, 3], ["student"] * 2, "a", [motab.Step(0, 2, 0.5, 0.1, True)], None, None, "eos")


def changed(**changes):
    """The line with other values; ... takes the key away."""
    record = {**json.loads(WHOLE.to_json()), **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...})


DAMAGED = [
    (WHOLE.to_json()[:40], r"got invalid JSON \(Invalid control character at character 40\)"),
    (WHOLE.to_json()[:20] + WHOLE.to_json(), "got invalid JSON"),
    ("5", "got int in place of a trajectory"),
    (changed(index="0"), "got index '0'"),
    (changed(index=...), "got a trajectory without index"),
    (changed(author=..., text=...), "got a trajectory without author, text"),
    (changed(colour=1), "got a trajectory with unknown colour"),
    (changed(token_ids=7), "got token_ids without a list"),
    (changed(steps="x"), "got steps without a list"),
    (changed(steps=[3]), "got int in place of a step"),
    (changed(steps=[{"start": 0, "end": 2, "value": 1, "accepted": True}]), "got a step without threshold"),
    (changed(steps=[{**json.loads(WHOLE.to_json())["steps"][0], "a": 1}]), "got a step with unknown a"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGED)
def test_a_damaged_line(tmp_path, line, message):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(WHOLE.to_json() + "\n" + line + "\n")
    for read in (motab.read_trajectories, TrajectoryDataset):
        with pytest.raises(ValueError, match=f"line 2 of {path} must hold one whole trajectory, {message}") as error:
            read(path)
        assert "run the motab synthesize that wrote the file again" in str(error.value)
        assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(WHOLE.to_json().encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"line 2 of .* got 'utf-8' codec can't decode byte 0xff"):
        motab.read_trajectories(path)


@pytest.mark.parametrize("command", ["verify", "show", "report"])
def test_the_commands_name_it(tmp_path, capsys, command):
    (tmp_path / "trajectories.jsonl").write_text(WHOLE.to_json()[:40] + "\n")
    assert main([command, "--output_dir", str(tmp_path)]) == 2
    assert f"motab {command}: line 1 of {tmp_path / 'trajectories.jsonl'} must hold" in capsys.readouterr().err


def test_statistics_may_be_left_out(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(changed(statistics=...) + "\n")
    assert motab.read_trajectories(path) == [WHOLE]
