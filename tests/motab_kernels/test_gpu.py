"""Every kernel compiled, on a GPU: against float64 on fresh random inputs, in CUDA graphs, without waits of the host.

The interpreter runs neither compiled code, nor two tensors that share memory, nor graphs. The default settings are
tested here, which the other files replace by small ones.
"""

import math
import warnings

import pytest
import torch
from attention_cases import assert_matches_definition as assert_attention
from attention_cases import in_pages, random_case
from boundary_cases import (
    BOUNDARIES,
    STATISTICS,
    assert_equal,
    assert_matches_definition,
    poisoned_output,
    random_inputs,
    stepwise,
)
from divergence_cases import every_kind, expected, logits, options, relative_error

import motab_kernels as mk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
DEVICE = "cuda"
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A tile has 2048 columns; a split of the boundary has 4 of them, of the losses 16.
SIZES = [1, 7, 2047, 2048, 8193, 32768, 50257, 151936]


@pytest.fixture
def seed():
    """A fresh one, printed where a test fails."""
    value = torch.seed() % 2**31
    print(f"seed {value}")
    return value


@pytest.fixture
def no_wait():
    """From the call on, until the test ends, whatever makes the host wait for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def on_device(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def captured(call):
    """A CUDA graph of the call, after the calls on a side stream that compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def boundary(student, teacher, tokens, **keywords):
    """On the GPU, into poisoned buffers; back on the host."""
    out = mk.BoundaryOutput(*map(on_device, poisoned_output(tokens.shape)))
    V = min(student.shape[-1], teacher.shape[-1])
    workspace = mk.boundary_workspace(*tokens.shape, V, DEVICE).fill_(NAN)
    keywords = {name: on_device(x) for name, x in keywords.items()}
    mk.fused_kl_boundary(*map(on_device, (student, teacher, tokens)), out=out, workspace=workspace, **keywords)
    return mk.BoundaryOutput(*(x.cpu() for x in out))


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_boundary_statistics(V, dtype, seed):
    inputs = random_inputs(2, 3, V, dtype, seed=seed)
    tau = torch.tensor([0.6, 1.7])
    assert_matches_definition(boundary(*inputs, temperature=tau), *inputs, tau)


