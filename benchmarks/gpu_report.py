"""A table and pictures of what `benchmarks.gpu` measured, with the targets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.files import whole_path

Record = dict[str, Any]
Figures = dict[tuple[str, str], Record]  # by case and provider
OURS = "ours, buffers given"
HOLDS = {"<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Target(NamedTuple):
    what: str
    sign: str  # how the value should compare with the limit
    limit: float
    unit: str
    value: Callable[[Figures], float]  # KeyError where it was not measured
    digits: int = 2

    def row(self, found: Figures) -> str:
        start = f"| {self.what} | {self.sign} {self.limit:g}{self.unit} |"
        try:
            value = self.value(found)
        except KeyError:
            return f"{start} not measured | |"
        verdict = "met" if HOLDS[self.sign](value, self.limit) else "missed"
        return f"{start} {value:.{self.digits}f}{self.unit} | {verdict} |"


def boundary_us(B: int) -> Callable[[Figures], float]:
    return lambda found: 1e3 * found[f"B={B} T=1 V=151936 bf16", OURS]["ms"]


def ms(case: str) -> Callable[[Figures], float]:
    return lambda found: found[case, "ours"]["ms"]


def ratio(case: str, provider: str, other: str) -> Callable[[Figures], float]:
    """The one's time over the other's."""
    return lambda found: found[case, provider]["ms"] / found[case, other]["ms"]


def least_lead(found: Figures, figure: str) -> float:
    """The least ratio of the time of eager or torch.compile to ours, over all cases of the boundary; a KeyError where
    ours has no figure."""
    ratios = [
        record[figure] / found[case, OURS][figure]
        for (case, other), record in found.items()
        if record["op"] == "boundary" and other in ("eager", "torch.compile")
    ]
    if not ratios:
        raise KeyError(OURS)
    return min(ratios)


def loss_case(kind: str, passes: str) -> str:
    return f"{kind} {passes}, 8192 x 151936 bf16"


JSD = loss_case("jsd", "forward + backward")
LINEAR = "jsd forward + backward, 8192 x 4096 x 151936 bf16"
#: For an H100, bfloat16, vocabulary 151936.
TARGETS = (
    Target("boundary, B = 64", "<=", 18, " us", boundary_us(64), digits=1),
    Target("boundary, B = 1", "<=", 10, " us", boundary_us(1), digits=1),
    Target("boundary, least lead over eager and torch.compile in all cases", ">", 1, "", lambda f: least_lead(f, "ms")),
    Target("the same, called from Python", ">", 1, "", lambda found: least_lead(found, "call_ms")),
    Target("forward KL of 8192 rows", "<=", 2, " ms", ms(loss_case("forward_kl", "forward"))),
    Target("forward KL of 8192 rows with backward", "<=", 5, " ms", ms(loss_case("forward_kl", "forward + backward"))),
    Target("JSD with backward, Liger's time over ours", ">=", 5, "", ratio(JSD, "liger", "ours")),
    Target("JSD with backward, torch.compile's time over ours", ">=", 1.2, "", ratio(JSD, "torch.compile", "ours")),
    Target("fused_linear over its four matrix products", "<=", 1.15, "", ratio(LINEAR, "ours", "products")),
    Target(
        "fused_linear, memory beyond inputs and gradients",
        "<=",
        1.2,
        " GB",
        lambda found: found[LINEAR, "ours"]["peak_mib"] * 2**20 / 1e9,
    ),
)


def table(results: Record) -> str:
    """Markdown: the machine and versions, the checks, the targets, and every measurement."""
    records = results["records"]
    device = next((r for r in records if r["op"] == "device"), {})
    checks = results["checks"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# {device.get('name', 'no device')}",
        "",
        f"{results['date']}, {versions}: `{results['command']}`. A copy moves {shown(device.get('copy_tb_s'))} TB/s.",
        "",
        f"Tests that need a GPU: {checks['passed']} passed, {checks['skipped']} skipped, {len(checks['failed'])} failed"
        + (f"; {checks['error']}" if "error" in checks else "")
        + ".",
        *(f"- FAILED {name}" for name in checks["failed"]),
        "",
        "| target, H100 | goal | measured | |",
        "| --- | --- | --- | --- |",
    ]
    figures = {(r["case"], r["provider"]): r for r in records if "ms" in r}
    lines += [target.row(figures) for target in TARGETS]
    lines += [
        "",
        "`ms`: the median on the GPU, the boundary's and attention's from a CUDA graph; `call ms`: that of a call from",
        "Python. Bytes: those of reading both sides' logits once a pass, and of writing the gradient; of attention, of",
        "the keys and values that the rows hold.",
        "",
        "| op | case | provider | ms | call ms | GB/s | of a copy | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        if "case" not in r:
            continue
        start = f"| {r['op']} | {r['case']} | {r['provider']} |"
        if "ms" not in r:
            lines.append(f"{start} {r['error'].replace('|', '/')[:120]} | | | | |")
            continue
        share = r["gb_s"] / 1e3 / device["copy_tb_s"] if "gb_s" in r and "copy_tb_s" in device else None
        cells = [r["ms"], r.get("call_ms"), r.get("gb_s"), share, r.get("peak_mib")]
        lines.append(f"{start} {' | '.join(map(shown, cells))} |")
    lines += [f"\nStage {r['stage']}: {r['error']}" for r in records if r["op"] == "stage"]
    return "\n".join(lines) + "\n"


def shown(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def plots(results: Record, out: Path) -> None:
    """The boundary's time by B, by T and by V; the losses' time by provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in results["records"] if "ms" in r]
    boundary = [r for r in records if r["op"] == "boundary" and r["dtype"] == "bf16"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, x in zip(axes, "BTV", strict=True):
        # Along an axis the other two sizes are those that most cases have.
        fixed = {"B": {"T": 1, "V": 151936}, "T": {"B": 8, "V": 151936}, "V": {"B": 64, "T": 1}}[x]
        line = [r for r in boundary if all(r[name] == value for name, value in fixed.items())]
        for provider in dict.fromkeys(r["provider"] for r in line):
            points = sorted((r[x], 1e3 * r["ms"]) for r in line if r["provider"] == provider)
            axis.plot(*zip(*points, strict=True), marker="o", label=provider)
        axis.set(
            xscale="log", yscale="log", xlabel=x, ylabel="us", title=", ".join(f"{k} = {v}" for k, v in fixed.items())
        )
        if line:
            axis.legend()
    save(figure, out / "boundary.png")

    losses = [r for r in records if r["op"] in ("divergence", "linear")]
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.3 * len(losses)), layout="constrained")
    axis.barh([f"{r['case']}, {r['provider']}" for r in losses], [r["ms"] for r in losses])
    axis.invert_yaxis()
    axis.set(xlabel="ms")
    save(figure, out / "losses.png")


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with whole_path(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
