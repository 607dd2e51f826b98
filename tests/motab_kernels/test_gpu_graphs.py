"""What only a GPU can show: that CUDA graphs follow what changes, and where the host waits."""

import warnings

import pytest
import torch
from attention_cases import assert_matches_definition as assert_attention
from attention_cases import random_case
from boundary_cases import BOUNDARIES, assert_matches_definition, poisoned_output, random_inputs, stepwise
from divergence_cases import every_kind, expected, logits, options, relative_error
from sampling_cases import assert_matches_definition as assert_samples
from sampling_cases import random_case as random_draws
from sampling_cases import random_settings

import motab_kernels as mk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
DEVICE = "cuda"
V = 2500  # two splits of the boundary


@pytest.fixture
def no_wait():
    """From the call on, until the test ends, whatever makes the host wait for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def on_device(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def captured(call):
    """A CUDA graph of the call, after one on a side stream, which compiles and allocates."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_boundary_in_a_graph_follows_what_changes(seed, no_wait):
    """Threshold, temperature, tokens and the rows' state change between replays; nothing is allocated or waited for."""
    student, teacher, tokens = map(on_device, random_inputs(2, 3, V, torch.bfloat16, seed=seed))
    threshold, tau = torch.tensor(-1.0, device=DEVICE), torch.ones(2, device=DEVICE)
    ends = torch.ones_like(tokens, dtype=torch.bool)
    chosen = mk.FixedBoundary(threshold)
    state = chosen.new_state(2, DEVICE)
    out = mk.BoundaryOutput(*map(on_device, poisoned_output((2, 3))))
    workspace = mk.boundary_workspace(2, 3, V, DEVICE)
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
        tokens.add_(shift).remainder_(V)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        found.append((temperature, tokens.cpu(), mk.BoundaryOutput(*(x.cpu() for x in out))))
    assert torch.cuda.memory_allocated() == before
    for temperature, at, result in found:
        assert_matches_definition(result, student.cpu(), teacher.cpu(), at, torch.full((2,), temperature))
    assert not found[0][2].stray.any()
    assert found[1][2].stray.tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundary_does_not_make_the_host_wait(name, no_wait):
    chosen = BOUNDARIES[name]
    if isinstance(chosen, mk.EntropyBoundary):
        chosen = mk.EntropyBoundary(on_device(chosen.epsilon0), on_device(chosen.theta), chosen.entropy_top_k)
    student, teacher, tokens, ends = map(on_device, stepwise(4, 4, seed=0))
    state = chosen.new_state(4, DEVICE)
    for attempt in range(2):
        if attempt == 1:  # the kernels are compiled
            no_wait()
        mk.fused_kl_boundary(student, teacher, tokens, boundary=chosen, state=state, step_ends=ends, temperature=0.7)
        state.reset_()


@every_kind
def test_loss_in_a_graph_follows_what_changes(kind, seed, no_wait):
    """Forward and backward: logits, temperatures, mask and upstream gradient change between replays."""
    student, teacher = (x.to(DEVICE) for x in logits(3, 2, V, seed=seed))
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
        new_student, new_teacher = logits(3, 2, V, seed=seed + 1 + step)
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
    N, H = 9, 64

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden, weight = random(N, H).requires_grad_(), (0.3 * random(V, H)).requires_grad_()
    teacher_hidden, teacher_weight = random(N, H), 0.3 * random(V, H)
    held = {}

    def call():
        hidden.grad = weight.grad = None
        loss = mk.fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, **options(kind), chunk_size=4)
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


@pytest.mark.parametrize(("T", "most"), [(1, 420), (16, 420), (70, 100)])
def test_attention_in_a_graph_follows_what_changes(T, most, seed, no_wait):
    """Lengths, rows, queries and the cache change between replays, and the host waits for none of it."""
    case = random_case([most, most], T, H=1, D=32, dtype=torch.bfloat16, seed=seed, gap=0)
    tensors = [x.to(DEVICE) for x in case]
    query, keys, values, lengths, rows = tensors
    held = {}

    def call():
        held["out"] = mk.ragged_attention(query, keys, values, lengths, rows=rows, window=140)

    graph = captured(call)
    for step, new in enumerate(([3, most], [most - 30, 0])):
        other = random_case(
            new, T, H=1, D=32, dtype=torch.bfloat16, seed=seed + 1 + step, gap=0, spare=most + 9 - max(new)
        )
        fresh = [x.to(DEVICE) for x in other]
        torch.cuda.synchronize()
        no_wait()
        for x, y in zip(tensors, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        assert_attention(held["out"].cpu(), *other, window=140)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_settings_of_rows_in_a_graph(backend, seed, no_wait):
    """They change between replays; one out of range leaves its row invalid."""
    logits, uniforms = map(on_device, random_draws(4, 1, V, seed=seed))
    settings, held = {name: on_device(x) for name, x in random_settings(4, seed).items()}, {}

    def call():
        held["out"] = mk.sample_from_logits(logits, uniforms, **settings, backend=backend)

    graph = captured(call)
    for step in range(3):
        changed = random_settings(4, seed + 1 + step)
        for name, x in changed.items():
            settings[name].copy_(x)
        settings["top_p"][step] = torch.nan
        no_wait()
        graph.replay()
        mk.sample_from_logits(logits, uniforms, **settings, backend=backend)
        torch.cuda.set_sync_debug_mode("default")
        out = mk.Samples(*(x.cpu() for x in held["out"]))
        rest = torch.arange(4) != step
        assert not out.valid[step].any()
        case = mk.Samples(*(x[rest] for x in out)), logits.cpu()[rest], uniforms.cpu()[rest]
        assert_samples(*case, **{name: x[rest] for name, x in changed.items()})


@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0}])
def test_sampling_in_a_graph_follows_what_changes(settings, seed, no_wait):
    """And the host does not wait for a token."""
    logits, uniforms = map(on_device, random_draws(3, 1, V, seed=seed))
    held = {}

    def call():
        held["out"] = mk.sample_from_logits(logits, uniforms, **settings)

    graph = captured(call)
    for step in range(2):
        case = random_draws(3, 1, V, seed=seed + 1 + step)
        logits.copy_(case[0])
        uniforms.copy_(case[1])
        no_wait()
        graph.replay()
        call_again = mk.sample_from_logits(logits, uniforms, **settings)
        torch.cuda.set_sync_debug_mode("default")
        out = mk.Samples(*(x.cpu() for x in held["out"]))
        assert torch.equal(out.token_ids, call_again.token_ids.cpu())
        if settings.get("temperature") == 0:
            assert torch.equal(out.token_ids, case[0].argmax(-1))
        else:
            assert_samples(out, *case, **settings)


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