def test_boundary_of_padded_rows_with_excluded_columns_and_nan(seed):
    student, teacher, tokens = random_inputs(4, 2, 5001, torch.bfloat16, seed=seed)
    student[0, :, 4000:], teacher[0, :, 4000:] = -INF, -INF
    student[1, 0, 7] = -INF
    teacher[2, 0, 4999] = -INF
    teacher[3, 0, 4999] = NAN
    tokens[:] = 5
    wide_student, wide_teacher = torch.full((4, 3, 6001), NAN).bfloat16(), torch.full((4, 2, 5003), NAN).bfloat16()
    wide_student[:, :2, 77:5078], wide_teacher[..., :5001] = student, teacher
    narrow = wide_student.to(DEVICE)[:, :2, 77:5078]  # not aligned
    out = boundary(narrow, wide_teacher, tokens, vocab_size=5001, boundary=mk.EntropyBoundary(0.0))
    part = mk.BoundaryOutput(*(x[:3] for x in out))
    assert_matches_definition(part, student[:3], teacher[:3], tokens[:3])
    assert out.forward_kl.isinf().nonzero().tolist() == [[1, 0]]
    assert out.reverse_kl.isinf().nonzero().tolist() == [[2, 0]]
    assert all(getattr(out, name)[3].isnan().tolist() == [True, False] for name in STATISTICS)
    assert out.stray[3, 0]
    assert not out.stray[:3].any()


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundary_decisions_are_the_reference_s(name, seed):
    chosen = BOUNDARIES[name]
    student, teacher, tokens, step_ends = stepwise(4, 70, seed=seed)
    tokens[torch.arange(70).expand(4, 70) % 7 == 5] = -1
    state = chosen.new_state(4)
    inputs = (student, teacher, tokens)
    reference = mk.fused_kl_boundary(*inputs, boundary=chosen, state=state, step_ends=step_ends, backend="torch")
    if isinstance(chosen, mk.EntropyBoundary):
        chosen = mk.EntropyBoundary(on_device(chosen.epsilon0), on_device(chosen.theta), chosen.entropy_top_k)
    state_gpu = chosen.new_state(4, DEVICE)
    out = boundary(*inputs, boundary=chosen, state=state_gpu, step_ends=step_ends)
    # A score that lies on its threshold to rounding may fall on either side of it.
    close = torch.isclose(reference.score, reference.threshold, rtol=1e-4, atol=1e-6) & (tokens != -1)
    clear = ~close.any(1)
    assert clear.any()
    assert torch.equal(out.stray[clear], reference.stray[clear])
    assert torch.equal(state_gpu.counters.cpu()[clear], state.counters[clear])
    torch.testing.assert_close(out.score[clear], reference.score[clear], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_boundary_in_a_graph_follows_what_changes(seed, no_wait):
    """Threshold, temperature, tokens and the rows' state change between replays; nothing is allocated or waited for."""
    student, teacher, tokens = map(on_device, random_inputs(4, 3, 32000, torch.bfloat16, seed=seed))
    threshold, tau = torch.tensor(-1.0, device=DEVICE), torch.ones(4, device=DEVICE)
    ends = torch.ones_like(tokens, dtype=torch.bool)
    chosen = mk.FixedBoundary(threshold)
    state = chosen.new_state(4, DEVICE)
    out = mk.BoundaryOutput(*map(on_device, poisoned_output((4, 3))))
    workspace = mk.boundary_workspace(4, 3, 32000, DEVICE)
    buffers = {"state": state, "out": out, "workspace": workspace}

    def call():
        mk.fused_kl_boundary(student, teacher, tokens, boundary=chosen, temperature=tau, step_ends=ends, **buffers)

    graph = captured(call)
    before = torch.cuda.memory_allocated()
    found = []
    for value, temperature, shift in ((-1.0, 0.5, 0), (2.0, 1.5, 11)):
        no_wait()
        state.reset_()
        threshold.fill_(value)
        tau.fill_(temperature)
        tokens.add_(shift).remainder_(32000)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        found.append((temperature, tokens.cpu(), mk.BoundaryOutput(*(x.cpu() for x in out))))
    assert torch.cuda.memory_allocated() == before
    for temperature, at, result in found:
        assert_matches_definition(result, student.cpu(), teacher.cpu(), at, torch.full((4,), temperature))
    assert not found[0][2].stray.any()
    assert found[1][2].stray.tolist() == [[True, False, False]] * 4


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundary_does_not_make_the_host_wait(name, no_wait):
    chosen = BOUNDARIES[name]
    if isinstance(chosen, mk.EntropyBoundary):
        chosen = mk.EntropyBoundary(on_device(chosen.epsilon0), on_device(chosen.theta), chosen.entropy_top_k)
    student, teacher, tokens, ends = map(on_device, stepwise(4, 9, seed=0))
    state = chosen.new_state(4, DEVICE)
    for attempt in range(2):
        if attempt == 1:  # the kernels are compiled
            no_wait()
        mk.fused_kl_boundary(student, teacher, tokens, boundary=chosen, state=state, step_ends=ends, temperature=0.7)
        state.reset_()


def loss_and_gradient(student, teacher, kind, upstream=None, **keywords):
    student = student.to(DEVICE, copy=True).requires_grad_()
    keywords = {name: on_device(x) for name, x in keywords.items()}
    loss = mk.divergence_loss(student, teacher.to(DEVICE), **options(kind), reduction="none", **keywords)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(DEVICE))
    return loss.detach().cpu(), student.grad.cpu()


@every_kind
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_loss(kind, V, dtype, seed):
    student, teacher = logits(3, V, dtype=dtype, seed=seed)
    loss, gradient = loss_and_gradient(student, teacher, kind)
    exact_loss, exact_gradient = expected(student, teacher, kind)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=5e-6, atol=3e-6)
    rounding = relative_error(exact_gradient.to(dtype), exact_gradient) if V > 1 else 0
    assert V == 1 or relative_error(gradient, exact_gradient) < 1.05 * rounding + 1e-5
    assert V > 1 or gradient.abs().max() < 1e-6


@every_kind
@pytest.mark.parametrize("noise", [0.05, 0.003])
def test_loss_near_agreement(kind, noise, seed):
    student, teacher = logits(2, 151936, seed=seed, noise=noise)
    loss, gradient = loss_and_gradient(student, teacher, kind)
    exact_loss, exact_gradient = expected(student, teacher, kind)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=0, atol=2e-6)
    assert relative_error(gradient, exact_gradient) < 1e-3


