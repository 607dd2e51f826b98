"""A self-contained HTML page about a run: its figures first, then pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from motab.files import write_whole
from motab.judgement import label
from motab.pictures import as_svg, draw_accuracy, draw_breaches, draw_steps
from motab.trajectory import Trajectory

SHOWN = 6


def figures(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """The figures of a synthesis.

    Returns:
        trajectories, tokens: counts. breach_rate: share of trajectories with a breach. revised: share of targets that
        hold the stitch. mean_rollback: steps, or tokens where these are judged, rolled back at a trajectory's first
        breach, None without one. overlong: share that ran out of budget. teacher_share: share of the targets' tokens
        that the teacher wrote. teacher_runs: how often the teacher begins to write in a target, on average.
    """
    breached = [t for t in trajectories if t.breach_step is not None]
    tokens = sum(len(t.token_ids) for t in trajectories)
    count = max(len(trajectories), 1)
    return {
        "trajectories": len(trajectories),
        "tokens": tokens,
        "breach_rate": len(breached) / count,
        "revised": sum("stitch" in t.author for t in trajectories) / count,
        "mean_rollback": mean(_rolled_back(t) for t in breached) if breached else None,
        "overlong": sum(t.finish_reason == "length" for t in trajectories) / count,
        "teacher_share": sum(t.author.count("teacher") for t in trajectories) / max(tokens, 1),
        "teacher_runs": sum(_teacher_runs(t) for t in trajectories) / count,
    }


def _rolled_back(trajectory: Trajectory) -> int:
    assert trajectory.breach_step is not None
    assert trajectory.rollback_step is not None
    return trajectory.breach_step + 1 - trajectory.rollback_step


def _teacher_runs(trajectory: Trajectory) -> int:
    return sum(author == "teacher" for author, _ in itertools.groupby(trajectory.author))


def segments(trajectory: Trajectory, decode: Any) -> list[tuple[str, str]]:
    """(author, text) of each run of tokens by one author, in order."""
    runs: list[tuple[str, list[int]]] = []
    for token, author in zip(trajectory.token_ids, trajectory.author, strict=True):
        if not runs or runs[-1][0] != author:
            runs.append((author, []))
        runs[-1][1].append(token)
    return [(author, decode(ids)) for author, ids in runs]


def write_report(
    path: str | Path,
    trajectories: Sequence[Trajectory],
    decode: Any,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page.

    Args:
        path: the HTML file; written beside it under another name first, then renamed.
        decode: token ids to text, for instance the tokenizer's ``decode``.
        rows: evaluations to show: ``name``, ``accuracy``, ``standard_error``, ``overlong``.
    """
    # Those where control changed hands and with the longest history tell most.
    mixed = [t for t in trajectories if t.breach_step is not None or {"student", "teacher"} <= {*t.author}]
    chosen = sorted(mixed, key=lambda t: -len(t.steps))[:SHOWN] or list(trajectories[:SHOWN])
    judged = [t for t in chosen if t.steps or t.by_token]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("motab", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        figures=figures(trajectories),
        rows=rows,
        unit="tokens" if any(t.by_token for t in trajectories) else "steps",
        value=label(chosen[0].score) if chosen else "",
        steps=as_svg(draw_steps(judged)) if judged else "",
        breaches=as_svg(draw_breaches(trajectories)) if mixed else "",
        accuracy=as_svg(draw_accuracy(rows)) if rows else "",
        examples=[(t, segments(t, decode)) for t in chosen],
    )
    write_whole(path, page)
