"""The measurements of `python -m benchmarks.gpu`: stages that yield a trial for each case and provider.

Sizes are in a `Plan`; providers, inputs and checks are those of the `bench_*` files. A provider whose check fails, that
is not installed or that runs out of memory has an "error" in its record and no figure.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import bench_attention, bench_boundary, bench_divergence, bench_linear_divergence, bench_sampling
from benchmarks.bench_attention import Case
from benchmarks.timing import SHORT, copy_tb_s, gpu_is_lost, median_ms, peak_mib, replayed_ms, rotations

Record = dict[str, Any]
QWEN = 151936
#: These take seconds to compile for each size: they race last, so that a stage that runs out of time lacks them alone.
COMPILED = ("torch.compile", "flex_attention")


class Plan(NamedTuple):
    """Sizes of each stage; the defaults are those of published results."""

    device: str = "cuda"
    providers: tuple[str, ...] | None = None  # None: all
    boundary: tuple[tuple[int, int, int, torch.dtype], ...] = tuple(  # B, T, V
        (B, T, QWEN, dtype) for dtype in (torch.bfloat16, torch.float32) for B, T in ((1, 1), (8, 1), (64, 1), (8, 16))
    )
    scaling: tuple[tuple[int, int, int, torch.dtype], ...] = (
        *((B, 1, QWEN, torch.bfloat16) for B in (2, 4, 16, 32, 128, 256, 512)),
        *((8, T, QWEN, torch.bfloat16) for T in (4, 64)),
        *((64, 1, V, torch.bfloat16) for V in (32000, 65536, 262144)),
    )
    attention: tuple[tuple[Case, torch.dtype], ...] = tuple(
        (case, torch.bfloat16)
        for case in (
            *(Case(B, 1, 4096) for B in (1, 8, 64)),
            Case(64, 1, 4096, half=True),
            Case(64, 16, 4096),
            Case(4, 1, 32768),
        )
    )
    sampling: tuple[tuple[int, int, torch.dtype], ...] = tuple((B, QWEN, torch.bfloat16) for B in (1, 32, 256))  # B, V
    divergence: tuple[int, int, torch.dtype] = (8192, QWEN, torch.bfloat16)  # R, V
    kinds: tuple[str, ...] = ("forward_kl", "jsd", "tvd", "reverse_kl")
    linear: tuple[int, int, int, torch.dtype] = (8192, 4096, QWEN, torch.bfloat16)  # N, H, V
    linear_kinds: tuple[str, ...] = ("jsd", "forward_kl")


class Trial(NamedTuple):
    """What is measured and how; it may be skipped, and has to be run before the next one is asked for."""

    record: Record
    body: Callable[[], Record]


def run_trial(trial: Trial) -> Record:
    """The trial's record with its figures, or with the reason why there are none."""
    record = trial.record
    try:
        return record | trial.body()
    except Exception as error:
        # The traceback would keep the tensors that did not fit.
        text = " ".join(str(error).split())
        return record | {"error": f"{type(error).__name__}: {text[:300]}"}
    finally:
        if record.get("provider") in COMPILED:
            torch.compiler.reset()  # it would silently run eagerly from the ninth size on
        gc.collect()
        if torch.cuda.is_available() and not gpu_is_lost():
            torch.cuda.empty_cache()


