"""The settings of `synthesize` that are no matter of the engine."""

import pytest

import motab


def run(student, teacher, tokenizer, prompts, **settings):
    settings = {"max_new_tokens": 40, "temperature": 1.0, **settings}
    return [t.token_ids for t in motab.synthesize(student, teacher, tokenizer, prompts, **settings)]


def test_another_seed_writes_other_texts(student, teacher, tokenizer, prompts):
    one, again, other = (run(student, teacher, tokenizer, prompts, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert sum(a == b for a, b in zip(one, other, strict=True)) < len(prompts) / 2


@pytest.mark.parametrize("indices", [[0], [1, 0], [3, 3], [0, 1, 2]])
def test_places_that_are_not_those_of_the_prompts(student, teacher, tokenizer, indices):
    with pytest.raises(ValueError, match="indices must be 2 ascending places, one for each prompt, got"):
        run(student, teacher, tokenizer, [[1], [2]], indices=indices)
