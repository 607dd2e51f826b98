"""A self-contained HTML page about a run: its figures first, then pictures."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from motab.files import write_whole
from motab.trajectory import Trajectory

SHOWN = 6


def figures(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """The figures of a synthesis.

    Returns:
        trajectories, tokens: counts. breach_rate: share of trajectories with a breach. revised: share of targets that
        hold the stitch. mean_rollback: steps rolled back at a trajectory's first breach, None without one. overlong:
        share that ran out of budget. teacher_share: share of the targets' tokens that the teacher wrote. teacher_runs:
        how often the teacher begins to write in a target, on average.
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
    breached = [t for t in trajectories if t.breach_step is not None]
    # The breaches with the longest history tell most; those without one fill up.
    chosen = sorted(breached, key=lambda t: -len(t.steps))[:SHOWN] or list(trajectories[:SHOWN])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("motab", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        figures=figures(trajectories),
        rows=rows,
        steps=_svg(draw_steps(chosen)) if chosen else "",
        breaches=_svg(draw_breaches(trajectories)),
        accuracy=_svg(draw_accuracy(rows)) if rows else "",
        examples=[(t, segments(t, decode)) for t in chosen],
    )
    write_whole(path, page)


def draw_steps(trajectories: Sequence[Trajectory]) -> Any:
    """Value against boundary along the steps, the rollback marked."""
    columns = min(len(trajectories), 3)
    lines = -(-len(trajectories) // columns)
    figure, axes = _axes(lines, columns, (4.0 * columns, 2.6 * lines))
    for axis, trajectory in zip(axes, trajectories, strict=False):
        places = range(len(trajectory.steps))
        axis.plot(places, [s.value for s in trajectory.steps], "o-", color="#1f6feb", label="value V")
        axis.step(places, [s.threshold for s in trajectory.steps], "--", where="mid", color="#d29922", label="boundary")
        if trajectory.breach_step is not None and trajectory.rollback_step is not None:
            axis.plot(
                trajectory.breach_step, trajectory.steps[trajectory.breach_step].value, "X", color="#cf222e",
                markersize=11, label="breach",
            )  # fmt: skip
            axis.axvline(trajectory.rollback_step - 0.5, color="#cf222e", alpha=0.6, label="rolled back to here")
        axis.set(title=f"trajectory {trajectory.index}", xlabel="step", ylim=(-0.05, 1.08))
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(trajectories) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=7, loc="lower left")
    return figure


def draw_breaches(trajectories: Sequence[Trajectory]) -> Any:
    """How many of the steps at each place were judged, and what share of them breached."""
    longest = max((len(t.steps) for t in trajectories), default=0)
    judged = [sum(len(t.steps) > place for t in trajectories) for place in range(longest)]
    breached = [sum(t.breach_step == place for t in trajectories) for place in range(longest)]
    figure, (axis,) = _axes(1, 1, (6, 2.6))
    axis.bar(range(longest), [b / j for b, j in zip(breached, judged, strict=True)], color="#cf222e")
    axis.set(xlabel="step", ylabel="share that breaches", title="Where the student strays")
    return figure


def draw_accuracy(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy of each row with its standard error."""
    figure, (axis,) = _axes(1, 1, (6, 0.6 + 0.5 * len(rows)))
    names = [row["name"] for row in rows][::-1]
    axis.barh(
        names,
        [row["accuracy"] for row in rows][::-1],
        xerr=[row["standard_error"] for row in rows][::-1],
        color="#1f6feb",
        capsize=3,
    )
    axis.set(xlim=(0, 1), xlabel="accuracy, with its standard error")
    return figure


def _axes(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # a figure of its own: no global state, no window

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
