"""Training, synthesis and evaluation in two processes, against one.

Two processes run what processes_cases says and write down what came out; then this one runs the same alone.
"""

import json

import pytest
import torch
from forks import RANKS, run_ranks
from processes_cases import PROMPTS, TRAININGS, fail_in_one, process_main, train_few, wait_for_one
from test_synthesis import assert_same

from motab.trajectory_file import read_trajectories

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ended(folder):
    """The exit codes, and what was written."""
    return run_ranks(folder, process_main, fail_in_one, wait_for_one)


@pytest.fixture(scope="module")
def ranks(folder, ended):
    """What each of two found."""
    codes, written = ended
    assert codes["process_main"] == [0] * RANKS, written
    return [torch.load(folder / f"2-{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(folder, ranks):
    """What one finds, that goes on with what two have begun."""
    process_main(0, 1, folder)
    return torch.load(folder / "1-0.pt", weights_only=False)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", TRAININGS)
def test_training(ranks, alone, kind, accumulation):
    for found in ranks:
        torch.testing.assert_close(found[kind, accumulation], alone[kind, accumulation], rtol=1e-5, atol=1e-6)


def test_a_training_that_is_resumed(ranks, alone):
    """Weights, and what is logged after the halt."""
    logged, weights = alone["heads", 2]
    for found in (*ranks, alone):
        again, same = found["resumed"]
        torch.testing.assert_close((again[-4:], same), (logged[-4:], weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*TRAININGS, "read once"])
def test_training_with_sharded_weights(ranks, alone, kind):
    """Both models', and from heads where that is possible, so that no full logits are held."""
    expected = alone["heads" if kind == "read once" else kind, 2]
    for found in ranks:
        torch.testing.assert_close(found["sharded"][kind], expected, rtol=1e-5, atol=1e-6)


def test_training_on_what_both_write(ranks, tmp_path):
    """Each writes on its own prompts; the step is one on all that was written."""
    (first, weights), (second, same) = (found["afresh"] for found in ranks)
    assert sorted(t.prompt_ids for t in first + second) == sorted(PROMPTS)
    assert len({t.index for t in first + second}) == len(PROMPTS)
    torch.testing.assert_close(weights, same, rtol=0, atol=0)
    _, expected = train_few(tmp_path, first + second)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_is_that_of_one_process(ranks, alone, folder):
    """The same rows are written, with the same random numbers, and none that is repeated is trained on, in two epochs
    of a step of three micro-batches."""
    written, weights = alone["mixture"]
    expected = {t.index: t.token_ids for t in written if t is not None}
    assert 0 < len(expected) < len(written) == 2 * 11
    together = [each for found in ranks for each in found["mixture"][0]]
    texts = {t.index: t.token_ids for t in together if t is not None}
    assert len(together) == 2 * 12
    assert {index: texts.get(index) for index in expected} == expected
    for found in ranks:
        torch.testing.assert_close(found["mixture"][1], weights, rtol=1e-5, atol=1e-6)
    for count, (kept, _) in ((1, alone["mixture"]), (2, ranks[0]["mixture"])):  # the main process's
        file = folder / f"mixture by {count}" / "rollouts" / "trajectories.jsonl"
        assert read_trajectories(file) == [t for t in kept if t is not None]


def test_training_with_sharded_weights_on_what_both_write(ranks):
    """The second step's trajectories are those of the student after the first."""
    for found in ranks:
        written, weights = found["sharded"]["rollouts"]
        expected, same = found["afresh, twice"]
        assert [t.token_ids for t in written] == [t.token_ids for t in expected]
        torch.testing.assert_close(weights, same, rtol=1e-5, atol=1e-6)


def test_a_file_is_that_of_one_process(ranks, alone, folder):
    assert sorted(alone["whole"]) == list(range(90))
    assert [sorted(found["whole"]) for found in ranks] == [[*range(0, 90, 2)], [*range(1, 90, 2)]]
    assert_same(*(read_trajectories(folder / name / "t.jsonl") for name in ("by 2", "by 1")))
    assert {path.name for path in (folder / "by 2").iterdir()} == {"t.jsonl", "t.jsonl.settings.json"}


def test_interrupted_and_gone_on_with_by_another_number(ranks, alone, folder):
    """By two and then by one, by one and then by two, by two and again by two."""
    expected = read_trajectories(folder / "by 1" / "t.jsonl")
    for name in ("cut", "begun", "cut for two"):
        assert_same(read_trajectories(folder / name / "t.jsonl"), expected)
        assert {path.name for path in (folder / name).iterdir()} == {"t.jsonl", "t.jsonl.settings.json"}
    # One process had written 40 and the other 20, and nothing that was whole is written again.
    before = [found["cut"] for found in ranks]
    assert [(len(indices), {index % 2 for index in indices}) for indices in before] == [(40, {0}), (20, {1})]
    missing = [index for index in range(90) if index not in before[0] + before[1]]
    assert sorted(alone["cut"]) == missing
    assert [sorted(found["cut for two"]) for found in ranks] == [missing[::2], missing[1::2]]
    content = (folder / "by 2" / "t.jsonl").read_bytes()
    lines = content[: len(content) // 2].count(b"\n")
    assert sorted(ranks[0]["begun"] + ranks[1]["begun"]) == [*range(lines, 90)]


def test_a_teacher_that_all_share(ranks, folder):
    """What one process writes, but for the rounding of sums over parts; interrupted and gone on with too."""
    alone, together = (read_trajectories(folder / name / "t.jsonl") for name in ("by 1", "together"))
    assert_same(together, alone)
    settings = [(folder / name / "t.jsonl.settings.json").read_text() for name in ("by 1", "together")]
    assert settings[0] == settings[1]  # so that either can go on with the other's file
    assert [sorted(found["together"]) for found in ranks] == [list(range(90)), []]
    assert [sorted(found["together again"]) for found in ranks] == [list(range(20, 64)), []]
    assert_same(read_trajectories(folder / "together again" / "t.jsonl"), together)
    assert not (folder / "together again" / "t.jsonl.parts").exists()


def test_bad_input_is_refused_in_every_process(ranks, alone, folder):
    for found in (*ranks, alone):
        assert "was begun with other settings (seed: 3 there, 4 now)" in found["other settings"]
        assert found["bad prompt"].startswith("prompt 0 is empty")
    assert not (folder / "bad").exists()


def test_fewer_prompts_than_processes(ranks):
    assert [found["few"] for found in ranks] == [[0], []]


def test_no_process_waits_for_one_that_failed(ended, folder):
    codes, written = ended
    assert codes["fail_in_one"] == [1, 1]
    assert "out of memory" in written
    assert "Connection closed by peer" in written
    # The first has kept what it wrote, up to where it failed, and nothing of the other's is lost.
    kept, others = (
        [t.index for t in read_trajectories(folder / "failed" / name)] for name in ("t.jsonl", "t.jsonl.parts/1.jsonl")
    )
    assert kept[-1] == 40
    assert set(range(0, 30, 2)) < set(kept) < set(range(0, 90, 2))
    assert sorted(others) == [*range(1, 90, 2)]


def test_a_process_waits_for_one_that_writes_for_long(ended, folder):
    codes, written = ended
    assert codes["wait_for_one"] == [0, 0], written
    first, second = (torch.load(folder / "slow" / f"{rank}.pt", weights_only=False) for rank in range(RANKS))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_evaluation(ranks, alone, folder):
    for found in ranks:
        assert found["evaluation"] == alone["evaluation"]
    for size in (3, 1):
        content = (folder / f"answers by 1 in 0.{size}").read_bytes()
        assert content.count(b"\n") == 2 * size
        assert (folder / f"answers by 2 in 0.{size}").read_bytes() == content
        assert not (folder / f"answers by 2 in 1.{size}").exists()


def test_commands_print_and_save_once(ranks, folder):
    first, second = (found["printed"] for found in ranks)
    assert [line for line in second.splitlines() if "seed: 42 there, 5 now" not in line] == []
    for line in ("12 trajectories", "the trained model", "already trained", "seed: 42 there, 5 now", "accuracy"):
        assert first.count(line) == 1
    assert not (folder / "model-1" / "motab_training.json").exists()
    assert (folder / "model-0" / "model.safetensors").exists()
    assert not list(folder.glob("model-1/**/*.safetensors"))
    assert json.loads((folder / "figures-0.json").read_text())["num_problems"] == 6
    assert not (folder / "figures-1.json").exists()