@every_kind
def test_loss_of_padded_rows_with_options(kind, seed):
    """A temperature a row, a mask over NaN, an upstream gradient, columns at -inf, a position of NaN, odd strides."""
    generator = torch.Generator().manual_seed(seed)
    B, T, V = 3, 4, 4099
    student, teacher = logits(B, T, V, seed=seed)
    student[..., 4000:], teacher[..., 4000:] = -INF, -INF
    tau, upstream = torch.tensor([0.7, 1.0, 2.5]), torch.randn(B, T, generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = False
    rows, gradients = expected(
        student[..., :4000].flatten(0, 1), teacher[..., :4000].flatten(0, 1), kind, tau.repeat_interleave(T)[:, None]
    )
    rows = rows.view(B, T).masked_fill(~mask, 0)
    gradients = gradients.view(B, T, 4000) * (upstream * mask)[..., None]
    student[~mask] = NAN
    teacher[1, 2, 4000] = NAN
    wide_student, wide_teacher = torch.full((B, T + 1, V + 18), NAN), torch.full((B, T + 2, V + 5), NAN)
    wide_student[:, 1:, 3 : V + 3], wide_teacher[:, :T, :V] = student, teacher
    leaf = wide_student.to(DEVICE).requires_grad_()
    loss = mk.divergence_loss(
        leaf[:, 1:, 3:],
        wide_teacher.to(DEVICE)[:, :T],
        **options(kind),
        reduction="none",
        temperature=tau.to(DEVICE),
        mask=mask.to(DEVICE),
        vocab_size=V,
    )
    loss.backward(upstream.to(DEVICE))
    loss, gradient = loss.detach().cpu().double(), leaf.grad.cpu().double()[:, 1:, 3 : V + 3]
    assert loss.isnan().nonzero().tolist() == [[1, 2]]
    assert gradient.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    loss[1, 2], gradient[1, 2] = rows[1, 2], 0
    gradients[1, 2] = 0
    torch.testing.assert_close(loss, rows, rtol=5e-6, atol=2e-6)
    torch.testing.assert_close(gradient[..., :4000], gradients, rtol=2e-5, atol=1e-6)
    assert (gradient[..., 4000:] == 0).all()


@every_kind
def test_inplace_backward_writes_the_same_gradient(kind, seed):
    student, teacher = logits(2, 3, 50257, dtype=torch.bfloat16, seed=seed)
    _, gradient = loss_and_gradient(student, teacher, kind)
    leaf = student.to(DEVICE, copy=True).requires_grad_()
    head = leaf * 1
    loss = mk.divergence_loss(head, teacher.to(DEVICE), **options(kind), reduction="sum", inplace_backward=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert torch.equal(head.detach().cpu(), gradient)
    assert torch.equal(leaf.grad.cpu(), gradient)
    assert taken < 1.5 * gradient.nbytes  # the leaf's own, which the product makes of the head's


@every_kind
def test_loss_in_a_graph_follows_what_changes(kind, seed, no_wait):
    """Forward and backward: logits, temperatures, mask and upstream gradient change between replays."""
    student, teacher = (x.to(DEVICE) for x in logits(3, 2, 32000, seed=seed))
    student.requires_grad_()
    tau, upstream = torch.ones(3, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    mask = torch.ones(3, 2, dtype=torch.bool, device=DEVICE)
    held = {}

    def call():
        student.grad = None
        losses = mk.divergence_loss(student, teacher, **options(kind), temperature=tau, mask=mask, reduction="none")
        losses.backward(upstream)
        held["loss"] = losses.detach()

    graph = captured(call)
    for step, temperature in enumerate((0.5, 2.0)):
        new_student, new_teacher = logits(3, 2, 32000, seed=seed + 1 + step)
        with torch.no_grad():
            student.copy_(new_student)
            teacher.copy_(new_teacher)
        no_wait()
        tau.fill_(temperature)
        mask[step].fill_(False)
        upstream.fill_(1.0 + step)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        rows, gradients = expected(new_student.flatten(0, 1), new_teacher.flatten(0, 1), kind, temperature)
        kept = mask.cpu().flatten()
        torch.testing.assert_close(
            held["loss"].cpu().flatten().double(), rows.masked_fill(~kept, 0), rtol=5e-6, atol=3e-6
        )
        gradients = gradients.masked_fill(~kept[:, None], 0) * (1 + step)
        assert relative_error(student.grad.cpu().flatten(0, 1), gradients) < 1e-5


@every_kind
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_losses_do_not_make_the_host_wait(kind, reduction, no_wait):
    """From logits and from hidden states, with all that may go in."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE)

    student, teacher, weights = random(2, 3, 999), random(2, 3, 1003), random(2, 3).abs()
    hidden, weight, bias, head = random(2, 3, 16), random(999, 16), random(999), random(1003, 16)
    mask = torch.tensor([[True, False, True]] * 2, device=DEVICE)
    leaves = [x.requires_grad_() for x in (student, hidden, weight, bias)]
    keywords = {**options(kind), "mask": mask, "weights": weights, "temperature": 1.3, "reduction": reduction}
    upstream = torch.ones((2, 3) if reduction == "none" else (), device=DEVICE)
    for attempt in range(2):
        if attempt == 1:
            no_wait()
        for x in leaves:
            x.grad = None
        mk.divergence_loss(student, teacher, **keywords).backward(upstream)
        linear = mk.fused_linear_divergence(
            hidden, weight, hidden.detach(), head, student_bias=bias, chunk_size=4, **keywords
        )
        linear.backward(upstream)
    torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_linear_in_a_graph_is_the_loss_of_the_logits(kind, seed):
    """Forward and backward, in chunks, with hidden states that change between replays."""
    generator = torch.Generator().manual_seed(seed)
    N, H, V = 37, 64, 5003

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden, weight = random(N, H).requires_grad_(), (0.3 * random(V, H)).requires_grad_()
    teacher_hidden, teacher_weight = random(N, H), 0.3 * random(V, H)
    held = {}

    def call():
        hidden.grad = weight.grad = None
        loss = mk.fused_linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, **options(kind), chunk_size=16
        )
        loss.backward()
        held["loss"] = loss.detach()

    graph = captured(call)
    for _ in range(2):
        with torch.no_grad():
            hidden.copy_(random(N, H))
            teacher_hidden.copy_(random(N, H))
        graph.replay()
        leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        sides = leaves[0] @ leaves[1].T, teacher_hidden.double() @ teacher_weight.double().T
        exact = mk.divergence_loss(*sides, **options(kind), backend="torch")
        exact.backward()
        torch.testing.assert_close(held["loss"].double(), exact.detach(), rtol=1e-4, atol=1e-6)
        for x, y in zip((hidden, weight), leaves, strict=True):
            assert relative_error(x.grad, y.grad) < 1e-3  # of float32 products


def attention(query, keys, values, lengths, rows=None, **options):
    """On the GPU, strides as they are; back on the host."""
    gpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE) for x in (query, keys, values)]
    for x, y in zip(gpu, (query, keys, values), strict=True):
        x.copy_(y)
    options = {name: on_device(x) for name, x in {"rows": rows, **options}.items()}
    return mk.ragged_attention(*gpu, lengths.to(DEVICE), **options).cpu()


SINKS = torch.linspace(-1, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 16, 64, 90])  # beyond 64 there are no splits
@pytest.mark.parametrize(
    ("group", "D", "options"),
    [
        (4, 128, {}),
        (8, 64, {"window": 128, "sinks": SINKS}),
        (2, 256, {"window": 700, "softcap": 20.0}),
        (1, 80, {"scale": -0.3}),
        (7, 8, {"softcap": 0.5, "sinks": SINKS[:7]}),
    ],
)
def test_attention(dtype, T, group, D, options, seed):
    """Rows of no token, of a split of 256 to the slot, and of many; aligned and not."""
    H = 1 if "sinks" in options or T > 16 else 2
    for gap in (8, 3):
        lengths = [0, 256 - T, 63, 1900] if T < 64 else [5, 700]
        case = random_case(lengths, T, H, group, D, dtype, seed=seed, gap=gap)
        assert_attention(attention(*case, **options), *case, **options)


@pytest.mark.parametrize("T", [1, 16, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_row_does_not_depend_on_its_batch(dtype, T, seed):
    case = query, keys, values, lengths, rows = random_case([3, 400, 1000, 256], T, D=64, dtype=dtype, seed=seed)
    whole = attention(*case)
    assert torch.equal(attention(*case, visible_length=1000 + T), whole)
    for i in range(4):
        alone = attention(query[i : i + 1], keys, values, lengths[i : i + 1], rows[i : i + 1])
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("T", [1, 16, 90])
@pytest.mark.parametrize("page_size", [64, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_attention_in_pages(T, page_size, window, seed):
    case = random_case([3, 400, 1000, 256], T, D=128, dtype=torch.bfloat16, seed=seed, gap=0)
    *paged, table = in_pages(*case, page_size)
    out = attention(*paged, page_table=table, window=window)
    assert_attention(out, *case, window=window)
    if page_size == 256 and window is None:
        assert torch.equal(out, attention(*case))


@pytest.mark.parametrize("T", [1, 16, 90])
def test_attention_in_a_graph_follows_what_changes(T, seed, no_wait):
    """Lengths, rows, queries and the cache change between replays, and the host waits for none of it."""
    case = random_case([900, 900, 900], T, D=64, dtype=torch.bfloat16, seed=seed, gap=0)
    tensors = [x.to(DEVICE) for x in case]
    query, keys, values, lengths, rows = tensors
    held = {}

    def call():
        held["out"] = mk.ragged_attention(query, keys, values, lengths, rows=rows, window=600)

    graph = captured(call)
    for step, new in enumerate(([3, 900, 257], [850, 0, 511])):
        other = random_case(new, T, D=64, dtype=torch.bfloat16, seed=seed + 1 + step, gap=0, spare=909 - max(new))
        fresh = [x.to(DEVICE) for x in other]
        torch.cuda.synchronize()
        no_wait()
        for x, y in zip(tensors, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        assert_attention(held["out"].cpu(), *other, window=600)


def free_memory():
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def random_logits(rows, V):
    return torch.empty(rows, V, dtype=torch.bfloat16, device=DEVICE).normal_(std=3)


@pytest.mark.skipif(free_memory() < 20 << 30, reason="needs 20 GiB")
def test_more_elements_than_32_bits_count():
    """The last rows of 2^31 elements and more are those rows alone, bit for bit."""
    V = 151936
    rows = 2**31 // V + 65
    student, teacher = random_logits(rows, V), random_logits(rows, V)
    tokens = torch.randint(V, (rows,), device=DEVICE)
    last = slice(rows - 3, rows)
    parts = student[last].clone(), teacher[last].clone(), tokens[last]
    whole = mk.fused_kl_boundary(student, teacher, tokens)
    assert_equal(mk.fused_kl_boundary(*parts), mk.BoundaryOutput(*(x[last] for x in whole)), STATISTICS)
    # As one row of many tokens too, whose offsets come of the other stride.
    whole = mk.fused_kl_boundary(student[None], teacher[None], tokens[None])
    assert_equal(mk.fused_kl_boundary(*parts), mk.BoundaryOutput(*(x[0, last] for x in whole)), STATISTICS)

    leaf = parts[0].clone().requires_grad_()
    alone = mk.divergence_loss(leaf, parts[1], divergence="jsd", reduction="none")
    alone.sum().backward()
    head = student.requires_grad_() * 1
    losses = mk.divergence_loss(head, teacher, divergence="jsd", reduction="none", inplace_backward=True)
    assert torch.equal(losses[last], alone)
    losses.sum().backward()
    assert torch.equal(head[last], leaf.grad)


@pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GiB")
def test_a_cache_of_more_elements_than_32_bits_count():
    from motab_kernels.gpu import kv_cache as gpu

    B, H, S, D = 2, 8, 2**31 // (2 * 8 * 128) + 64, 128
    storage = torch.randint(-99, 99, (B, H, S, D), dtype=torch.int8, device=DEVICE)
    expected_tail = storage[1, :, S - 70 : S - 20].clone()
    untouched = storage[0, 0, :64].clone()
    gpu.realign_([storage], [0, S - 70], [S, 50], S, clear_padding=False)
    assert torch.equal(storage[1, :, S - 50 :], expected_tail)
    assert torch.equal(storage[0, 0, :64], untouched)


@pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GiB")
@pytest.mark.parametrize("axis", ["slots", "rows"])
def test_attention_over_more_elements_than_32_bits_count(axis):
    """The last slots of a row, or of all rows, are beyond 2^31 elements; a window keeps the rest out."""
    B, H, D = (1, 8, 128) if axis == "slots" else (5, 8, 128)
    S = 2**31 // (H * D) + 600 if axis == "slots" else 2**29 // (H * D) + 600
    storage = torch.empty(B, S, H, D, dtype=torch.bfloat16, device=DEVICE).normal_().transpose(1, 2)
    query = torch.randn(1, H, 1, D, dtype=torch.bfloat16, device=DEVICE)
    lengths, rows = torch.tensor([S - 1], device=DEVICE), torch.tensor([B - 1], device=DEVICE)
    out = mk.ragged_attention(query, storage, storage, lengths, rows=rows, window=100)
    last = storage[B - 1 :, :, S - 100 :].cpu()
    assert_attention(out.cpu(), query.cpu(), last, last, torch.tensor([99]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("clear_padding", [False, True])
def test_realigned_cache_is_the_reference_s(dtype, clear_padding, seed):
    """Moves of many blocks that overlap themselves, in both directions: a race would show."""
    from motab_kernels.gpu import kv_cache as gpu
    from motab_kernels.reference import kv_cache as reference

    generator = torch.Generator().manual_seed(seed)
    slots, width, size = 3001, 2000, 96
    starts, lengths = [0, 3, slots - 9, 1, 7, 1001], [width - 5, width, 9, 4, width - 1, width]
    # The second has padded strides and heads whose addresses no wide word fits.
    storages = [torch.randint(-99, 99, (6, 2, slots, n), generator=generator).to(dtype) for n in (size, size + 1)]
    got = [x.to(DEVICE, copy=True) for x in storages]
    gpu.realign_([x[..., :size] for x in got], starts, lengths, width, clear_padding=clear_padding)
    for x in storages:
        reference.realign_(x[..., :size], starts, lengths, width, clear_padding=clear_padding)
    for x, y in zip(got, storages, strict=True):
        assert torch.equal(x.cpu(), y)


def ragged_cache():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    config = transformers.LlamaConfig(**sizes, attn_implementation="sdpa")
    cache = mk.RaggedKVCache(config, 3, 64, device=DEVICE, dtype=torch.bfloat16)
    cache.prepare(20)
    for layer in range(2):
        states = torch.randn(3, 2, 20, 8, device=DEVICE, dtype=torch.bfloat16)
        cache.update(states, states, layer)
    return cache


@pytest.mark.parametrize("tail", ["keep", "zero"])
def test_ragged_truncation_in_a_graph_follows_the_lengths(tail, no_wait):
    cache = ragged_cache()
    lengths = torch.tensor([20, 20, 20], device=DEVICE)
    graph = captured(lambda: mk.truncate_kv_cache_(cache, lengths, tail=tail, max_length=20))
    for kept in ([20, 7, 12], [3, 9, 12]):  # the cache keeps the smaller of what it has and what is asked
        new = torch.tensor(kept, device=DEVICE)
        no_wait()
        lengths.copy_(new)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths.tolist() == [3, 7, 12]
    if tail == "zero":
        dead = torch.arange(20, device=DEVICE) >= cache.lengths[:, None]
        for layer in cache.layers:
            keys = layer.keys[:, :, :20].transpose(1, 2)
            assert (keys[dead] == 0).all()
            assert (keys[~dead] != 0).any(-1).all()


def test_a_dynamic_cache_makes_the_host_wait_once():
    """For the new width, and for nothing else."""
    transformers = pytest.importorskip("transformers")
    states = torch.randn(3, 2, 9, 8, device=DEVICE)
    mask = torch.ones(3, 9, dtype=torch.int64, device=DEVICE)
    kept = torch.tensor([4, 9, 6], device=DEVICE)

    def truncated():
        cache = transformers.DynamicCache([(states.clone(), states.clone()) for _ in range(2)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mk.truncate_kv_cache_(cache, kept, mask)
        return caught

    truncated()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        caught = [str(x.message) for x in truncated() if "synchronizing" in str(x.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1, caught
