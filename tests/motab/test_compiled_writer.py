"""Compiled models write what the models themselves write, in three programs whatever the batch."""

import copy

import pytest
import torch
from engine_cases import check_same
from test_speculation import deeper
from torch._dynamo.utils import counters
from transformers import CompileConfig

import motab
from motab.compiled_writer import CompiledWriter
from motab_kernels.backend import HAS_LIBRARY

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
needs_kernels = pytest.mark.skipif(not HAS_LIBRARY and not torch.cuda.is_available(), reason="needs the kernels")
POLICY = motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,")
#: And how many programs there are after each: the student's token and the teacher's block, and where the teacher writes
#: more than what comes from a block, its token.
POLICIES = {
    motab.TokenSKD(top_k=2): 2,
    POLICY: 3,
    motab.MotabPolicy(epsilon0=0.3, theta=0.5, max_interventions=3): 3,
    motab.AdaSwitch(factor=2.0, window=4): 3,
}


@pytest.fixture(autouse=True)
def fresh():
    """Programs that other tests made are none of ours."""
    torch._dynamo.reset()
    counters.clear()


def pair_of(student, teacher, backend, device="cpu"):
    """In float32, for the kernels. "eager" keeps the graphs that `torch.compile` sees, and runs them as they are."""
    models = [copy.deepcopy(model).float().to(device) for model in (student, teacher)]
    if backend is not None:
        for model in models:
            model.generation_config.compile_config = CompileConfig(
                fullgraph=True, dynamic=True, backend=backend, mode=None
            )
    return models


def run(pair, tokenizer, prompts, policy, **settings):
    settings = {"max_new_tokens": 40, "batch_size": 3, "block_size": 4, "temperature": 0.7, "seed": 5, **settings}
    return list(motab.synthesize(*pair, tokenizer, prompts, policy=policy, **settings))


@needs_kernels
def test_the_same_trajectories_from_three_programs(student, teacher, tokenizer, prompts):
    """Of all policies. Batches of which rows and blocks are odd numbers, and equal to other sizes; caches of several
    lengths."""
    pair = pair_of(student, teacher, "eager")
    for policy, programs in POLICIES.items():
        print(policy)  # where a check of it fails
        breaches = 0
        for batch_size, block_size, max_new_tokens in ((1, 4, 40), (5, 2, 31), (12, 12, 40)):
            sizes = {"batch_size": batch_size, "block_size": block_size, "max_new_tokens": max_new_tokens}
            before = counters["stats"]["unique_graphs"]
            expected = run(pair, tokenizer, prompts, policy, **sizes)
            assert counters["stats"]["unique_graphs"] == before  # nothing is compiled unless one asks for it
            check_same(run(pair, tokenizer, prompts, policy, **sizes, torch_compile=True), expected)
            breaches += sum(set(t.author) >= {"student", "teacher"} for t in expected)
        assert breaches
        assert counters["stats"]["unique_graphs"] == programs


@needs_kernels
def test_three_programs_on_pages_too(student, teacher, tokenizer, prompts):
    """Rows of up to 3 pages, 12 of which there are."""
    pair = pair_of(student, teacher, "eager")
    for batch_size, block_size in ((5, 2), (12, 12)):
        sizes = {"batch_size": batch_size, "block_size": block_size, "max_new_tokens": 160}
        expected = run(pair, tokenizer, prompts, POLICY, **sizes)
        check_same(run(pair, tokenizer, prompts, POLICY, **sizes, torch_compile=True, max_cached_tokens=768), expected)
    assert counters["stats"]["unique_graphs"] == 3


@needs_kernels
def test_three_programs_where_a_student_drafts_all_that_a_teacher_writes(student, teacher, tokenizer, prompts):
    """Its token, and the teacher's block and token."""
    pair = pair_of(student, deeper(teacher, 8), "eager")
    settings = {"policy": motab.TeacherOnly(), "batch_size": 5, "block_size": 8}
    expected = run((None, pair[1]), tokenizer, prompts, **settings)
    check_same(run(pair, tokenizer, prompts, **settings, torch_compile=True), expected)
    assert counters["stats"]["unique_graphs"] == 3


