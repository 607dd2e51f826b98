"""The figures of a synthesis."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from motab.trajectory import Trajectory


def figures(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """The figures of a synthesis.

    Returns:
        trajectories, tokens: counts. breach_rate: share of trajectories with a breach. revised: share of targets that
        hold the stitch. mean_rollback: mean of `Trajectory.rolled_back`, None without a breach. overlong: share that
        ran out of budget. teacher_share: share of the targets' tokens that the teacher wrote. teacher_runs: runs of
        teacher tokens per target. correct: share of the graded trajectories that answer their problem, None if none was
        graded.
    """
    grades = [t.correct for t in trajectories if t.correct is not None]
    rollbacks = [t.rolled_back for t in trajectories if t.rolled_back is not None]
    tokens = sum(len(t.token_ids) for t in trajectories)
    count = max(len(trajectories), 1)
    return {
        "trajectories": len(trajectories),
        "tokens": tokens,
        "breach_rate": len(rollbacks) / count,
        "revised": sum("stitch" in t.author for t in trajectories) / count,
        "mean_rollback": mean(rollbacks) if rollbacks else None,
        "overlong": sum(t.finish_reason == "length" for t in trajectories) / count,
        "teacher_share": sum(t.author.count("teacher") for t in trajectories) / max(tokens, 1),
        "teacher_runs": sum(author == "teacher" for t in trajectories for author, _, _ in t.runs()) / count,
        "correct": sum(grades) / len(grades) if grades else None,
    }
