"""Progress over trajectories, with their figures so far: a bar, or lines of a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from motab.summary import Summary
from motab.trajectory import Trajectory

LOG_SECONDS = 60.0  # between lines where there is no terminal to draw a bar on


def watch(
    trajectories: Iterable[Trajectory], total: int, title: str, console: Console, *, before: int = 0
) -> Iterator[Trajectory]:
    """Yield the trajectories unchanged, with a bar on ``console`` that begins at ``before`` of ``total``; if that is no
    terminal, with a line a minute."""
    whole = Column(no_wrap=True)  # where a terminal is narrow, the bar gives way
    columns = (
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[figures]}", table_column=whole),
    )
    summary, began = Summary(), time.monotonic()
    logged = began
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=before, figures="")
        for trajectory in trajectories:
            summary.add(trajectory)
            counts, known = summary.counts, summary.figures()
            figures = f"{counts['tokens'] / (time.monotonic() - began):,.0f} tok/s"
            if counts["breaches"]:
                figures += f"  breach {known['breach_rate']:.0%}  rollback {known['mean_rollback']:.2f}"
            if counts["graded"]:
                figures += f"  right {known['correct']:.0%}"
            progress.update(task, advance=1, figures=figures)
            if not console.is_terminal and time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                console.print(f"{title}: {before + counts['trajectories']} of {total}  {figures}")
            yield trajectory
