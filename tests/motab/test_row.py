"""The target that is made of what was written."""

import copy
from dataclasses import replace

import pytest

import motab
from motab.row import Row
from motab.trajectory import STATISTICS

POLICY = motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,")


@pytest.fixture
def thinking_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>", "<x>"])
    return tokenizer


def test_the_flawed_part_closes_no_tag(thinking_tokenizer):
    """The teacher closes it again; what is left of the steps is where the target says."""
    tokenizer = thinking_tokenizer
    opening, closing = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    row = Row(0, [1], 0, POLICY.rules, 30, [0])
    written = [opening, 7, 4, 8, closing, 4, 9, 4, 10, 0]  # 4 ends a step
    ends = [i + 1 for i, token in enumerate(written) if token in (0, 4)]
    block = [[token, i + 1 in ends, i == 9, 0.5, 0.4, *[0.0] * len(STATISTICS)] for i, token in enumerate(written)]
    assert row.judge(block)
    row.take_over(3, tokenizer)
    row.write(closing, [None] * len(STATISTICS))
    t = row.trajectory(tokenizer)
    assert t.token_ids[:8] == [opening, 7, 4, 8, 4, 9, 4, 10]
    assert t.token_ids[-1] == closing
    assert t.author == ["student"] * 3 + ["flawed"] * 5 + ["stitch"] * (len(t.token_ids) - 9) + ["teacher"]
    assert [(s.start, s.end) for s in t.steps] == [(0, 3), (3, 5), (5, 7), (7, 8)]


def strayed(tokenizer, written, rules):
    """A row whose student strays with its last token, to the start of the turn; statistics count on from 0.0."""
    row = Row(0, [1], 0, rules, 60, [0])
    count = len(written)
    block = [[token, i + 1 == count, i + 1 == count, 0.5, 0.6, *[float(i)] * 7] for i, token in enumerate(written)]
    assert row.judge(block)
    row.take_over(0, tokenizer)
    return row


def test_a_stitched_target_opens_its_thinking_once(thinking_tokenizer):
    """As the flawed part does; what the teacher opens behind its end is another. A tag without a partner stays."""
    opening, closing, alone = thinking_tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<x>"])
    row = strayed(thinking_tokenizer, [opening, alone, 7, closing, opening, 8, 4], POLICY.rules)
    written = [opening, alone, 9, closing, 10, opening, 11, 0]
    for place, token in enumerate(written):
        row.write(token, [100.0 + place] * 7)
    assert row.text == [1, *written]  # as the teacher sees it
    t = row.trajectory(thinking_tokenizer)
    flawed, ours = [opening, alone, 7, 8, 4], written[1:]
    phrase = thinking_tokenizer.encode("ab,\n\n")
    assert t.token_ids == [*flawed, *phrase, *ours]
    assert t.author == ["flawed"] * 5 + ["stitch"] * len(phrase) + ["teacher"] * 7
    assert t.statistics["teacher_logprob"] == [
        *(0.0, 1.0, 2.0, 5.0, 6.0),
        *[None] * len(phrase),
        *(100.0 + place for place in range(1, 8)),
    ]
    assert [(s.start, s.end) for s in t.steps] == [(0, 5)]


def test_other_tags_stay_as_they_were_written(tokenizer):
    """Only thinking goes on behind the phrase: a tool that the teacher calls is called anew."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    opening, closing = tokenizer.convert_tokens_to_ids(["<tool>", "</tool>"])
    row = strayed(tokenizer, [opening, 7, closing, opening, 8, 4], POLICY.rules)
    for token in (opening, 9, closing, 0):
        row.write(token, [None] * len(STATISTICS))
    phrase = tokenizer.encode("ab,\n\n")
    assert row.trajectory(tokenizer).token_ids == [
        *[opening, 7, closing, opening, 8, 4],
        *phrase,
        *[opening, 9, closing, 0],
    ]


def test_nor_does_the_student_open_it_again(thinking_tokenizer):
    """The teacher hands back before it has opened the thinking that the flawed part holds."""
    opening, closing = thinking_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    row = strayed(thinking_tokenizer, [opening, 7, 4], replace(POLICY, max_interventions=2).rules)
    row.write(4, [None] * 7)
    assert not row.continue_turn(True)
    written = [8, 4, opening, 9, closing, 4, 0]
    row.judge([[token, token in (0, 4), False, 0.5, 0.4, *[0.0] * 7] for token in written])
    t = row.trajectory(thinking_tokenizer)
    begin = t.author.index("student")
    assert t.token_ids[begin:] == [8, 4, 9, closing, 4, 0]
    assert t.author[begin:] == ["student"] * 6
    assert [(s.start - begin, s.end - begin) for s in t.steps[1:]] == [(0, 2), (2, 5), (5, 6)]


def test_thinking_without_a_stitch(thinking_tokenizer):
    """Nothing flawed is in the target, and the teacher's thinking is whole."""
    opening, closing = thinking_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    row = strayed(thinking_tokenizer, [opening, 7, 4], replace(POLICY, stitch=None).rules)
    for token in (opening, 9, closing, 0):
        row.write(token, [None] * 7)
    assert row.trajectory(thinking_tokenizer).token_ids == [opening, 9, closing, 0]


@pytest.mark.parametrize("special", [False, True])
def test_the_text_keeps_its_thinking_tags(tokenizer, special):
    """By which an answer is told from the thinking; other special tokens are not text."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>", "<x>"], special_tokens=special)
    opening, closing, other = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<x>"])
    row = Row(0, [1], 0, None, 9, [0])
    for token in (opening, 7, closing, other, 8, 0):
        row.write(token, [None] * len(STATISTICS))
    a, b = tokenizer.convert_ids_to_tokens([7, 8])
    assert row.trajectory(tokenizer).text.replace(" ", "") == f"<think>{a}</think>{'' if special else '<x>'}{b}"


def test_statistics_that_are_all_zero_are_kept(tokenizer):
    """As those of a teacher that is certain."""
    row = Row(0, [1], 0, None, 9, [0])
    row.write(0, [0.0] * len(STATISTICS))
    assert row.trajectory(tokenizer).statistics == {name: [0.0] for name in STATISTICS}