def chosen(plan: Plan, providers: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    names = providers if plan.providers is None else plan.providers
    return {name: make for name, make in providers.items() if name in names and name not in without}


def device(plan: Plan) -> Iterator[Trial]:
    """The machine, and the bandwidth of a copy on it."""
    if plan.device != "cuda":
        yield Trial({"op": "device", "name": plan.device}, dict)
        return
    properties = torch.cuda.get_device_properties(0)
    yield Trial(
        {"op": "device", "name": properties.name, "cache_mib": properties.L2_cache_size / 2**20},
        lambda: {"copy_tb_s": copy_tb_s(plan.device)},
    )


def boundary(plan: Plan) -> Iterator[Trial]:
    providers = chosen(plan, bench_boundary.PROVIDERS)
    for part in compiled_last(providers):
        for case in plan.boundary:
            yield from boundary_case(plan, case, part)


def compiled_last(providers: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that compile nothing, then those that do."""
    parts = ({name: make for name, make in providers.items() if (name in COMPILED) is it} for it in (False, True))
    return [part for part in parts if part]


def scaling(plan: Plan) -> Iterator[Trial]:
    """More sizes, without torch.compile, which takes seconds for each."""
    for case in plan.scaling:
        yield from boundary_case(plan, case, chosen(plan, bench_boundary.PROVIDERS, ("ours", "torch.compile")))


def boundary_case(plan: Plan, case: tuple[int, int, int, torch.dtype], providers: dict[str, Any]) -> Iterator[Trial]:
    """`ms` is the time in a CUDA graph where there is one, `call_ms` that of a call from Python."""
    B, T, V, dtype = case
    read = 2 * B * T * V * dtype.itemsize
    batches = [
        bench_boundary.inputs((B,) if T == 1 else (B, T), V, dtype, seed, plan.device)
        for seed in range(rotations(read, plan.device))
    ]
    for name, make in providers.items():

        def body(name: str = name, make: Any = make) -> Record:
            call = make(*batches[0])
            bench_boundary.check(call, name, *batches[0])
            calls = [functools.partial(call, *batch) for batch in batches]
            call_ms = median_ms(calls, plan.device)
            ms = replayed_ms(calls) if plan.device == "cuda" else call_ms
            return figures(ms, read) | {"call_ms": call_ms, "peak_mib": peak_mib(calls[0], plan.device)}

        case_name = f"B={B} T={T} V={V} {SHORT[dtype]}"
        yield Trial(
            {"op": "boundary", "case": case_name, "provider": name, "B": B, "T": T, "V": V, "dtype": SHORT[dtype]}, body
        )


def attention(plan: Plan) -> Iterator[Trial]:
    """As for the boundary, `ms` is the time in a CUDA graph where there is one."""
    for part in compiled_last(chosen(plan, bench_attention.PROVIDERS)):
        for case, dtype in plan.attention:
            yield from attention_case(plan, case, dtype, part)


def attention_case(plan: Plan, case: Case, dtype: torch.dtype, providers: dict[str, Any]) -> Iterator[Trial]:
    x = bench_attention.inputs(case, dtype, plan.device)
    copies = range(1, rotations(x.read(), plan.device))
    others = [x._replace(keys=x.keys.clone(), values=x.values.clone()) for _ in copies]
    for name, make in providers.items():

        def body(make: Any = make) -> Record:
            calls = [make(each) for each in (x, *others)]
            bench_attention.check(calls[0], x)
            call_ms = median_ms(calls, plan.device)
            ms = replayed_ms(calls) if plan.device == "cuda" else call_ms
            return figures(ms, x.read()) | {"call_ms": call_ms, "peak_mib": peak_mib(calls[0], plan.device)}

        yield Trial({"op": "attention", "case": f"{case}, {SHORT[dtype]}", "provider": name}, body)


def sampling(plan: Plan) -> Iterator[Trial]:
    """`ms` is the time of a call from Python, as generation makes it; ours in a graph shows the GPU's part of it."""
    ours = bench_sampling.PROVIDERS["ours"]
    for part in compiled_last(chosen(plan, bench_sampling.PROVIDERS | {"ours, in a CUDA graph": ours})):
        for B, V, dtype in plan.sampling:
            batches = [bench_sampling.inputs(B, V, dtype, seed, plan.device) for seed in range(2)]
            for (kept, filters), (name, make) in itertools.product(bench_sampling.FILTERS.items(), part.items()):

                def body(name: str = name, make: Any = make, batches: Any = batches, filters: Any = filters) -> Record:
                    call = make()
                    bench_sampling.check(call, name, *batches[0], *filters)
                    calls = [functools.partial(call, *batch, *filters) for batch in batches]
                    is_replayed = plan.device == "cuda" and name.endswith("graph")
                    ms = replayed_ms(calls) if is_replayed else median_ms(calls, plan.device, seconds=0.1)
                    return figures(ms, batches[0][0].nbytes) | {"peak_mib": peak_mib(calls[0], plan.device)}

                case_name = f"B={B} V={V} {kept} {SHORT[dtype]}"
                yield Trial({"op": "sampling", "case": case_name, "provider": name}, body)


def divergence(plan: Plan) -> Iterator[Trial]:
    """Forward alone, and forward with backward."""
    R, V, dtype = plan.divergence
    student, teacher = bench_divergence.inputs(R, V, dtype, plan.device)
    exact = functools.cache(lambda kind: bench_divergence.exact(kind, student, teacher))
    for part in compiled_last(chosen(plan, bench_divergence.PROVIDERS)):
        for kind, (name, make), backward in itertools.product(plan.kinds, part.items(), (False, True)):
            if name == "liger" and kind != "jsd":
                continue

            def body(kind: str = kind, make: Any = make, backward: bool = backward) -> Record:
                loss, leaf = make(), student if backward else student.detach()

                def call() -> None:
                    leaf.grad = None
                    result = loss(kind, leaf, teacher)
                    if backward:
                        result.backward()

                bench_divergence.check(loss, kind, leaf, teacher, exact(kind), backward)
                student.grad = None
                moved = (5 if backward else 2) * R * V * dtype.itemsize
                peak = peak_mib(call, plan.device)
                return figures(median_ms([call], plan.device), moved) | {"peak_mib": peak}

            passes = "forward + backward" if backward else "forward"
            case_name = f"{kind} {passes}, {R} x {V} {SHORT[dtype]}"
            yield Trial({"op": "divergence", "case": case_name, "provider": name}, body)
            student.grad = None


def linear(plan: Plan) -> Iterator[Trial]:
    """Also the products alone, whole and in chunks as ours makes them: what ours takes beyond is its kernels' time."""
    N, H, V, dtype = plan.linear
    leaves = bench_linear_divergence.inputs(N, H, V, dtype, plan.device)
    exact = functools.cache(lambda kind: bench_linear_divergence.exact(kind, leaves))

    def timed(call: Callable[[], object]) -> Record:
        for x in leaves[:2]:
            x.grad = torch.ones_like(x)  # as an earlier run leaves: the peak is what is needed besides
        peak = peak_mib(call, plan.device)
        return {"ms": median_ms([call], plan.device, seconds=0.5), "peak_mib": peak}

    def race(name: str, make: Any, kind: str) -> Record:
        call = functools.partial(bench_linear_divergence.gradients, make(kind), leaves)
        errors = bench_linear_divergence.check(call(), name, exact(kind))
        return timed(call) | errors

    found = chosen(plan, bench_linear_divergence.PROVIDERS)
    races = {name: functools.partial(race, name, make) for name, make in found.items()}
    products = bench_linear_divergence.products_of(*leaves)
    for part in compiled_last({name: lambda kind, make=make: timed(make()) for name, make in products.items()} | races):
        for kind, (name, body) in itertools.product(plan.linear_kinds, part.items()):
            if name not in bench_linear_divergence.without(kind):
                case_name = f"{kind} forward + backward, {N} x {H} x {V} {SHORT[dtype]}"
                record = {"op": "linear", "case": case_name, "provider": name}
                yield Trial(record, functools.partial(body, kind))


def figures(ms: float, moved: int) -> Record:
    return {"ms": ms, "gb_s": moved / ms / 1e6}


STAGES: dict[str, Callable[[Plan], Iterator[Trial]]] = {
    "device": device,
    "boundary": boundary,
    "attention": attention,
    "sampling": sampling,
    "divergence": divergence,
    "linear": linear,
    "scaling": scaling,
}
