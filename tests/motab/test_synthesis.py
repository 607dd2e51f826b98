"""A run killed at any moment and started again ends with the same file."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

import motab

FOLDER = pathlib.Path(__file__).parent
SETTINGS = {"max_new_tokens": 30, "batch_size": 2, "block_size": 4, "temperature": 1.0, "seed": 3}
POLICY = motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,")

RUN = """
import sys
import conftest, test_synthesis as here
import motab
tokenizer = conftest.tokenizer.__wrapped__()
student = conftest.make_model(1).float()
teacher = conftest.teacher.__wrapped__(conftest.make_model(1)).float()
print("ready", flush=True)
for _ in motab.synthesize_to_file(sys.argv[1], student, teacher, tokenizer, here.PROMPTS, policy=here.POLICY,
                                  **here.SETTINGS):
    pass
"""
PROMPTS = [[1 + (7 * i + j) % 11 for j in range(1 + i % 6)] for i in range(90)]


def run(path, kill_at=None):
    """Run to the end, or kill the process as soon as the file holds so many bytes."""
    command = [sys.executable, "-c", RUN, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        if kill_at is not None:
            while not (path.exists() and path.stat().st_size >= kill_at) and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.wait() == (0 if kill_at is None else -signal.SIGKILL)


def test_killed_and_restarted(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(whole)
    run(killed, kill_at=random.uniform(0.01, 0.6) * whole.stat().st_size)
    assert killed.read_bytes() != whole.read_bytes()
    run(killed)
    assert killed.read_bytes() == whole.read_bytes()
    assert [t.index for t in motab.read_trajectories(whole)] == list(range(len(PROMPTS)))


def test_torn_line_and_other_settings(tmp_path, student, teacher, tokenizer, prompts):
    path = tmp_path / "out" / "trajectories.jsonl"

    def write(**changes):
        return list(
            motab.synthesize_to_file(
                path, student, teacher, tokenizer, prompts, policy=POLICY, **{**SETTINGS, **changes}
            )
        )

    first = write()
    content = path.read_bytes()
    assert motab.read_trajectories(path) == first
    assert write() == []
    path.write_bytes(content[: len(content) // 2])
    assert len(motab.read_trajectories(path)) < len(first)
    again = write()
    assert path.read_bytes() == content
    assert again == first[-len(again) :]
    with pytest.raises(ValueError, match=r"begun with other settings .seed: 3 there, 4 now.*another path"):
        write(seed=4)
    assert path.read_bytes() == content


def test_a_line_ends_at_a_newline_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    text = "\u2028 \x85 \r\n"  # at all of which str.splitlines splits, and JSON leaves the first two as they are
    found = [motab.Trajectory(i, [1], [2], ["student"], text, [], None, None, "eos") for i in range(2)]
    torn = found[0].to_json().encode()[: found[0].to_json().encode().index(b"\xe2") + 1]
    path.write_bytes("".join(t.to_json() + "\n" for t in found).encode() + torn)
    assert motab.read_trajectories(path) == found


def test_refused_input_leaves_no_file(tmp_path, student, teacher, tokenizer):
    path = tmp_path / "new" / "t.jsonl"
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        motab.synthesize_to_file(path, student, teacher, tokenizer, [[]], **SETTINGS)
    assert not path.parent.exists()
