"""Reading the file of a synthesis: what a damaged line says of itself."""

import json
import pathlib
import tracemalloc
from dataclasses import replace

import pytest

import motab
from motab.cli import main
from motab.dataset import TrajectoryDataset
from motab.models import load_tokenizer
from motab.trajectory import STATISTICS
from motab.trajectory_file import check_trajectories, settings_file, trajectories_in

TINY = pathlib.Path(__file__).parents[2] / "examples" / "tiny"
WHOLE = motab.Trajectory(0, [1], [2, 3], ["student"] * 2, "a", [motab.Step(0, 2, 0.5, 0.1, True)], None, None, "eos")


def changed(**changes):
    """The line with other values; ... takes the key away."""
    record = {**json.loads(WHOLE.to_json()), **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...})


DAMAGED = [
    (WHOLE.to_json()[:40], r"got invalid JSON \(Expecting value at character 41\)"),
    (WHOLE.to_json()[:20] + WHOLE.to_json(), "got invalid JSON"),
    ("5", "got int in place of a trajectory"),
    (changed(index="0"), "got index '0'"),
    (changed(index=...), "got a trajectory without index"),
    (changed(author=..., text=...), "got a trajectory without author, text"),
    (changed(colour=1), "got a trajectory with unknown colour"),
    (changed(token_ids=7), "got token_ids without a list"),
    (changed(prompt_ids="1", author="s"), "got prompt_ids, author without a list"),
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
        assert "rerun the motab synthesize that wrote the file" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_dataset_is_no_file_of_trajectories(tmp_path):
    path = tmp_path / "limo.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"unknown question, answer; .*; of a dataset with solutions motab import"):
        motab.read_trajectories(path)


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


def test_a_finished_file_is_in_order(tmp_path):
    """A synthesis has a trajectory for each prompt; a step of training may have gaps between those of its process."""
    path = tmp_path / "trajectories.jsonl"

    def write(*indices):
        path.write_text("".join(replace(WHOLE, index=index).to_json() + "\n" for index in indices))

    write(3, 5)
    assert check_trajectories(path) == 2
    for repeated in ([3, 5, 4], [3, 4, 4]):
        write(*repeated)
        with pytest.raises(ValueError, match="trajectory 2 has index 4"):
            check_trajectories(path)
    settings_file(path).write_text('{"prompts": 3}')
    write(0, 2, 1)
    with pytest.raises(ValueError, match="trajectory 1 has index 2"):
        check_trajectories(path)


def test_statistics_may_be_left_out(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(changed(statistics=...) + "\n")
    assert motab.read_trajectories(path) == [WHOLE]


def scored(index, length, text="a"):
    """A trajectory of steps of ten tokens with statistics."""
    steps = [motab.Step(start, start + 10, 0.5, 0.1, True) for start in range(0, length, 10)]
    numbers = [(13 * i % 997) / 1e6 for i in range(length)]
    return motab.Trajectory(
        *(index, [1], [5 + i % 90 for i in range(length)], ["student"] * length, text, steps, None, None, "eos"),
        statistics={name: numbers for name in STATISTICS},
        score="teacher_value",
    )


@pytest.mark.parametrize("text", ["a", 'x,"statistics":{"forward_kl":[1]},"y', "} \\", ""])
def test_reading_without_statistics(tmp_path, text):
    path = tmp_path / "trajectories.jsonl"
    written = [scored(0, 20, text), replace(WHOLE, index=1, text=text), scored(2, 10, text)]
    old = json.dumps(json.loads(written[2].to_json()))  # another writer's spaces: read whole
    path.write_text("".join(line + "\n" for line in (written[0].to_json(), written[1].to_json(), old)))
    assert motab.read_trajectories(path) == written
    without = [replace(t, statistics={}) for t in written]
    assert list(trajectories_in(path, statistics=False)) == without
    assert list(trajectories_in(path, statistics=False, first=1, end=2)) == without[1:2]


@pytest.mark.parametrize("command", ["verify", "report", "show"])
def test_a_file_is_never_whole_in_memory(tmp_path, command):
    """Of 40 trajectories, each of 3000 tokens."""
    load_tokenizer(str(TINY / "student")).save_pretrained(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(scored(index, 3000).to_json() + "\n" for index in range(40)))
    main([command, "--output_dir", str(tmp_path)])  # what is imported and cached
    tracemalloc.start()
    try:
        assert main([command, "--output_dir", str(tmp_path)]) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    shown = 6 if command == "report" else 1
    assert peak < (shown + 3) * 500 * 3000 + 3e6  # a trajectory with statistics takes 400 bytes a token
