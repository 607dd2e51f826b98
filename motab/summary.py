"""The figures of a synthesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from motab.trajectory import Trajectory

#: Statistics of tokens of which the mean is told.
MEANS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")


class Summary:
    """The figures of trajectories that are added one by one, of which none is kept."""

    def __init__(self, trajectories: Iterable[Trajectory] = ()):
        self.counts: Counter[str] = Counter()
        self.sums = dict.fromkeys(MEANS, 0.0)
        for trajectory in trajectories:
            self.add(trajectory)

    def add(self, t: Trajectory) -> None:
        """Count one trajectory."""
        runs = t.runs()
        for name in MEANS:
            known = [value for value in t.statistics.get(name, ()) if value is not None]
            self.sums[name] += sum(known)
            self.counts[name] += len(known)
        self.counts.update(
            trajectories=1,
            tokens=len(t.token_ids),
            breaches=t.rolled_back is not None,
            rolled_back=t.rolled_back or 0,
            revised=any(author == "stitch" for author, _, _ in runs),
            overlong=t.finish_reason == "length",
            by_teacher=sum(end - start for author, start, end in runs if author == "teacher"),
            teacher_runs=sum(author == "teacher" for author, _, _ in runs),
            graded=t.correct is not None,
            correct=bool(t.correct),
        )

    def figures(self) -> dict[str, float | None]:
        """The figures.

        Returns:
            trajectories, tokens: counts. breach_rate: share of trajectories with a breach. revised: share of targets
            that hold the stitch. mean_rollback: mean of `Trajectory.rolled_back`, None without a breach. overlong:
            share that ran out of budget. teacher_share: share of the targets' tokens that the teacher wrote.
            teacher_runs: runs of teacher tokens per target. correct: share of the graded trajectories that answer their
            problem, None if none was graded. student_entropy, teacher_entropy, forward_kl, reverse_kl: means over the
            tokens that have them, in nats, None if none has.
        """
        counts = self.counts
        of_all = max(counts["trajectories"], 1)
        return {
            "trajectories": counts["trajectories"],
            "tokens": counts["tokens"],
            "breach_rate": counts["breaches"] / of_all,
            "revised": counts["revised"] / of_all,
            "mean_rollback": counts["rolled_back"] / counts["breaches"] if counts["breaches"] else None,
            "overlong": counts["overlong"] / of_all,
            "teacher_share": counts["by_teacher"] / max(counts["tokens"], 1),
            "teacher_runs": counts["teacher_runs"] / of_all,
            "correct": counts["correct"] / counts["graded"] if counts["graded"] else None,
            **{name: self.sums[name] / counts[name] if counts[name] else None for name in MEANS},
        }


def figures(trajectories: Iterable[Trajectory]) -> dict[str, float | None]:
    """The figures of `Summary.figures`."""
    return Summary(trajectories).figures()
