"""The losses with a vocabulary that two ranks share, and with the whole of it: what a rank runs, and writes down."""

import math
import types
from functools import partial

import pytest
import torch
from divergence_cases import BACKENDS, KINDS, logits, options
from forks import RANKS
from torch.distributed.fsdp import fully_shard

import motab_kernels as mk
from motab_kernels import interop
from motab_kernels.backend import HAS_TRITON
from motab_kernels.vocab_parallel import SlicedVocabulary

INF, NAN = math.inf, math.nan
WIDTH = 70  # columns a rank: with `settings`, a split and a part of one


def logit_cases():
    """Name to both sides' logits, the keywords, and what the positions' losses are worth."""
    student, teacher = logits(2, 2, RANKS * WIDTH, seed=1)
    mask = torch.tensor([[True, False], [True, True]])
    tau, weights = torch.tensor([0.7, 2.0]), torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    masked = student.clone()
    masked[~mask] = NAN  # whose sums hold anything
    shared = {"mask": mask, "weights": weights, "temperature": tau}

    odd_student, odd_teacher = logits(5, RANKS * WIDTH, seed=2)
    odd_student[0, WIDTH:], odd_teacher[0, WIDTH:] = -INF, -INF  # nothing on rank 1
    odd_teacher[1, :WIDTH] = -INF  # nothing of the teacher's on rank 0
    odd_student[2, 3] = -INF
    odd_student[3, WIDTH + 5] = NAN
    tau_of_odd = torch.tensor([0.6, 0.6, 1.0, 1.0, 3.0])
    upstream = torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0])
    low = masked - 300, teacher - 300  # next to which a maximum of 0 would be all
    return {
        "options": ((masked, teacher), shared | {"vocab_size": WIDTH + 30}, None),
        "no column on rank 1": (low, shared | {"vocab_size": WIDTH - 20, "reduction": "sum"}, None),
        "odd rows": ((odd_student, odd_teacher), {"temperature": tau_of_odd, "reduction": "none"}, upstream),
    }


