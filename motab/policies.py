"""Who writes, who watches, and when control changes hands: settings of one engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import motab_kernels as mk
from motab_kernels.arguments import is_integer, is_number

Backtrack = Literal["td", "breach", "none"]
DELIMITER = ".\n\n"


@dataclass(frozen=True)
class Rules:
    """What the engine asks of a policy under which the student writes.

    Attributes:
        boundary: what each step of the student is held to.
        delimiter: the text that ends a step; None: every token is a step.
        backtrack: where the teacher starts after a breach, see `MotabPolicy`.
        stitch: the phrase after rolled back steps, which stay in the target; None leaves them out.
        max_interventions: how often the teacher may take over; None: no limit, 0: never.
        teacher_steps, teacher_tokens: the teacher hands back after this many steps or tokens, whichever comes first;
            both None: it writes to the end.
        last_to_end: the teacher's last turn has no such limit.
        reflection: the teacher takes over if its likeliest token is one of these words and not among the student's
            `student_top_k` likeliest, whatever the boundary says; nothing is rolled back.
        max_tokens: the policy's own budget, if less than that of the run.
    """

    boundary: mk.Boundary
    delimiter: str | None
    backtrack: Backtrack = "breach"
    stitch: str | None = None
    max_interventions: int | None = None
    teacher_steps: int | None = None
    teacher_tokens: int | None = None
    last_to_end: bool = False
    reflection: tuple[str, ...] = ()
    student_top_k: int = 0
    max_tokens: int | None = None


#: A boundary that only NaN fails: steps are scored, and none strays; NaN is an error.
SCORES_ALONE = mk.FixedBoundary(0.0, score="teacher_value")
#: Rules where the student writes no step: nothing is judged, and the teacher takes over from nobody.
UNJUDGED = Rules(SCORES_ALONE, None, "none", max_interventions=0)


def check_number(name: str, value: float, least: float, kind: str = "an integer") -> None:
    """Refuse a setting that is not a finite number (``kind`` "an integer": a whole one) of at least ``least``."""
    is_kind = is_integer(value) if kind == "an integer" else is_number(value)
    if not is_kind or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be {kind} of at least {least}, got {value!r}")


def check_text(name: str, value: object) -> None:
    """Refuse a setting that is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")


@dataclass(frozen=True)
class MotabPolicy:
    """The student writes, the teacher watches every step, takes over from the last safe state, and finishes.

    Source: MOTAB, arXiv 2605.19433. A step with value ``V`` (geometric mean teacher probability of its tokens)
    is accepted while ``V >= epsilon0 * exp(-theta * H)``, ``H`` the teacher's entropy in nats at its first token.

    Args:
        epsilon0: boundary at zero entropy, >= 0; useful 0.1 to 0.5. 0 accepts every step that is not NaN.
        theta: how much the teacher's uncertainty relaxes the boundary, >= 0; 0 is a static boundary.
        entropy_top_k: None for the exact entropy; k for that of the renormalised k likeliest tokens.
        backtrack: where the teacher starts after a breach at step t: ``"td"`` before the step whose value fell
            most, ``"breach"`` before step t, ``"none"`` after step t.
        stitch: the phrase between the student's flawed steps and the teacher's text in the training target;
            None leaves the flawed steps out instead.
        delimiter: the text that ends a step.
        max_interventions: how often the teacher may take over, >= 1. The last time it writes to the end; before that,
            it writes one step and the student continues, judged from there on. The paper uses 1.
    """

    epsilon0: float = 0.2
    theta: float = 1.0
    entropy_top_k: int | None = None
    backtrack: Backtrack = "td"
    stitch: str | None = "However,"
    delimiter: str = DELIMITER
    max_interventions: int = 1

    def __post_init__(self) -> None:
        if self.backtrack not in ("td", "breach", "none"):
            raise ValueError(f'backtrack must be "td", "breach" or "none", got {self.backtrack!r}')
        check_text("delimiter", self.delimiter)
        if self.stitch is not None and not (isinstance(self.stitch, str) and self.stitch.strip()):
            raise ValueError(f"stitch must hold text, got {self.stitch!r}; None leaves the flawed steps out")
        check_number("max_interventions", self.max_interventions, 1)
        _ = self.rules  # refuses an epsilon0 or theta out of range

    @property
    def rules(self) -> Rules:
        return Rules(
            mk.EntropyBoundary(self.epsilon0, self.theta, entropy_top_k=self.entropy_top_k),
            self.delimiter,
            self.backtrack,
            self.stitch,
            self.max_interventions,
            teacher_steps=1,
            last_to_end=True,
        )


@dataclass(frozen=True)
class OnPolicy:
    """The student writes everything; a teacher, if given, scores its steps and never intervenes."""

    delimiter: str = DELIMITER

    def __post_init__(self) -> None:
        check_text("delimiter", self.delimiter)

    @property
    def rules(self) -> Rules:
        return Rules(SCORES_ALONE, self.delimiter, max_interventions=0)


@dataclass(frozen=True)
class Truncated:
    """`OnPolicy` that stops after ``n`` tokens: the start of a text, where the teacher's guidance is worth most.

    Args:
        n: tokens that a trajectory may hold, >= 1; `synthesize`'s ``max_new_tokens`` if that is less.
        delimiter: the text that ends a step.
    """

    n: int
    delimiter: str = DELIMITER

    def __post_init__(self) -> None:
        check_number("n", self.n, 1)
        check_text("delimiter", self.delimiter)

    @property
    def rules(self) -> Rules:
        return Rules(SCORES_ALONE, self.delimiter, max_interventions=0, max_tokens=self.n)