@needs_kernels
def test_no_number_is_an_input(student, teacher, tokenizer, prompts):
    """Of floating point: on a GPU each would be copied there at every call, outside of the CUDA graph."""
    inputs = []

    def noting(graph, example_inputs):
        inputs.extend(node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder"))
        return graph

    run(pair_of(student, teacher, noting), tokenizer, prompts, POLICY, torch_compile=True)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    assert tensors
    assert not [x for x in tensors if x.dim() == 0]
    assert not [x for x in inputs if isinstance(x, float | torch.SymFloat)]


@needs_kernels
def test_inductor_and_rows_that_come_and_go(student, teacher, tokenizer, prompts):
    """What is run by default: code made from the graphs."""
    pair = pair_of(student, teacher, None)
    settings = {"batch_size": 5, "temperature": 0.0}
    expected = run(pair, tokenizer, prompts, POLICY, **settings)
    check_same(run(pair, tokenizer, prompts, POLICY, **settings, torch_compile=True), expected)
    assert any(t.breach_step is not None for t in expected)
    assert counters["stats"]["unique_graphs"] == 3


@needs_kernels
def test_few_shapes_and_nothing_seen_of_idle_rows(student, teacher, tokenizer, prompts, monkeypatch):
    """What lies behind a row's own tokens may be NaN, and lies within the bound that the pass is given."""
    pair = pair_of(student, teacher, "eager")
    sizes = {"batch_size": 5, "block_size": 6}
    expected = run(pair, tokenizer, prompts, POLICY, **sizes)
    advance, forward, active, idle = CompiledWriter._advance, CompiledWriter._forward, [], []
    shapes = set()

    def noting(self, rows, token_ids):
        active[:] = rows
        return advance(self, rows, token_ids)

    def poisoning(self, call, rows, token_ids, longest, **options):
        out = forward(self, call, rows, token_ids, longest, **options)
        if call == self._run:
            shapes.add((*token_ids.shape, longest + token_ids.shape[1]))
            idle.append(sorted(set(rows) - set(active)))
            for row in idle[-1]:
                for layer in self.cache.layers:
                    layer.keys[row, :, self.lengths[row] :] = layer.values[row, :, self.lengths[row] :] = torch.nan
        return out

    monkeypatch.setattr(CompiledWriter, "_advance", noting)
    monkeypatch.setattr(CompiledWriter, "_forward", poisoning)
    monkeypatch.setattr("motab.compiled_writer.LEAST_SLOTS", 1)
    check_same(run(pair, tokenizer, prompts, POLICY, **sizes, torch_compile=True), expected)
    assert any(idle)
    whole = max(map(len, prompts)) + 40 + 6  # the cache
    rows, width, slots = (set(sizes) for sizes in zip(*shapes, strict=True))
    assert (rows, width) == ({2, 4, 5}, {1, 6})
    assert slots <= {8, 16, 32, whole}


def test_a_model_of_masks_is_refused(student, teacher, tokenizer, prompts):
    pair = pair_of(student, teacher, "eager")
    pair[1].set_attn_implementation("eager")
    with pytest.raises(ValueError, match="expected a model that runs on ragged_attention, got LlamaFor"):
        run(pair, tokenizer, prompts, POLICY, torch_compile=True)
    with pytest.raises(ValueError, match=r"in torch\.float64; load it with another attn_implementation or dtype"):
        run((student, teacher), tokenizer, prompts, POLICY, torch_compile=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_cuda_graphs(student, teacher, tokenizer, prompts):
    """Nothing keeps the graphs from being recorded, and what they hold is copied before they run again."""
    pair = pair_of(student, teacher, None, "cuda")
    expected = run(pair, tokenizer, prompts, POLICY, temperature=0.0)
    for _ in range(3):  # runs, records, replays
        check_same(run(pair, tokenizer, prompts, POLICY, temperature=0.0, torch_compile=True), expected)
    assert counters["inductor"]["cudagraph_skips"] == 0