def head_cases():
    """Name to the student's hidden states, weight and bias, the teacher's, the keywords, and the losses' worth."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    student = random(4, 2, 12), random(RANKS * WIDTH, 12) * 0.6, random(RANKS * WIDTH) * 0.3
    teacher = random(4, 2, 20), random(RANKS * WIDTH, 20) * 0.5, random(RANKS * WIDTH) * 0.3
    mask = torch.tensor([[1, 0], [1, 1], [1, 1], [0, 1]]).bool()
    shared = {"mask": mask, "weights": torch.rand(4, 2, generator=generator), "chunk_size": 3}
    caps = {"student_logit_scale": 0.7, "teacher_logit_scale": 1.2, "student_softcap": 3.0, "teacher_softcap": 5.0}
    tau = {"temperature": torch.tensor([0.7, 1.9, 1.0, 1.3])}
    upstream = random(4, 2)
    return {
        "mean": ((*student, *teacher), shared | caps | tau | {"vocab_size": WIDTH + 30}, None),
        "none": ((*student, *teacher), shared | tau | {"vocab_size": WIDTH - 20, "reduction": "none"}, upstream),
    }


def of_logits(case, kind, backend, columns, **keywords):
    """The loss and the gradient of a slice of the logits; all of them, without `group`."""
    (student, teacher), settings, upstream = logit_cases()[case]
    leaf = student[..., columns].clone().requires_grad_()
    loss = mk.divergence_loss(leaf, teacher[..., columns], **options(kind), **settings, backend=backend, **keywords)
    loss.backward(upstream)
    return loss.detach(), leaf.grad


def of_heads(case, kind, backend, columns, frozen=(), **keywords):
    """The loss and the gradients by hidden states, weight and bias."""
    (hidden, weight, bias, *teacher), settings, upstream = head_cases()[case]
    leaves = [hidden.clone(), weight[columns].clone(), bias[columns].clone()]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i not in frozen)
    settings = options(kind) | settings | {"teacher_bias": teacher[2][columns], "backend": backend} | keywords
    loss = mk.fused_linear_divergence(*leaves[:2], teacher[0], teacher[1][columns], student_bias=leaves[2], **settings)
    loss.backward(upstream)
    return loss.detach(), *(x.grad for x in leaves)


#: Triton's interpreter is slow, and of the heads each backend sees logits.
CALLS = [
    *((of_logits, case, backend) for case in logit_cases() for backend in BACKENDS),
    *(
        (of_heads, case, backend)
        for case in head_cases()
        for backend in BACKENDS
        if (case, backend) != ("none", "triton")
    ),
]


def every_call(op):
    return pytest.mark.parametrize(("case", "backend"), [call[1:] for call in CALLS if call[0] is op])


def rank_main(rank, count, folder):
    if HAS_TRITON:
        from conftest import round_as_a_gpu_rounds

        from motab_kernels.gpu import divergence as gpu

        round_as_a_gpu_rounds(pytest.MonkeyPatch())
        gpu.settings_for = lambda device: gpu.Settings(lanes=2, tiles=2, rows=4)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    group = torch.distributed.new_group(range(count))
    columns, whole = slice(rank * WIDTH, (rank + 1) * WIDTH), slice(None)
    found = {"alone": {}}
    for op, case, backend in CALLS:
        for i, kind in enumerate(KINDS):
            found[case, kind, backend] = op(case, kind, backend, columns, group=group)
            if i % RANKS == rank:  # one of them is enough
                found["alone"][case, kind, backend] = op(case, kind, backend, whole)
    for name, call in RANK_CALLS.items():
        found[name] = call(group, rank, columns)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def collectives(group, rank, columns):
    """How many all-gathers and all-reduces the two passes take, now that the ranks know that they agree."""
    counts, calls, names = {}, [], ("all_gather", "all_reduce")

    def counted(name, original, *arguments, **keywords):
        calls.append(name)
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.distributed, name, partial(counted, name, getattr(torch.distributed, name)))
        for kind in KINDS:
            for op, case in ((of_logits, "options"), (of_heads, "mean")):
                calls.clear()
                op(case, kind, "torch", columns, group=group)
                counts[case, kind] = tuple(calls.count(name) for name in names)
    return counts


def different_widths(group, rank, columns):
    """Slices of 90 and 50 columns."""
    part = slice(0, 90) if rank == 0 else slice(90, None)
    student, teacher = logits(3, 140, seed=4)
    leaf = student[:, part].clone().requires_grad_()
    loss = mk.divergence_loss(leaf, teacher[:, part], divergence="jsd", group=group)
    loss.backward()
    return loss.detach(), leaf.grad, of_heads("none", "jsd", "torch", part, group=group, vocab_size=None)


def over_the_logits(group, rank, columns):
    student, teacher = logits(3, 140, seed=5)
    leaf = student[:, columns].clone().requires_grad_()
    head = leaf * 1
    mk.divergence_loss(head, teacher[:, columns], inplace_backward=True, vocab_size=100, group=group).backward()
    return head.detach(), leaf.grad


def frozen_head(group, rank, columns):
    return of_heads("mean", "skew_forward_kl", "torch", columns, frozen=(1, 2), group=group)


def bfloat16_heads():
    """Hidden states and weight of the student, then of the teacher."""
    generator = torch.Generator().manual_seed(6)
    shapes = ((64, 64), (1000, 64), (64, 64), (1000, 64))
    return [(torch.randn(shape, generator=generator) * 0.3 ** (len(shape) > 1)).bfloat16() for shape in shapes]


def no_column(group, rank, columns):
    """Kernels that nobody may call."""
    kernels = SlicedVocabulary(types.SimpleNamespace(finish=None), group.group_name)
    empty = torch.empty(2, 3, 0, dtype=torch.bfloat16)
    saved = torch.ones(6, 6)
    kernels.divergence_gradient(empty, empty, None, saved, torch.ones(6), "jsd", 0.5, empty)
    sums = kernels.divergence_sums(empty, empty, None, None, "jsd")
    return sums, kernels.divergence_terms(empty, empty, None, None, saved, "jsd", 0.5)


def low_precision(group, rank, columns):
    hidden, weight, *teacher = bfloat16_heads()
    part = slice(rank * 500, (rank + 1) * 500)
    leaf = hidden.requires_grad_()
    mk.fused_linear_divergence(leaf, weight[part], teacher[0], teacher[1][part], chunk_size=16, group=group).backward()
    return leaf.grad


def compiled(group, rank, columns):
    student, teacher = (x[:, columns] for x in logits(3, 140, seed=7))

    def loss(x):
        return mk.divergence_loss(x * 2, teacher, divergence="tvd", vocab_size=110, group=group)

    results = []
    for call in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):  # not what the other has agreed on
        leaf = student.clone().requires_grad_()
        value = call(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    return results


def head_of_trl():
    """Hidden states of each rank and a weight, of student and teacher."""
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(*shape, generator=generator) for shape in ((2, 5, 6), (9, 6)) * 2]


def sharded_head(group, rank, columns):
    """Of TRL's loss: FSDP2's DTensor, on which the ranks' own positions depend."""
    hidden, weight, teacher_hidden, teacher_weight = head_of_trl()
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu")
    shards = torch.distributed.tensor.distribute_tensor(weight, mesh, [torch.distributed.tensor.Shard(0)])
    shards.requires_grad_()
    of_rank = hidden[rank : rank + 1], teacher_hidden[rank : rank + 1]
    loss, *_ = interop.trl.chunked_divergence_loss(*of_rank, shards, teacher_weight, torch.ones(1, 5), 0.5)
    loss.backward()
    return loss.detach(), shards.grad.full_tensor()