@dataclass(frozen=True)
class TeacherOnly:
    """The teacher writes everything: off-policy distillation. A student changes nothing of the text; where that is
    faster, it drafts it, see `motab.speculation`."""

    rules: ClassVar[None] = None  # the student writes no step


@dataclass(frozen=True)
class StepSKD:
    """Speculative knowledge distillation by steps: a step that the teacher finds much less likely than the student does
    is left out, the teacher rewrites it, and the student continues.

    A step is accepted while ``V_teacher >= gamma * V_student``, the geometric means of its tokens' probabilities.

    Args:
        gamma: >= 0; 0 accepts every step that is not NaN, 1 only those at least as likely under the teacher.
        delimiter: the text that ends a step.
    """

    gamma: float
    delimiter: str = DELIMITER

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, 0, "a finite number")
        check_text("delimiter", self.delimiter)

    @property
    def rules(self) -> Rules:
        return Rules(mk.FixedBoundary(self.gamma, score="value_ratio"), self.delimiter, teacher_steps=1)


@dataclass(frozen=True)
class TokenSKD:
    """Speculative knowledge distillation by tokens: one that is not among the teacher's ``top_k`` likeliest is left
    out, the teacher writes one in its place, and the student continues. Source: SKD, arXiv 2410.11325.

    Args:
        top_k: >= 1; the paper uses 25.
    """

    top_k: int = 25

    def __post_init__(self) -> None:
        check_number("top_k", self.top_k, 1)

    @property
    def rules(self) -> Rules:
        return Rules(mk.FixedBoundary(self.top_k, score="teacher_rank"), None, teacher_tokens=1)


@dataclass(frozen=True)
class AdaSwitch:
    """The student writes until its distribution strays from the teacher's; the teacher finishes from that token on.

    It strays where ``KL(teacher || student)`` at a token exceeds ``factor`` times its mean over the ``window`` tokens
    before it, if there are that many. Source: AdaSwitch, arXiv 2510.07842.

    Args:
        factor: >= 0.
        window: tokens to average over, >= 1.
    """

    factor: float
    window: int

    def __post_init__(self) -> None:
        check_number("factor", self.factor, 0, "a finite number")
        check_number("window", self.window, 1)

    @property
    def rules(self) -> Rules:
        return Rules(mk.MovingAverageBoundary(self.factor, self.window), None, max_interventions=1)


@dataclass(frozen=True)
class RelayOPD:
    """The teacher takes over where it would reflect and the student would not: where its likeliest token is one of
    ``words`` and not among the student's ``student_top_k`` likeliest. It writes some paragraphs, and the student
    continues. Nothing is rolled back.

    Args:
        words: matched as whole tokens, ignoring case and surrounding space; a word that the tokenizer splits is never
            found. The default is this library's own list.
        student_top_k: >= 1.
        paragraphs, relay_tokens: the most that the teacher writes at a time, whichever comes first; >= 1.
        max_interventions: how often the teacher takes over, >= 1; after that the student is only scored.
        delimiter: the text that ends a paragraph.
    """

    words: tuple[str, ...] = ("wait", "hmm", "but", "however", "actually", "alternatively")
    student_top_k: int = 5
    paragraphs: int = 3
    relay_tokens: int = 256
    max_interventions: int = 2
    delimiter: str = "\n\n"

    def __post_init__(self) -> None:
        check_text("delimiter", self.delimiter)
        words = self.words if isinstance(self.words, tuple | list) else ()
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"words must be a tuple of at least one word, got {self.words!r}")
        for name in ("student_top_k", "paragraphs", "relay_tokens", "max_interventions"):
            check_number(name, getattr(self, name), 1)

    @property
    def rules(self) -> Rules:
        return Rules(
            SCORES_ALONE,
            self.delimiter,
            max_interventions=self.max_interventions,
            teacher_steps=self.paragraphs,
            teacher_tokens=self.relay_tokens,
            reflection=tuple(self.words),
            student_top_k=self.student_top_k,
        )


#: Policies by name on the command line.
POLICIES = {
    "motab": MotabPolicy,
    "on_policy": OnPolicy,
    "teacher_only": TeacherOnly,
    "step_skd": StepSKD,
    "token_skd": TokenSKD,
    "adaswitch": AdaSwitch,
    "relay_opd": RelayOPD,
    "truncated": Truncated,
}
Policy = MotabPolicy | OnPolicy | TeacherOnly | StepSKD | TokenSKD | AdaSwitch | RelayOPD | Truncated


def needs_student(policy: Policy) -> bool:
    """Whether the student writes under this policy."""
    return policy.rules is not None


def needs_teacher(policy: Policy) -> bool:
    """Whether the teacher may write under this policy; without a teacher, nothing is scored."""
    return policy.rules is None or policy.rules.max_interventions != 0


def token_budget(policy: Policy, max_new_tokens: int) -> int:
    """The budget of a run, or the policy's own if that is less."""
    limit = None if policy.rules is None else policy.rules.max_tokens
    return max_new_tokens if limit is None else min(max_new_tokens, limit)


def check_policy(policy: object) -> None:
    """Refuse anything but an instance of a policy, such as its name or its class."""
    if not isinstance(policy, type) and isinstance(getattr(policy, "rules", ""), Rules | None):
        return
    kind: object = POLICIES.get(policy) if isinstance(policy, str) else policy
    name = kind.__name__ if isinstance(kind, type) and kind in POLICIES.values() else "MotabPolicy"
    raise ValueError(f"policy must be one with its settings, as motab.{name}(...), got {policy!r}")
