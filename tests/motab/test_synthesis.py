"""A run killed at any moment and started again ends with the same trajectories."""

import copy
import fcntl
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import motab
from motab.lock import Lock

FOLDER = pathlib.Path(__file__).parent
SETTINGS = {"max_new_tokens": 30, "batch_size": 2, "block_size": 4, "temperature": 1.0, "seed": 3}
POLICY = motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,")

PROMPTS = [[1 + (7 * i + j) % 11 for j in range(1 + i % 6)] for i in range(90)]


def write(path, pair, tokenizer):
    for _ in motab.synthesize_to_file(path, *pair, tokenizer, PROMPTS, policy=POLICY, **SETTINGS):
        pass


WRITE = """
import pathlib, sys
import conftest, test_synthesis as here
pair = conftest.make_model(1).float(), conftest.teacher.__wrapped__(conftest.make_model(1)).float()
here.write(pathlib.Path(sys.argv[1]), pair, conftest.tokenizer.__wrapped__())
"""


def write_and_be_killed(path, size):
    """In another process, as soon as the file holds so many bytes."""
    places = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], cwd=FOLDER, env=environment) as process:
        while not (path.exists() and path.stat().st_size >= size) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def in_order(trajectories):
    """By index: they come as they are finished."""
    return sorted(trajectories, key=lambda t: t.index)


