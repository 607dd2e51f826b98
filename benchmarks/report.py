"""A table and a picture of a run of the benchmarks, for publication.

    OMP_NUM_THREADS=2 pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.report run.json --out benchmarks/results

Writes NAME.json (the figures and the machine), NAME.md and NAME-scaling.png, where NAME is that of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import whole_path
from benchmarks.gpu import installed
from benchmarks.timing import copy_tb_s

Record = dict[str, Any]


def records_of(run: Record) -> Iterator[Record]:
    for benchmark in run["benchmarks"]:
        provider = (benchmark["params"] or {}).get("provider")
        yield {
            "case": benchmark["group"] or benchmark["name"],
            "provider": provider or benchmark["name"].split("[")[-1].rstrip("]"),
            "ms": 1e3 * benchmark["stats"]["median"],
            **benchmark["extra_info"],
        }


def machine(run: Record) -> Record:
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else run["machine_info"]["cpu"].get("brand_raw", "a CPU"),
        **({} if on_gpu else {"instructions": torch.backends.cpu.get_cpu_capability()}),
        "threads": torch.get_num_threads(),
        "copy GB/s": round(1e3 * copy_tb_s("cuda" if on_gpu else "cpu", 2 << 30 if on_gpu else 1 << 28), 1),
        "python": platform.python_version(),
        **installed(),
        "date": run["datetime"][:10],
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} pytest benchmarks/ --benchmark-only",
    }


def table(facts: Record, records: list[Record]) -> str:
    """Each provider's time, and its ratio to ours: above 1 we are faster, below 1 we lose. Where tokens were counted,
    the ratio is of the time per token."""

    def cost(r: Record) -> float:
        return r["ms"] / r.get("tokens", 1)

    ours = {r["case"]: cost(r) for r in records if r["provider"] == "ours"}
    lines = [
        ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command") + f": `{facts['command']}`",
        "",
        "| case | provider | ms | over ours | GB/s | peak MiB | tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in records:
        if "op" in r:  # a point of the scaling: in the picture
            continue
        ratio = f"{cost(r) / ours[r['case']]:.2f}" if r["case"] in ours else ""
        cells = [shown(r["ms"]), ratio, shown(r.get("GB/s")), "" if "peak MiB" not in r else f"{r['peak MiB']:.0f}"]
        cells.append(shown(1e3 / cost(r) if "tokens" in r else None))
        lines.append(f"| {r['case']} | {r['provider']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def picture(records: list[Record], path: Path) -> None:
    """Time over each size, the others fixed; a line of slope 1 is proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [r for r in records if "op" in r]
    ops = list(dict.fromkeys(r["op"] for r in points))
    figure, axes = plt.subplots(len(ops), 3, figsize=(13, 4 * len(ops)), layout="constrained", squeeze=False)
    for row, op in zip(axes, ops, strict=True):
        for axis, x in zip(row, "BTV", strict=True):
            others = [y for y in "BTV" if y != x]
            of_op = [r for r in points if r["op"] == op]
            # The other two sizes are those that most points have.
            seen = [tuple(r[y] for y in others) for r in of_op]
            fixed = max(set(seen), key=seen.count)
            for provider in dict.fromkeys(r["provider"] for r in of_op):
                line = sorted(
                    (r[x], r["ms"]) for r in of_op if r["provider"] == provider and tuple(r[y] for y in others) == fixed
                )
                axis.plot(*zip(*line, strict=True), marker="o", label=provider)
                if provider == "ours":
                    last, top = line[-1]
                    axis.plot([n for n, _ in line], [top * n / last for n, _ in line], "k:", label="slope 1")
            title = ", ".join(f"{y} = {n}" for y, n in zip(others, fixed, strict=True))
            axis.set(xscale="log", yscale="log", xlabel=x, ylabel="ms", title=f"{op}, {title}")
            axis.legend()
    with whole_path(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    plt.close(figure)


def write(path: Path, text: str) -> None:
    with whole_path(path) as unfinished:
        unfinished.write_text(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    run = json.loads(options.run.read_text())
    facts, records, name = machine(run), list(records_of(run)), options.run.stem
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / f"{name}.json", json.dumps({"machine": facts, "records": records}, indent=1) + "\n")
    write(options.out / f"{name}.md", table(facts, records))
    if any("op" in r for r in records):
        picture(records, options.out / f"{name}-scaling.png")
    print(table(facts, records))


if __name__ == "__main__":
    main()
