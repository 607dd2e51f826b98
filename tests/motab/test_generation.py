"""The settings of `synthesize` that are no matter of the engine."""

import numpy as np
import pytest

import motab


def run(student, teacher, tokenizer, prompts, **settings):
    settings = {"max_new_tokens": 40, "temperature": 1.0, **settings}
    return [t.token_ids for t in motab.synthesize(student, teacher, tokenizer, prompts, **settings)]


def test_another_seed_writes_other_texts(student, teacher, tokenizer, prompts):
    one, again, other = (run(student, teacher, tokenizer, prompts, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert sum(a == b for a, b in zip(one, other, strict=True)) < len(prompts) / 2


@pytest.mark.parametrize("indices", [[0], [1, 0], [3, 3], [0, 1, 2], [0, 1.5], [False, True], [-1, 0], ["a", "b"]])
def test_places_that_are_not_those_of_the_prompts(student, teacher, tokenizer, indices):
    with pytest.raises(ValueError, match="indices must be 2 ascending places, one for each prompt, got"):
        run(student, teacher, tokenizer, [[1], [2]], indices=indices)


@pytest.mark.parametrize("seed", [1.5, None, "1", True])
def test_a_seed_that_is_none(tmp_path, student, teacher, tokenizer, seed):
    """Refused before there is a file."""
    with pytest.raises(ValueError, match=f"seed must be an integer, got {seed!r}"):
        motab.synthesize_to_file(tmp_path / "t.jsonl", student, teacher, tokenizer, [[1]], seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy(tmp_path, student, teacher, tokenizer, prompts):
    def write(count, number, name):
        policy = motab.AdaSwitch(number(1.5), window=count(4))
        settings = {"max_new_tokens": count(20), "batch_size": count(3), "block_size": count(4), "top_k": count(5)}
        settings |= {"seed": count(-7), "temperature": number(0.5), "policy": policy}
        indices = [count(place) for place in range(2, 2 + len(prompts))]
        direct = motab.synthesize(student, teacher, tokenizer, prompts, indices=indices, **settings)
        found = list(motab.synthesize_to_file(tmp_path / name, student, teacher, tokenizer, prompts, **settings))
        return [t.to_json() for t in (*direct, *found)]

    assert write(np.int64, np.float32, "t") == write(int, float, "u")
    assert write(int, float, "t")[len(prompts) :] == []  # the same settings
