"""A self-contained HTML page about a run: its figures first, then pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from motab.files import write_whole
from motab.judgement import label
from motab.pictures import Strays, as_svg, draw_accuracy, draw_steps
from motab.summary import Summary
from motab.trajectory import Decode, Trajectory

SHOWN = 6


def write_report(
    path: str | Path,
    trajectories: Iterable[Trajectory],
    decode: Decode,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page.

    Args:
        path: the HTML file; readers never see a part of it.
        decode: token ids to text, for instance the tokenizer's ``decode``.
        rows: evaluations to show: ``name``, ``accuracy``, ``standard_error``, ``overlong``.
    """
    summary, strays = Summary(), Strays()
    first: list[Trajectory] = []
    mixed: list[Trajectory] = []  # in which control changed hands, with the most steps: these show most
    for t in trajectories:
        summary.add(t)
        strays.add(t)
        if t.breach_step is not None or {"student", "teacher"} <= {*t.author}:
            mixed = sorted([*mixed, t], key=lambda t: -len(t.steps))[:SHOWN]
        elif len(first) < SHOWN:
            first.append(t)
    chosen = mixed or first
    judged = [t for t in chosen if t.steps or t.by_token]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("motab", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        figures=summary.figures(),
        rows=rows,
        unit="tokens" if strays.by_token else "steps",
        value=label(chosen[0].score) if chosen else "",
        steps=as_svg(draw_steps(judged)) if judged else "",
        breaches=as_svg(strays.draw()) if mixed else "",
        accuracy=as_svg(draw_accuracy(rows)) if rows else "",
        examples=[(t, t.segments(decode)) for t in chosen],
    )
    write_whole(path, page)
