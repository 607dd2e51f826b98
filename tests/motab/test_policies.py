"""Every policy against a loop over single tokens, written from its definition with plain forward passes."""

import math

import pytest
import torch

import motab
from motab.row import Row

DELIMITER = ".\n\n"
BUDGET = 40
EOS = 0
SAMPLING = [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "min_p": 0.1}]
POLICIES = {
    "motab, 3 interventions": motab.MotabPolicy(0.3, 0.5, stitch="ab,", max_interventions=3),
    "motab, 2, no stitch": motab.MotabPolicy(0.25, 0.5, stitch=None, max_interventions=2),
    "motab, 2, backtrack breach": motab.MotabPolicy(0.25, 0.5, stitch="ab,", max_interventions=2, backtrack="breach"),
    "motab, 3, backtrack none": motab.MotabPolicy(0.4, 0.5, stitch="ab,", max_interventions=3, backtrack="none"),
    "step skd": motab.StepSKD(0.7),
    "token skd": motab.TokenSKD(2),
    "adaswitch": motab.AdaSwitch(2.0, 5),
    "relay opd": motab.RelayOPD(words=("a", "c"), student_top_k=1, paragraphs=2, relay_tokens=7),
    "relay opd, tokens": motab.RelayOPD(words=("AB", "b"), student_top_k=2, paragraphs=9, relay_tokens=3),
    "truncated": motab.Truncated(11),
}


def run(student, teacher, tokenizer, prompts, policy, **settings):
    settings = {"max_new_tokens": BUDGET, "batch_size": 4, "block_size": 5, "temperature": 0.0, **settings}
    return list(motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **settings))


class Definition:
    """One trajectory by a policy, greedily, a token at a time."""

    def __init__(self, student, teacher, tokenizer, prompt, policy):
        self.student, self.teacher, self.tokenizer, self.prompt, self.policy = (
            student,
            teacher,
            tokenizer,
            prompt,
            policy,
        )
        self.budget = min(BUDGET, getattr(policy, "n", BUDGET))
        self.context, self.target, self.author = [], [], []

    def logprobs(self, model):
        with torch.no_grad():
            return (
                model(torch.tensor([self.prompt + self.context])).logits[0, -1, : len(self.tokenizer)].log_softmax(-1)
            )

    def write(self, token, author):
        self.context.append(token)
        self.target.append(token)
        self.author.append(author)

    def drop(self, count):
        """Take the last tokens out of the context and, for a policy that leaves them out, of the target."""
        dropped = self.context[len(self.context) - count :]
        del self.context[len(self.context) - count :]
        stitch = getattr(self.policy, "stitch", None)
        del self.target[len(self.target) - count :], self.author[len(self.author) - count :]
        if stitch is not None:
            flawed = [token for token in dropped if token != EOS]
            text = self.tokenizer.decode(self.target + flawed)
            blank = "\n" * max(0, 2 - (len(text) - len(text.rstrip("\n")))) if text else ""
            phrase = self.tokenizer.encode(f"{blank}{stitch}\n\n")
            self.target += flawed + phrase
            self.author += ["flawed"] * len(flawed) + ["stitch"] * len(phrase)

    @property
    def over(self):
        return len(self.context) == self.budget or self.context[-1:] == [EOS]

    def teacher_turn(self, steps=None, tokens=None, delimiter=DELIMITER):
        start = begin = len(self.context)
        ended = 0
        while not self.over:
            self.write(int(self.logprobs(self.teacher).argmax()), "teacher")
            if delimiter in self.tokenizer.decode(self.context[begin:]):
                ended, begin = ended + 1, len(self.context)
            if ended == steps or len(self.context) - start == tokens:
                return

    def student_step(self, delimiter=DELIMITER):
        """Tokens of a step with the log-probabilities of both for them, and the teacher's entropy before it."""
        start, student, teacher = len(self.context), [], []
        p = self.logprobs(self.teacher)
        entropy = -float((p.exp() * p).sum())
        while not self.over and delimiter not in self.tokenizer.decode(self.context[start:]):
            q, p = self.logprobs(self.student), self.logprobs(self.teacher)
            token = int(q.argmax())
            student.append(float(q[token]))
            teacher.append(float(p[token]))
            self.write(token, "student")
        return start, student, teacher, entropy

    def motab(self):
        policy, interventions = self.policy, 0
        starts, values = [], []
        while not self.over:
            start, _, teacher, entropy = self.student_step()
            starts.append(start)
            values.append(math.exp(sum(teacher) / len(teacher)))
            if values[-1] >= policy.epsilon0 * math.exp(-policy.theta * entropy):
                continue
            t = len(values) - 1
            falls = [values[k] - values[k - 1] for k in range(1, t + 1)]
            safe = {"td": starts[1 + falls.index(min(falls))] if falls else starts[0], "breach": start}
            end = len(self.context) - (self.context[-1] == EOS)
            self.drop(len(self.context) - safe.get(policy.backtrack, end))
            interventions += 1
            starts, values = [], []
            self.teacher_turn(steps=1 if interventions < policy.max_interventions else None)
        return self

    def step_skd(self):
        while not self.over:
            start, student, teacher, _ = self.student_step()
            if math.exp((sum(teacher) - sum(student)) / len(student)) < self.policy.gamma:
                self.drop(len(self.context) - start)
                self.teacher_turn(steps=1)
        return self

    def token_skd(self):
        while not self.over:
            p = self.logprobs(self.teacher)
            token = int(self.logprobs(self.student).argmax())
            if token in p.topk(self.policy.top_k).indices:
                self.write(token, "student")
            else:
                self.write(int(p.argmax()), "teacher")
        return self

    def adaswitch(self):
        window, divergences = self.policy.window, []
        while not self.over:
            p, q = self.logprobs(self.teacher), self.logprobs(self.student)
            divergence = float((p.exp() * (p - q)).sum())
            recent = divergences[-window:]
            if len(recent) == window and divergence > self.policy.factor * sum(recent) / window:
                self.teacher_turn()
                break
            divergences.append(divergence)
            self.write(int(q.argmax()), "student")
        return self

    def relay_opd(self):
        policy, turns = self.policy, 0
        ids = {self.tokenizer.convert_tokens_to_ids(word.lower()) for word in policy.words}
        while not self.over:
            first = int(self.logprobs(self.teacher).argmax())
            q = self.logprobs(self.student)
            if turns < policy.max_interventions and first in ids and first not in q.topk(policy.student_top_k).indices:
                turns += 1
                self.teacher_turn(policy.paragraphs, policy.relay_tokens, policy.delimiter)
            else:
                self.write(int(q.argmax()), "student")
        return self

    def truncated(self):
        while not self.over:
            self.write(int(self.logprobs(self.student).argmax()), "student")
        return self


