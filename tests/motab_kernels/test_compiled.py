"""Every kernel as it is compiled, with the settings that it has: against float64 on fresh random inputs.

On a GPU; without one by `ptx`, if MOTAB_PTX is set. The interpreter runs no compiled code, nor two tensors that share
memory, and is given small tiles by the other files.
"""

import math
import os

import numpy as np
import pytest
import torch
from attention_cases import assert_matches_definition as assert_attention
from attention_cases import in_pages, random_case
from boundary_cases import BOUNDARIES, STATISTICS, assert_matches_definition, poisoned_output, random_inputs, stepwise
from divergence_cases import every_kind, expected, logits, options, relative_error, without_ties
from sampling_cases import assert_matches_definition as assert_samples
from sampling_cases import random_case as random_draws
from sampling_cases import random_settings

import motab_kernels as mk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and "MOTAB_PTX" not in os.environ, reason="needs a GPU, or MOTAB_PTX=80"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A tile of the boundary has 512 columns and a split 4 tiles; of the losses 2048 and 16.
SIZES = [1, 2047, 8193, 50257, 151936] + [7, 2048, 32768] * (DEVICE == "cuda")


def on_device(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def boundary(student, teacher, tokens, **keywords):
    """Into poisoned buffers; back on the host."""
    out = mk.BoundaryOutput(*map(on_device, poisoned_output(tokens.shape)))
    V = min(student.shape[-1], teacher.shape[-1])
    workspace = mk.boundary_workspace(*tokens.shape, V, DEVICE).fill_(NAN)
    keywords = {name: on_device(x) for name, x in keywords.items()}
    inputs = map(on_device, (student, teacher, tokens))
    mk.fused_kl_boundary(*inputs, out=out, workspace=workspace, **keywords, backend="triton")
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
    # A score that lies on its threshold to rounding may fall on either side of it; a rank is a count, not rounded.
    close = torch.isclose(reference.score, reference.threshold, rtol=1e-4, atol=1e-6) & (tokens != -1)
    clear = ~close.any(1) | (name == "teacher_rank")
    assert clear.any()
    assert torch.equal(out.stray[clear], reference.stray[clear])
    assert torch.equal(state_gpu.counters.cpu()[clear], state.counters[clear])
    torch.testing.assert_close(out.score[clear], reference.score[clear], rtol=1e-4, atol=1e-5, equal_nan=True)


def loss_and_gradient(student, teacher, kind, upstream=None, **keywords):
    student = student.to(DEVICE, copy=True).requires_grad_()
    keywords = {name: on_device(x) for name, x in keywords.items()}
    keywords |= {"reduction": "none", "backend": "triton"}
    loss = mk.divergence_loss(student, teacher.to(DEVICE), **options(kind), **keywords)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(DEVICE))
    return loss.detach().cpu(), student.grad.cpu()


@every_kind
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_loss(kind, V, dtype, seed):
    student, teacher = logits(3, V, dtype=dtype, seed=seed)
    if kind == "tvd" and V > 1:
        student, teacher = without_ties(student, teacher)
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
    if kind == "tvd":
        student, teacher = without_ties(student, teacher)
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
    if kind == "tvd":
        student, teacher = without_ties(student, teacher, tau[:, None, None])
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
        backend="triton",
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
    keywords = {"reduction": "sum", "inplace_backward": True, "backend": "triton"}
    loss = mk.divergence_loss(head, teacher.to(DEVICE), **options(kind), **keywords)
    on_gpu = DEVICE == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    loss.backward()
    if on_gpu:  # no more than the leaf's own, which the product makes of the head's
        assert torch.cuda.max_memory_allocated() - before < 1.5 * gradient.nbytes
    assert torch.equal(head.detach().cpu(), gradient)
    assert torch.equal(leaf.grad.cpu(), gradient)


def attention(query, keys, values, lengths, rows=None, **options):
    """With strides as they are; back on the host."""
    gpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE) for x in (query, keys, values)]
    for x, y in zip(gpu, (query, keys, values), strict=True):
        x.copy_(y)
    options = {name: on_device(x) for name, x in {"rows": rows, **options}.items()}
    return mk.ragged_attention(*gpu, lengths.to(DEVICE), **options, backend="triton").cpu()


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
    """Rows of no token, of one token's split of 256 to the slot, and of several splits; aligned and not."""
    from motab_kernels.gpu.attention import DEFAULT, split_length

    if DEVICE == "cpu" and ((dtype != torch.bfloat16 and (T > 1 or options)) or (T == 64 and options)):
        pytest.skip("one dtype with every option is enough where each takes seconds")
    H = 1 if "sinks" in options or T > 16 else 2
    long = 1900 if DEVICE == "cuda" else 1000
    if T <= 64:
        long = max(long, split_length(T * group, DEFAULT) + 50)
    for gap in (8, 3) if T < 64 or DEVICE == "cuda" else (8,):
        lengths = [0, 256 - T, 63, long] if T < 64 else [5, long]
        case = random_case(lengths, T, H, group, D, dtype, seed=seed, gap=gap)
        assert_attention(attention(*case, **options), *case, **options)


