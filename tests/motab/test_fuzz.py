"""Any policy with any settings, in any batch, block, plan and pages, writes what it writes for each prompt alone.

The seed is fresh each time; a failure names it.
"""

import random
from dataclasses import replace

import pytest
from conftest import WORDS

import motab
from motab.speculation import Plan, Speculation

DELIMITERS = [".\n\n", "\n\n", "\n", "a", "ab", ".\n\nb", "\n\n\n"]


def any_policy(draw):
    """Drawn with its settings."""
    delimiter = draw.choice(DELIMITERS)
    kinds = [
        lambda: motab.MotabPolicy(
            epsilon0=draw.choice([0.1, 0.3, 0.7, 2.0]),
            theta=draw.choice([0.0, 0.5]),
            entropy_top_k=draw.choice([None, 3]),
            backtrack=draw.choice(["td", "breach", "none"]),
            stitch=draw.choice([None, "ab,", "\nb"]),
            delimiter=delimiter,
            max_interventions=draw.randint(1, 4),
        ),
        lambda: motab.StepSKD(draw.choice([0.7, 1.0, 5.0]), delimiter),
        lambda: motab.TokenSKD(draw.randint(1, 3)),
        lambda: motab.AdaSwitch(draw.choice([0.5, 1.5]), draw.randint(1, 5)),
        lambda: motab.RelayOPD(
            words=draw.choice([("a", "c"), ("AB", "b", ".", ",")]),
            student_top_k=draw.randint(1, 2),
            paragraphs=draw.randint(1, 3),
            relay_tokens=draw.randint(1, 7),
            max_interventions=draw.randint(1, 4),
            delimiter=delimiter,
        ),
        lambda: motab.OnPolicy(delimiter),
        lambda: motab.Truncated(draw.randint(1, 20), delimiter),
        motab.TeacherOnly,
    ]
    return draw.choices(kinds, [4, 1, 1, 1, 1, 1, 1, 1])[0]()


def any_sampling(draw):
    return {
        "temperature": draw.choice([0.0, 0.6, 1.0, 1.0]),
        "top_k": draw.choice([None, None, 3, 50]),
        "top_p": draw.choice([1.0, 0.7]),
        "min_p": draw.choice([None, 0.1]),
        "seed": draw.randrange(2**64),
        "max_new_tokens": draw.choice([1, 3, 20, 30]),
    }


def assert_same(found, expected):
    """The statistics and the values of steps but for rounding."""
    assert replace(found, steps=[], statistics={}) == replace(expected, steps=[], statistics={})
    for a, b in zip(found.steps, expected.steps, strict=True):
        assert replace(a, value=0, threshold=0) == replace(b, value=0, threshold=0)
        assert (a.value, a.threshold) == pytest.approx((b.value, b.threshold), rel=1e-4, abs=1e-6)
    assert list(found.statistics) == list(expected.statistics)
    for name, column in found.statistics.items():
        for a, b in zip(column, expected.statistics[name], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx(b, rel=1e-5, abs=3e-6)


@pytest.mark.parametrize("case", range(40))
def test_anything(student, teacher, tokenizer, monkeypatch, case):
    seed = random.randrange(2**32)
    print(f"seed {seed} of case {case}")
    draw = random.Random(seed)
    policy, settings = any_policy(draw), any_sampling(draw)
    lengths = [draw.choice([1, 1, 2, 5, 12]) for _ in range(draw.choice([1, 3, 4]))]
    prompts = [[draw.randrange(len(WORDS)) for _ in range(length)] for length in lengths]
    prompts[1:] = [draw.choice([ids, prompts[0]]) for ids in prompts[1:]]  # some twice

    ends = draw.choice([[0], [0, 9], []])  # without any, all write as much as they may
    monkeypatch.setattr("motab.engine.end_tokens", lambda models, tokenizer: ends)

    def run(prompts, **pace):
        return list(motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **settings, **pace))

    def any_plan(speculation, *rows):
        may = None not in (speculation.student, speculation.teacher)
        return Plan(draw.randint(1, speculation.block_size), speculates=may and draw.random() < 0.6)

    monkeypatch.setattr(Speculation, "plan", lambda self, *rows: Plan(self.block_size, speculates=False))
    alone = [run([ids], indices=[index], batch_size=1, block_size=1)[0] for index, ids in enumerate(prompts)]
    monkeypatch.setattr(Speculation, "plan", any_plan)
    size, block = draw.choice([4, 16]), draw.choice([1, 3, 8, 33])
    monkeypatch.setattr("motab_kernels.page_table.PAGE_MULTIPLE", 1)  # of the kernels, which do not take float64
    monkeypatch.setattr("motab.memory.page_size", lambda max_length: size)
    monkeypatch.setattr("motab.writer.PREFILL", draw.choice([7, 4096]))
    longest = max(lengths) + settings["max_new_tokens"] + block
    room = draw.choice([None, size * (-(-longest // size) + draw.choice([0, 1, 9]))])
    together = run(prompts, batch_size=draw.choice([2, 4, 7]), block_size=block, max_cached_tokens=room)
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)