def by_definition(name, *arguments):
    kind = name.split(",")[0].replace(" ", "_")
    return getattr(Definition(*arguments, POLICIES[name]), kind)()


@pytest.mark.parametrize("name", POLICIES)
def test_by_definition(student, teacher, tokenizer, prompts, name):
    trajectories = run(student, teacher, tokenizer, prompts, POLICIES[name])
    for trajectory, prompt in zip(trajectories, prompts, strict=True):
        expected = by_definition(name, student, teacher, tokenizer, prompt)
        assert trajectory.token_ids == expected.target
        assert trajectory.author == expected.author
        assert trajectory.finish_reason == ("eos" if expected.context[-1] == EOS else "length")
        assert len(expected.context) <= BUDGET
        assert all(len(column) == len(trajectory.token_ids) for column in trajectory.statistics.values())
    # The inputs must reach what is asked: control comes back at least once, and both write.
    authors = ["".join(author[0] for author in trajectory.author) for trajectory in trajectories]
    if name == "truncated":
        assert all(set(author) == {"s"} for author in authors)
    elif name == "adaswitch":
        assert any(author.endswith("t") and author.startswith("s") for author in authors)
    else:
        assert any("t" in author and author.split("t")[-1].startswith("s") for author in authors)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_batch_and_block_change_nothing(student, teacher, tokenizer, prompts, name, sampling):
    one, *others = (
        run(student, teacher, tokenizer, prompts[:7], POLICIES[name], batch_size=b, block_size=k, **sampling)
        for b, k in ((1, 1), (3, 4), (7, 64))
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            for part in ("token_ids", "author", "text", "breach_step", "rollback_step", "finish_reason"):
                assert getattr(a, part) == getattr(b, part), part
            for x, y in zip(a.steps, b.steps, strict=True):
                assert (x.start, x.end, x.accepted, x.discarded_ids) == (y.start, y.end, y.accepted, y.discarded_ids)


@pytest.mark.parametrize("name", POLICIES)
def test_steps_tell_where_they_are(student, teacher, tokenizer, prompts, name):
    policy = POLICIES[name]
    judges_tokens = isinstance(policy, motab.TokenSKD | motab.AdaSwitch)
    for trajectory in run(student, teacher, tokenizer, prompts, policy, temperature=0.7):
        for step in trajectory.steps:
            authors = set(trajectory.author[step.start : step.end])
            if step.discarded_ids is None:
                assert authors in ({"student"}, {"flawed"}, set())  # the last: an end token that the target leaves out
                text = tokenizer.decode(trajectory.token_ids[step.start : step.end])
                last = step.end == len(trajectory.token_ids)
                # Blank lines may share a token, and with it a line break.
                assert policy.delimiter in text or last or not step.accepted or policy.delimiter == "\n\n"
            else:
                assert step.discarded_ids
                assert authors == set()
                assert trajectory.author[step.start] == "teacher"
        assert all(not step.accepted for step in trajectory.steps) or not judges_tokens
        strayed = [place for place, step in enumerate(trajectory.steps) if not step.accepted]
        assert trajectory.breach_step == (strayed[0] if strayed else None)
        assert motab.Trajectory.from_json(trajectory.to_json()) == trajectory


def test_each_turn_has_a_stream_of_its_own():
    """A position that is written again after a rollback must not draw the number that led astray."""
    assert len({Row(0, [1], 5, None, 9, [0], turn=turn).key for turn in range(6)}) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: motab.StepSKD(-0.1), "gamma must be a finite number of at least 0, got -0.1"),
        (lambda: motab.TokenSKD(0), "top_k must be an integer of at least 1, got 0"),
        (lambda: motab.TokenSKD(2.5), "top_k must be an integer of at least 1, got 2.5"),
        (lambda: motab.AdaSwitch(math.nan, 4), "factor must be a finite number of at least 0, got nan"),
        (lambda: motab.AdaSwitch(2.0, 0), "window must be an integer of at least 1, got 0"),
        (lambda: motab.RelayOPD(words=()), r"words must be a tuple of at least one word, got \(\)"),
        (
            lambda: motab.RelayOPD(words=("wait", " ")),
            r"words must be a tuple of at least one word, got \('wait', ' '\)",
        ),
        (lambda: motab.RelayOPD(words="wait"), "words must be a tuple of at least one word, got 'wait'"),
        (lambda: motab.RelayOPD(paragraphs=0), "paragraphs must be an integer of at least 1, got 0"),
        (lambda: motab.RelayOPD(words=5), "words must be a tuple of at least one word, got 5"),
        (lambda: motab.RelayOPD(words=("wait", 5)), r"words must be a tuple of at least one word, got \('wait', 5\)"),
        (lambda: motab.MotabPolicy(stitch=5), "stitch must hold text, got 5; None leaves"),
        (lambda: motab.MotabPolicy(delimiter=5), "delimiter must be a text, got 5"),
        (lambda: motab.OnPolicy(delimiter=None), "delimiter must be a text, got None"),
        (lambda: motab.Truncated(3, b"."), "delimiter must be a text, got b'.'"),
        (lambda: motab.StepSKD(0.5, 5), "delimiter must be a text, got 5"),
        (lambda: motab.RelayOPD(delimiter=5), "delimiter must be a text, got 5"),
        (lambda: motab.Truncated(0), "n must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_words_that_are_no_tokens(student, teacher, tokenizer, prompts):
    with pytest.raises(ValueError, match=r"none of the words wait, hmm.* is a token of this tokenizer; give others"):
        run(student, teacher, tokenizer, prompts, motab.RelayOPD())


@pytest.mark.parametrize("policy", [motab.StepSKD(0.5), motab.RelayOPD(words=("a",))])
def test_who_must_be_there(student, teacher, tokenizer, prompts, policy):
    with pytest.raises(ValueError, match="needs a teacher, got None; only OnPolicy and Truncated need none"):
        run(student, None, tokenizer, prompts, policy)
    with pytest.raises(ValueError, match="needs a student, got None; only TeacherOnly needs none"):
        run(None, teacher, tokenizer, prompts, policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("step_skd", r"policy must be one with its settings, as motab.StepSKD\(...\), got 'step_skd'"),
        ("motabb", r"as motab.MotabPolicy\(...\), got 'motabb'"),
        (motab.TokenSKD, r"as motab.TokenSKD\(...\), got <class 'motab.policies.TokenSKD'>"),
        (motab.TeacherOnly, r"as motab.TeacherOnly\(...\), got <class"),
        (0.2, r"as motab.MotabPolicy\(...\), got 0.2"),
    ],
)
def test_what_is_no_policy(student, teacher, tokenizer, prompts, policy, message):
    with pytest.raises(ValueError, match=message):
        run(student, teacher, tokenizer, prompts, policy)
    for nothing_either in (policy, None):
        with pytest.raises(ValueError, match=message if nothing_either else "got None"):
            motab.Rollouts(prompts, nothing_either)