@pytest.mark.parametrize("T", [1, 16, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_row_does_not_depend_on_its_batch(dtype, T, seed):
    if DEVICE == "cpu" and dtype != torch.bfloat16 and T > 1:
        pytest.skip("takes minutes")
    case = query, keys, values, lengths, rows = random_case([3, 400, 1000, 256], T, D=64, dtype=dtype, seed=seed)
    whole = attention(*case)
    assert torch.equal(attention(*case, visible_length=1000 + T), whole)
    for i in range(4):
        own = query[i : i + 1], keys, values, lengths[i : i + 1], rows[i : i + 1]
        alone = attention(*own, visible_length=int(lengths[i]) + T)  # which may leave it one split
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("T", [1, 16, 90])
@pytest.mark.parametrize("page_size", [64, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_attention_in_pages(T, page_size, window, seed):
    case = random_case([3, 400, 1000, 256], T, D=128, dtype=torch.bfloat16, seed=seed, gap=0)
    *paged, table = in_pages(*case, page_size)
    out = attention(*paged, page_table=table, window=window)
    assert_attention(out, *case, window=window)
    assert torch.equal(out, attention(*case, window=window))


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
    reference.realign_([x[..., :size] for x in storages], starts, lengths, width, clear_padding=clear_padding)
    for x, y in zip(got, storages, strict=True):
        assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"top_p": 0.95}])
def test_sampling(V, dtype, settings, seed):
    case = random_draws(2, 3, V, dtype=dtype, seed=seed)
    out = mk.sample_from_logits(*map(on_device, case), **settings, temperature=0.6, backend="triton")
    assert_samples(mk.Samples(*(x.cpu() for x in out)), *case, **settings, temperature=0.6)


@pytest.mark.parametrize("V", SIZES)
def test_sampling_by_settings_of_rows(V, seed):
    case, settings = random_draws(8, V, dtype=DTYPES[seed % 3], seed=seed), random_settings(8, seed)
    given = {name: on_device(x) for name, x in settings.items()}
    out = mk.sample_from_logits(*map(on_device, case), **given, backend="triton")
    assert_samples(mk.Samples(*(x.cpu() for x in out)), *case, **settings)


def test_launches_compare_no_global_values():
    """Triton would do so at each, which took a quarter of the time of the boundary's."""
    from motab_kernels.gpu import attention, boundary, divergence, kv_cache, sampling

    modules = (attention, boundary, divergence, kv_cache, sampling)
    kernels = [(name, x) for module in modules for name, x in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) == 11
    for name, kernel in kernels:
        assert kernel.cache_key
        assert kernel.used_global_vals == {}, name


@pytest.fixture
def launches(monkeypatch):
    """Those of a test, with all that they touched."""
    if "MOTAB_PTX" not in os.environ:
        pytest.skip("needs MOTAB_PTX=80: a GPU does not tell what it read")
    from ptx.driver import Driver

    monkeypatch.setattr(Driver, "record", [])
    return Driver.record


def bytes_touched(launch, x, writes=False):
    """Of a tensor, by a launch: in all, and by accesses of 16 bytes. What threads read together counts once."""
    accesses = [a for a in launch.memory.regions[x.untyped_storage().data_ptr()].accesses if a.writes == writes]
    return tuple(sum(len(np.unique(a.at)) * a.width for a in accesses if a.width >= least) for least in (1, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2])
def test_the_boundary_reads_each_logit_once(dtype, T, launches, seed):
    """16 bytes at a time; beside that the token's logit, and of each split of 2048 columns those 16 again of the
    lane that holds its argmax, from a cache. The launches after the first, of which there is one more for several
    tokens a row, read the token's logit alone."""
    student, teacher, tokens = random_inputs(2 // T, T, 151936, dtype, seed=seed)
    mk.fused_kl_boundary(student, teacher, tokens, backend="triton")
    first, *others = launches
    assert len(others) == T
    assert bytes_touched(first, student) == (student.nbytes, student.nbytes)
    read, wide = bytes_touched(first, teacher)
    assert teacher.nbytes <= wide <= read < (1 + 16 / 2048 + 1e-3) * teacher.nbytes
    assert 0 < sum(bytes_touched(x, logits)[0] for x in others for logits in (student, teacher)) < 2000


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_read_the_logits_as_often_as_they_say(kind, dtype, launches, seed):
    """Once forward, twice for the kinds that need the normalisers first, and once backward, 16 bytes at a time."""
    student, teacher = logits(2, 151936, dtype=dtype, seed=seed)
    student.requires_grad_()
    loss = mk.divergence_loss(student, teacher, **options(kind), backend="triton")
    forward = list(launches)
    loss.backward()
    (backward,) = launches[len(forward) :]
    reads = [x for x in forward if student.untyped_storage().data_ptr() in x.memory.regions]
    assert len(reads) == (1 if kind in ("forward_kl", "reverse_kl") else 2)
    for launch in (*reads, backward):
        for x in (student, teacher):
            assert bytes_touched(launch, x) == (x.nbytes, x.nbytes)
    assert bytes_touched(backward, student.grad, writes=True) == (student.nbytes, student.nbytes)


@pytest.mark.parametrize(
    ("dtype", "settings", "most"),
    [
        (torch.bfloat16, {}, 2),
        (torch.float32, {}, 2),
        (torch.bfloat16, {"top_p": 0.95}, 8),
        (torch.float32, {"top_p": 0.95}, 16),
        (torch.bfloat16, {"top_k": 50, "top_p": 0.95}, 12),
        (torch.float32, {"top_k": 50, "top_p": 0.95}, 28),
    ],
)
def test_how_often_sampling_reads_a_row(dtype, settings, most, launches, seed):
    """16 bytes at a time: twice; for a filter once for every two bits in which its bounds differ; top-p once more."""
    logits, uniforms = random_draws(1, 151936, dtype=dtype, seed=seed)
    mk.sample_from_logits(logits, uniforms, **settings, backend="triton")
    (launch,) = launches
    read, wide = bytes_touched(launch, logits)
    assert read == wide
    assert 2 <= read // logits.nbytes <= most