class Model(torch.nn.Module):
    """Its forward pass leaves the head to the loss."""

    def __init__(self, weight):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 9, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(6))
            self.head.weight.copy_(weight)

    def forward(self, x):
        return self.body(x)


def unsharded_head(group, rank, columns):
    """Of FSDP2, whose ranks have positions of their own: the loss, and the gradients of body and head."""
    hidden, weight, teacher_hidden, teacher_weight = head_of_trl()
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu")
    model = fully_shard(Model(weight), mesh=mesh, reshard_after_forward=True)
    states = model(hidden[rank])
    model.unshard()
    loss = mk.fused_linear_divergence(states, model.head.weight, teacher_hidden[rank], teacher_weight)
    loss.backward()
    return loss.detach(), *(x.grad.full_tensor() for x in model.parameters())


def messages(group, rank, columns):
    """Of the errors; every rank must come out of every call."""

    def message(call, *arguments, **keywords):
        try:
            call(*arguments, **keywords)
        except ValueError as error:
            return str(error)

    student, teacher = logits(4, 70)
    hidden = torch.ones(7, 4, requires_grad=True)
    bad = torch.ones(7, 4)
    bad[1] = NAN
    narrow = slice(0, 70 - rank)
    linear = mk.fused_linear_divergence
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu")
    shards = torch.distributed.tensor.distribute_tensor(bad, mesh, [torch.distributed.tensor.Shard(0)])
    return {
        "sharded weight": message(linear, bad, shards, bad, bad),
        "sharded logits": message(mk.divergence_loss, bad, shards),
        "not a group": message(mk.divergence_loss, student, teacher, group="tp"),
        "sides": message(mk.divergence_loss, student, teacher[:, :60], group=group),
        "heads": message(linear, bad, torch.ones(9, 4), bad, torch.ones(8, 4), group=group),
        "width": message(mk.divergence_loss, student[:, narrow], teacher[:, narrow], vocab_size=99, group=group),
        "vocab_size": message(mk.divergence_loss, student, teacher, vocab_size=80 + rank, group=group),
        "chunk_size": message(linear, bad, torch.ones(9, 4), bad, torch.ones(9, 4), chunk_size=4 + rank, group=group),
        # A chunk with NaN, of which rank 1 has no column, and a chunk after it.
        "check_finite": message(
            linear,
            *(hidden, torch.ones(9, 4), bad, torch.ones(9, 4)),
            **{"vocab_size": 9, "chunk_size": 3, "check_finite": True, "group": group},
        ),
    }


RANK_CALLS = {
    call.__name__: call
    for call in (
        collectives,
        different_widths,
        over_the_logits,
        frozen_head,
        no_column,
        low_precision,
        compiled,
        sharded_head,
        unsharded_head,
        messages,
    )
}