def assert_same(found, expected):
    """But for what rounding does to statistics in another batch."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.index, ours.prompt_ids, ours.token_ids) == (theirs.index, theirs.prompt_ids, theirs.token_ids)
        assert (ours.author, ours.breach_step, ours.rollback_step) == (
            theirs.author,
            theirs.breach_step,
            theirs.rollback_step,
        )
        values = [[step.value for step in t.steps] for t in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)


def test_killed_and_restarted(tmp_path, student, teacher, tokenizer):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    pair = [copy.deepcopy(model).float() for model in (student, teacher)]
    write(whole, pair, tokenizer)
    write_and_be_killed(killed, random.uniform(0.01, 0.6) * whole.stat().st_size)
    kept = killed.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 0 < len(kept) < whole.stat().st_size
    write(killed, pair, tokenizer)
    assert set(kept.splitlines()) <= set(killed.read_bytes().splitlines())
    expected = motab.read_trajectories(whole)
    assert [t.index for t in expected] == list(range(len(PROMPTS)))
    assert_same(motab.read_trajectories(killed), expected)


def test_one_that_takes_long_holds_back_no_other(tmp_path, student, teacher, tokenizer, prompts):
    """In the file, whose order is that of the prompts in the end; `synthesize` yields in order unless told."""
    pair, settings = (student, teacher, tokenizer), {**SETTINGS, "temperature": 0.0, "batch_size": 3, "policy": POLICY}
    length = {tuple(t.prompt_ids): len(t.token_ids) for t in motab.synthesize(*pair, prompts, **settings)}
    prompts = sorted(prompts, key=lambda ids: -length[tuple(ids)])  # the longest text first
    expected = list(motab.synthesize(*pair, prompts, **settings))
    assert [t.index for t in expected] == list(range(len(prompts)))
    as_finished = list(motab.synthesize(*pair, prompts, in_order=False, **settings))
    assert_same(in_order(as_finished), expected)
    assert as_finished[0].index > 0
    path = tmp_path / "t.jsonl"
    written = motab.synthesize_to_file(path, *pair, prompts, **settings)
    first = next(written)
    assert first.index == as_finished[0].index
    assert motab.read_trajectories(path) == [first]
    assert len(list(written)) == len(prompts) - 1
    assert_same(motab.read_trajectories(path), expected)
    with pytest.raises(ValueError, match="takes no in_order"):
        motab.synthesize_to_file(path, *pair, prompts, **settings, in_order=True)


def test_lines_of_several_processes_are_brought_in_order(tmp_path, student, teacher, tokenizer):
    """What three left that were killed: lines of the file and of parts, of which one is torn and one there twice."""
    prompts, path = PROMPTS[:12], tmp_path / "t.jsonl"

    def write():
        found = motab.synthesize_to_file(path, student, teacher, tokenizer, prompts, policy=POLICY, **SETTINGS)
        return in_order(found)

    expected = write()
    lines = path.read_bytes().splitlines(keepends=True)
    parts = tmp_path / "t.jsonl.parts"
    parts.mkdir()
    path.write_bytes(lines[0] + lines[3] + lines[9])
    (parts / "1.jsonl").write_bytes(lines[4] + lines[1] + lines[7][:-9])
    (parts / "2.jsonl").write_bytes(lines[9] + lines[11])
    assert [t.index for t in write()] == [2, 5, 6, 7, 8, 10]
    assert not parts.exists()
    found = path.read_bytes().splitlines(keepends=True)
    assert [found[i] for i in (0, 1, 3, 4, 9, 11)] == [lines[i] for i in (0, 1, 3, 4, 9, 11)]
    assert_same(motab.read_trajectories(path), expected)
    path.unlink()
    parts.mkdir()
    (parts / "1.jsonl").write_bytes(lines[4])  # of a file that was removed to start anew
    assert len(write()) == len(prompts)


def test_torn_line_and_other_settings(tmp_path, student, teacher, tokenizer, prompts):
    path = tmp_path / "out" / "trajectories.jsonl"

    def write(prompts=prompts, teacher=teacher, **changes):
        settings = {**SETTINGS, **changes}
        return in_order(motab.synthesize_to_file(path, student, teacher, tokenizer, prompts, policy=POLICY, **settings))

    first = write()
    content = path.read_bytes()
    assert motab.read_trajectories(path) == first
    assert write() == []
    recorded = json.loads(path.with_name("trajectories.jsonl.settings.json").read_text())
    assert not {"batch_size", "block_size", "torch_compile", "max_cached_tokens"} & set(recorded)  # which may change
    path.write_bytes(content[: len(content) // 2])
    assert len(motab.read_trajectories(path)) < len(first)
    again = write(batch_size=5, block_size=3)  # which change no trajectory
    assert_same(again, first[-len(again) :])
    assert_same(motab.read_trajectories(path), first)
    content = path.read_bytes()
    assert write(top_k=None, top_p=1.0, min_p=None) == []  # the defaults, which were not given before
    with pytest.raises(ValueError, match=r"begun with other settings .seed: 3 there, 4 now.*another path"):
        write(seed=4)
    with pytest.raises(ValueError, match=r"begun with other settings .top_p: 1.0 there, 0.9 now"):
        write(top_p=0.9)
    with pytest.raises(ValueError, match=r"prompts' hash: '\w+' there, '\w+' now"):
        write(prompts=[*prompts[:-1], [5, 5]])
    with pytest.raises(ValueError, match=r"teacher dtype: 'torch\.float64' there, 'torch\.float32' now"):
        write(teacher=copy.deepcopy(teacher).float())
    assert path.read_bytes() == content


def test_damaged_lines_are_written_again(tmp_path, student, teacher, tokenizer, prompts):
    """Cut in the middle, their beginning and their newline there; and of another version."""
    path = tmp_path / "t.jsonl"

    def write():
        found = motab.synthesize_to_file(path, student, teacher, tokenizer, prompts, policy=POLICY, **SETTINGS)
        return in_order(found)

    first = write()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][: len(lines[2]) // 2] + b"\n"
    lines[5] = lines[5].replace(b'"author"', b'"writer"')
    path.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=r"2 line\(s\) hold no whole trajectory, the first is line 3 of .*t.jsonl"):
        again = write()
    assert [t.index for t in again] == [2, 5]
    assert_same(motab.read_trajectories(path), first)


def test_prompts_behind_the_others(tmp_path, student, teacher, tokenizer, prompts):
    """Of a file that is whole or not: the same as if all had been there from the beginning."""

    def write(name, prompts):
        path = tmp_path / name
        found = motab.synthesize_to_file(path, student, teacher, tokenizer, prompts, policy=POLICY, **SETTINGS)
        return in_order(found)

    expected = write("at once", prompts)
    settings = (tmp_path / "at once.settings.json").read_text()
    path = tmp_path / "grown"
    write("grown", prompts[:5])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    assert [t.index for t in write("grown", prompts[:8])] == [3, 4, 5, 6, 7]
    assert [t.index for t in write("grown", prompts)] == [*range(8, len(prompts))]
    assert_same(motab.read_trajectories(path), expected)
    assert path.read_bytes().startswith(b"".join(lines[:3]))
    assert path.with_name("grown.settings.json").read_text() == settings
    for others in (prompts[:8], [[5, 5], *prompts[1:], [1]]):
        with pytest.raises(ValueError, match=r"begun with other settings .prompts: 12 there, \d+ now"):
            write("grown", others)
    assert path.with_name("grown.settings.json").read_text() == settings


@pytest.mark.parametrize("begin_with", [False, True])
def test_a_student_that_only_drafts_comes_and_goes(tmp_path, student, teacher, tokenizer, prompts, begin_with):
    """Beside a teacher that writes everything it is no setting of the file."""
    path, own = tmp_path / "t", copy.deepcopy(student)

    def write(with_student, policy, count=6):
        arguments = (path, own if with_student else None, teacher, tokenizer, prompts[:count])
        return in_order(motab.synthesize_to_file(*arguments, policy=policy, **SETTINGS))

    first = write(begin_with, motab.TeacherOnly())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    assert [t.index for t in write(not begin_with, motab.TeacherOnly())] == [3, 4, 5]
    assert_same(motab.read_trajectories(path), first)
    path.unlink()
    write(True, POLICY)
    own.get_output_embeddings().weight.data.mul_(2)
    with pytest.raises(ValueError, match="student: other weights"):
        write(True, POLICY)


def test_either_top_k_is_one_setting_of_a_file(tmp_path, student, teacher, tokenizer, prompts):
    """That of TokenSKD and that of sampling."""

    def write(policy, **settings):
        settings = {**SETTINGS, **settings}
        list(motab.synthesize_to_file(tmp_path / "t", student, teacher, tokenizer, prompts, policy=policy, **settings))

    write(motab.TokenSKD(2), top_k=5)
    with pytest.raises(ValueError, match=r"begun with other settings .policy top_k: 2 there, 3 now"):
        write(motab.TokenSKD(3), top_k=5)
    with pytest.raises(ValueError, match=r"begun with other settings .top_k: 5 there, 4 now"):
        write(motab.TokenSKD(2), top_k=4)


def test_models_are_told_by_their_weights(tmp_path, student, teacher, tokenizer, prompts):
    """Whatever they are called: one that was trained on is another, one read from another place is the same."""
    path = tmp_path / "t"

    def write(student, teacher):
        return list(motab.synthesize_to_file(path, student, teacher, tokenizer, prompts, policy=POLICY, **SETTINGS))

    write(student, teacher)
    moved, trained = copy.deepcopy(student), copy.deepcopy(teacher)
    moved.name_or_path = "elsewhere"
    assert write(moved, teacher) == []
    trained.model.layers[1].mlp.up_proj.weight.data *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"begun with other settings \(teacher: other weights\); give another path"):
        write(student, trained)
    with pytest.raises(ValueError, match=r"\(student: other weights\)"):
        write(trained, teacher)
    with pytest.raises(ValueError, match="teacher: one there, None now"):
        motab.synthesize_to_file(path, student, None, tokenizer, prompts, policy=motab.OnPolicy(), **SETTINGS)


def test_a_line_ends_at_a_newline_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    text = "\u2028 \x85 \r\n"  # at all of which str.splitlines splits, and JSON leaves the first two as they are
    found = [motab.Trajectory(i, [1], [2], ["student"], text, [], None, None, "eos") for i in range(2)]
    torn = found[0].to_json().encode()[: found[0].to_json().encode().index(b"\xe2") + 1]
    path.write_bytes("".join(t.to_json() + "\n" for t in found).encode() + torn)
    assert motab.read_trajectories(path) == found


def test_a_grade_is_kept_as_true_or_false(tmp_path, student, teacher, tokenizer, prompts):
    """Whatever a verifier returns: numpy's are not JSON. Of what is written now, and of what was there."""
    path = tmp_path / "t.jsonl"
    for count in (2, 4):
        arguments = (path, student, teacher, tokenizer, prompts[:count])
        grade = None if count == 2 else lambda trajectory, place: np.float32(place % 2)
        list(motab.synthesize_to_file(*arguments, policy=POLICY, grade=grade, **SETTINGS))
    assert [t.correct for t in motab.read_trajectories(path)] == [False, True] * 2


