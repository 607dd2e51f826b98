"""The pictures of a report."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from motab.judgement import is_unbounded, label
from motab.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS = 60
_BLUE, _RED, _YELLOW, _GREEN = "#1f6feb", "#cf222e", "#d29922", "#2da44e"


def draw_steps(trajectories: Sequence[Trajectory]) -> Figure:
    """Value and boundary of each step, or of each token if single tokens are judged, with breaches marked."""
    columns = min(len(trajectories), 3)
    lines = -(-len(trajectories) // columns)
    figure, axes = _axes(lines, columns, (4.0 * columns, 2.6 * lines))
    for axis, trajectory in zip(axes, trajectories, strict=False):
        (_draw_tokens if trajectory.by_token else _draw_judged)(axis, trajectory)
        axis.locator_params(axis="x", integer=True)
    for axis in axes[len(trajectories) :]:
        axis.set_visible(False)
    shown = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside lower center", ncols=columns + 1)
    return figure


def _draw_judged(axis: Axes, trajectory: Trajectory) -> None:
    steps = trajectory.steps
    axis.plot([s.value for s in steps], "o-", color=_BLUE, label=label(trajectory.score))
    if not all(is_unbounded(trajectory.score, s.threshold) for s in steps):
        axis.step(range(len(steps)), [s.threshold for s in steps], "--", where="mid", color=_YELLOW, label="boundary")
    elif starts := takeovers(trajectory):
        for start in starts:
            axis.axvline(sum(s.end <= start for s in steps) - 0.5, color=_GREEN, label="the teacher takes over")
    breaches = [place for place, s in enumerate(steps) if not s.accepted]
    if breaches:
        values = [steps[place].value for place in breaches]
        axis.plot(breaches, values, "X", color=_RED, markersize=11, label="breach")
    if trajectory.rollback_step is not None:
        axis.axvline(trajectory.rollback_step - 0.5, color=_RED, alpha=0.6, label="rolled back to here")
    axis.set(title=f"trajectory {trajectory.index}", xlabel="step")
    if trajectory.score in (None, "teacher_value"):
        axis.set_ylim(-0.05, 1.08)


def _draw_tokens(axis: Axes, trajectory: Trajectory) -> None:
    column = trajectory.statistics.get(str(trajectory.score), [])
    kept = [math.nan if value is None else value for value in column]  # a teacher's token has none
    places = [s.start for s in trajectory.steps]
    axis.plot(kept, ".-", color=_BLUE, markersize=3, linewidth=0.8, label=label(trajectory.score))
    if places:
        thresholds = [s.threshold for s in trajectory.steps]
        axis.plot(places, thresholds, "_", color=_YELLOW, markersize=14, markeredgewidth=2, label="boundary")
        axis.plot(places, [s.value for s in trajectory.steps], "X", color=_RED, markersize=9, label="breach, left out")
    axis.set(title=f"trajectory {trajectory.index}", xlabel="token")
    axis.set_yscale("symlog", linthresh=1 if trajectory.score == "teacher_rank" else 1e-4)


class Strays:
    """Where students stray, counted in trajectories that are added one by one, of which none is kept."""

    def __init__(self, trajectories: Iterable[Trajectory] = ()):
        self.by_token = False
        # By place, of steps and of tokens: those that stray, and all. Runs of tokens are counted by their ends.
        self.breaches, self.steps = Counter[int](), Counter[int]()
        self.takeovers, self.run_ends = Counter[int](), Counter[int]()
        for trajectory in trajectories:
            self.add(trajectory)

    def add(self, trajectory: Trajectory) -> None:
        """Count the steps and tokens of one trajectory."""
        self.by_token |= trajectory.by_token
        self.steps.update(range(len(trajectory.steps)))
        self.breaches.update(place for place, step in enumerate(trajectory.steps) if not step.accepted)
        self.takeovers.update(takeovers(trajectory))
        for author, start, end in trajectory.runs():
            if author == "student":
                self.run_ends.update({start: 1, end: -1})

    def draw(self) -> Figure:
        """Share of the judged steps at each place that breach; if single tokens or none are judged, share of the tokens
        at each place of the target at which the teacher takes over."""
        figure, (axis,) = _axes(1, 1, (6, 2.6))
        if self.breaches and not self.by_token:
            size = max(self.steps) + 1
            strays, total = _by_place(self.breaches, size), _by_place(self.steps, size)
            axis.set(xlabel="step", ylabel="share that breaches", title="Where the student strays")
        else:
            size = max([*self.takeovers, *self.run_ends], default=0) + 1
            strays = _by_place(self.takeovers, size)
            total = strays + np.cumsum(_by_place(self.run_ends, size))
            axis.set(xlabel="token", ylabel="share of tokens", title="Where the teacher takes over")
        width = -(-size // _BARS)
        strays, total = (np.add.reduceat(counts, range(0, size, width)) for counts in (strays, total))
        middles = np.arange(len(total)) * width + (width - 1) / 2
        axis.bar(middles, strays / np.maximum(total, 1), width=0.9 * width, color=_RED)
        return figure


def _by_place(counts: Mapping[int, int], size: int) -> np.ndarray:
    found = np.zeros(size, dtype=int)
    found[list(counts)] = list(counts.values())
    return found


def takeovers(trajectory: Trajectory) -> list[int]:
    """The places in the target at which the teacher takes over from the student; if single tokens are replaced, two may
    be adjacent."""
    if trajectory.by_token:
        return [step.start for step in trajectory.steps]
    return [start for author, start, _ in trajectory.runs() if author == "teacher"]


def draw_accuracy(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy of each row with its standard error."""
    figure, (axis,) = _axes(1, 1, (6, 0.6 + 0.5 * len(rows)))
    names = [row["name"] for row in rows][::-1]
    axis.barh(
        names,
        [row["accuracy"] for row in rows][::-1],
        xerr=[row["standard_error"] for row in rows][::-1],
        color=_BLUE,
        capsize=3,
    )
    axis.set(xlim=(0, 1), xlabel="accuracy, with its standard error")
    return figure


def _axes(lines: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # a figure of its own: no global state, no window

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