def test_refused_input_leaves_no_file(tmp_path, student, teacher, tokenizer):
    path = tmp_path / "new" / "t.jsonl"
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        motab.synthesize_to_file(path, student, teacher, tokenizer, [[]], **SETTINGS)
    assert not path.parent.exists()


def test_a_setting_that_was_not_recorded(tmp_path, student, teacher, tokenizer, prompts):
    """As in a file that an earlier version began."""
    path = tmp_path / "t"
    list(motab.synthesize_to_file(path, student, teacher, tokenizer, prompts[:2], policy=POLICY, **SETTINGS))
    settings = path.with_name("t.settings.json")
    recorded = json.loads(settings.read_text())
    del recorded["temperature"]
    settings.write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=r"begun with other settings .temperature: not set there, 1.0 now"):
        motab.synthesize_to_file(path, student, teacher, tokenizer, prompts[:2], policy=POLICY, **SETTINGS)


def hold(path, connection):
    """Until told to end."""
    lock = Lock(path)
    connection.send("held")
    connection.recv()
    lock.release()


@pytest.mark.filterwarnings("ignore:This process")  # Python 3.12, of a fork
def test_a_file_is_written_by_one_process_at_a_time(tmp_path, student, teacher, tokenizer):
    """The second would rename a file into the place of that to which the first appends."""
    path = tmp_path / "t.jsonl"
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    other = fork.Process(target=hold, args=(path, theirs))
    other.start()
    assert ours.recv() == "held"

    def write():
        return motab.synthesize_to_file(path, student, teacher, tokenizer, [[1], [2]], max_new_tokens=4)

    with pytest.raises(ValueError, match=rf"is being written by another process \({other.pid}\)"):
        write()
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl.lock"]
    ours.send("end")
    other.join()
    unfinished = write()
    next(unfinished)
    assert len(list(write())) == 1  # this process's own lock does not stop it
    unfinished.close()
    assert {file.name for file in tmp_path.iterdir()} == {"t.jsonl", "t.jsonl.settings.json"}


def test_a_lock_whose_file_its_last_holder_removes_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it: another process would lock a new file of that name."""
    path, flock, calls = tmp_path / "t.jsonl", fcntl.flock, []

    def late(file, kind):
        calls.append(file)
        if len(calls) == 1:
            path.with_name("t.jsonl.lock").unlink()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = Lock(path)
    assert len(calls) == 2
    assert path.with_name("t.jsonl.lock").read_text() == str(os.getpid())
    lock.release()
