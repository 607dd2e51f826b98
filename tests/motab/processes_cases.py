"""What each of several processes runs, `rank` of `count`: training, synthesis, evaluation and the commands."""

import contextlib
import io
import os
import shutil
import time
from datetime import timedelta
from itertools import islice

import pytest
import test_synthesis
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import make_model, teacher, tokenizer
from test_cli import TASK, TINY
from test_rollouts import Kept
from test_trainer import StopAt, config, softcapped_model, trajectory
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import motab
from motab.cli import main
from motab.data import Problem
from motab.evaluation import evaluate
from motab.files import write_whole
from motab.models import load_model
from motab.sharding import uses_zero3, whole_tensors


def trajectories():
    """Eleven, of which no two processes' shares hold as many tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 12, (11, 2), generator=generator).tolist()
    ids = [[torch.randint(0, 12, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    authors = [["flawed"] + ["student"] * (len(tokens) - 1) for _, tokens in ids]
    return [trajectory(i, *pair, author) for i, (pair, author) in enumerate(zip(ids, authors, strict=True))]


def qwen(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes, **heads, pad_token_id=0)).eval()


def only_head(seed):
    """A model of which nothing else is trained."""
    model = make_model(seed).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


TRAININGS = {  # loss, student, teacher
    "cross_entropy": ("cross_entropy", make_model, None),
    "heads": ("jsd", make_model, qwen),
    "logits": ("reverse_kl", softcapped_model, make_model),
    "tied": ("forward_kl", qwen, make_model),
    "only head": ("jsd", only_head, make_model),
}


def make_models(kind):
    _, make_student, make_teacher = TRAININGS[kind]
    return make_student(3).float(), make_teacher and make_teacher(4).float()


def train(folder, count, kind, accumulation, models=None, stop=None, resume=None, **sharding):
    """Four trajectories a step, three in the epoch's last: losses, norms of the gradients, weights."""
    loss_type, *_ = TRAININGS[kind]
    args = config(
        folder,
        loss_type=loss_type,
        per_device_train_batch_size=4 // count // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        logging_steps=1,
        ignore_authors=["flawed"],
        optim="sgd",
        learning_rate=0.1,
        label_smoothing_factor=0.1 if loss_type == "cross_entropy" else 0.0,
        per_device_eval_batch_size=4 // count,
        eval_on_start=True,
        save_strategy="steps" if stop else "no",
        save_steps=2,
        **sharding,
    )
    models = models or make_models(kind)
    trainer = motab.MotabTrainer(*models, args, train_dataset=trajectories(), eval_dataset=trajectories()[:5])
    lengths = set()
    for each in filter(None, (trainer.model, trainer.teacher_model)):
        each.get_output_embeddings().register_forward_hook(lambda _, args, out: lengths.add(out.shape[-2]))
    if stop:
        trainer.add_callback(StopAt(stop))
    if not sharding:
        trainer.evaluate()  # after which a training is still one of both processes
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.fuses_head == (kind != "logits")
    assert (max(lengths) <= 2) == trainer.fuses_head  # the two tokens of the start; else no full logits
    logged = [(entry["eval_loss"], 0.0) for entry in trainer.state.log_history if "eval_loss" in entry]
    logged += [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.model
    if sharding:
        for each in filter(None, (model, trainer.teacher_model)):  # of each weight a process holds its part
            shared = {isinstance(x, DTensor) or (hasattr(x, "ds_tensor") and not len(x)) for x in each.parameters()}
            assert shared == {"fsdp" in sharding or uses_zero3(trainer.accelerator)}
        trainer.save_model()
        torch.distributed.barrier()  # the main process saves
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else only that reads, in transformers 5.17
        unset_hf_deepspeed_config()  # else each reads its part
        model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.tensor(logged), {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_in_halves(folder, count, pairs=(None, None), **sharding):
    """With an end within an epoch."""
    train(folder, count, "heads", 2, pairs[0], stop=2, **sharding)
    return train(folder, count, "heads", 2, pairs[1], resume=True, **sharding)


def train_sharded(folder, count, rank):
    """By FSDP2, which accelerate uses on accelerators alone: it is told that this is one. The last that a process does,
    since transformers leaves its settings in the environment."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    sharding = {"fsdp": True, "fsdp_config": {"version": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        found = {kind: train(folder / kind, count, kind, 2, **sharding) for kind in TRAININGS}
        # As launchers are told by default, only the main process's weights count: others need not have read any.
        models = [make(seed + 9 * rank).float() for make, seed in zip(TRAININGS["heads"][1:], (3, 4), strict=True)]
        sharding["fsdp_config"]["cpu_ram_efficient_loading"] = True
        found["read once"] = train(folder / "read once", count, "heads", 2, models, **sharding)
        found["rollouts"] = train_few(folder / "rollouts", rollouts(), count, steps=2, seed=1 + 9 * rank, **sharding)
    return found


PROMPTS = [[1, 2], [3], [4, 5, 6], [7]]


def rollouts():
    policy = motab.MotabPolicy(epsilon0=0.5, delimiter=".")
    return Kept(PROMPTS, policy, max_new_tokens=9, temperature=1.0)


def few(seed=1):
    student = make_model(seed).float()
    return student, teacher.__wrapped__(student).float()


def train_few(folder, data, count=1, steps=1, seed=1, pair=None, **settings):
    """Steps of four trajectories, given or written by both processes: what this one wrote, and the weights."""
    args = config(
        folder,
        loss_type="reverse_kl",
        max_steps=steps,
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=4 // count,
        **settings,
    )
    pair = pair or few(seed)
    trainer = motab.MotabTrainer(*pair, args, train_dataset=data, processing_class=tokenizer.__wrapped__())
    trainer.train()
    weights = zip(trainer.model.state_dict(keep_vars=True), whole_tensors(trainer.model), strict=True)
    return getattr(data, "kept", []), {name: x.detach().clone() for name, x in weights}


def mixture():
    """Of eleven given ones: of the last four rows of an epoch one is a repeat where two processes share them."""
    given = motab.TrajectoryDataset(trajectories())
    return Kept(given, motab.OnPolicy(), max_new_tokens=9, temperature=1.0, lmbda=0.5)


def write(path, prompts=test_synthesis.PROMPTS, **changes):
    student = make_model(1).float()
    models = student, teacher.__wrapped__(student).float(), tokenizer.__wrapped__()
    settings = {**test_synthesis.SETTINGS, **changes}
    return motab.synthesize_to_file(path, *models, prompts, policy=test_synthesis.POLICY, **settings)


def write_together(path):
    """With a teacher of which each process holds a part."""
    student = make_model(1).float()
    name = path.parents[1] / "teacher"
    teacher.__wrapped__(student).float().save_pretrained(name)  # in the main process alone
    torch.distributed.barrier()
    other = load_model(str(name), shared=True)
    assert isinstance(other.model.layers[0].mlp.up_proj.weight, DTensor)
    settings = test_synthesis.SETTINGS
    prompts, policy = test_synthesis.PROMPTS, test_synthesis.POLICY
    return motab.synthesize_to_file(path, student, other, tokenizer.__wrapped__(), prompts, policy=policy, **settings)


def message(call, *arguments, **settings):
    try:
        call(*arguments, **settings)
    except ValueError as error:
        return str(error)


def measure(file):
    problems = [Problem(text, answer, {}) for text, answer in (("ab.", "1"), ("c,a", "2"), ("b", "3"))]
    model = make_model(1).float()
    settings = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 9}
    return [
        evaluate(model, tokenizer.__wrapped__(), problems[:size], answers_file=file.with_suffix(f".{size}"), **settings)
        for size in (3, 1)
    ]


def commands(folder, rank):
    """What the commands print; each process names files of its own, where it may."""
    pair = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", str(TINY / "teacher")]
    task = ["--dataset_name", TASK, "--max_new_tokens", "40"]
    file, model = folder / "commands" / "trajectories.jsonl", folder / f"model-{rank}"
    training = ["--train_file", str(file), "--loss_type", "jsd", "--num_train_epochs", "1", "--report_to", "none"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["synthesize", *pair, *task, "--num_samples", "2", "--output_dir", str(file.parent)]) == 0
        train = ["train", *pair, *training, "--output_dir", str(model)]
        assert main(train) == 0
        assert main(train) == 0  # as the main process finds in its own folder, for all
        with contextlib.redirect_stderr(printed):
            assert main([*train, "--seed", "5"]) == 2
        figures = ["--output_file", str(folder / f"figures-{rank}.json")]
        assert main(["evaluate", *pair[:2], *task, *figures]) == 0
    return printed.getvalue()


def join(rank, count, folder, **settings):
    """What a launcher and accelerate do."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, count, count)), strict=True))
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count, **settings)


def fail_in_one(rank, count, folder):
    folder = folder / "failed"
    folder.mkdir(exist_ok=True)
    join(rank, count, folder)
    for t in write(folder / "t.jsonl"):
        if t.index == 40:
            raise RuntimeError("out of memory")


class SlowInOne(Kept):
    """As where one process has long texts to write, and another none."""

    def write(self, *arguments, **settings):
        time.sleep(9 * torch.distributed.get_rank())
        return super().write(*arguments, **settings)


def wait_for_one(rank, count, folder):
    """Longer than a collective operation may take, 30 minutes by default."""
    folder = folder / "slow"
    folder.mkdir(exist_ok=True)
    join(rank, count, folder, timeout=timedelta(seconds=6))
    _, weights = train_few(folder, SlowInOne(PROMPTS, motab.OnPolicy(), max_new_tokens=9), count)
    torch.save(weights, folder / f"{rank}.pt")


def process_main(rank, count, folder):
    if count > 1:
        join(rank, count, folder)
    found = {}  # synthesis first: transformers' arguments tell accelerate of the CPU as well
    cut, begun = (folder / name / "t.jsonl" for name in ("cut", "begun"))
    found["whole"] = [t.index for t in write(folder / f"by {count}" / "t.jsonl")]
    found["other settings"] = message(write, folder / f"by {count}" / "t.jsonl", seed=4)
    found["bad prompt"] = message(write, folder / "bad" / "t.jsonl", [[]])
    found["evaluation"] = measure(folder / f"answers by {count} in {rank}.jsonl")
    found |= {(kind, n): train(folder / "train", count, kind, n) for kind in TRAININGS for n in (1, 2)}
    settings = {"gradient_accumulation_steps": 3, "save_rollouts": True}
    found["mixture"] = train_few(folder / f"mixture by {count}", mixture(), count, steps=2, **settings)
    found["resumed"] = train_in_halves(folder / f"resumed by {count}", count)
    if count > 1:
        found["cut"] = [t.index for t in islice(write(cut), (40, 20)[rank])]
        torch.distributed.barrier()
        if rank == 0:  # what one process leaves that is killed
            content = (folder / "by 2" / "t.jsonl").read_bytes()
            settings = (folder / "by 2" / "t.jsonl.settings.json").read_text()
            write_whole(begun.with_name("t.jsonl.settings.json"), settings)
            begun.write_bytes(content[: len(content) // 2])
            shutil.copytree(cut.parent, folder / "cut for two")
        torch.distributed.barrier()
        found["begun"] = [t.index for t in write(begun)]
        found["cut for two"] = [t.index for t in write(folder / "cut for two" / "t.jsonl")]
        found["few"] = [t.index for t in write(folder / "few" / "t.jsonl", test_synthesis.PROMPTS[:1])]
        found["together"] = [t.index for t in write_together(folder / "together" / "t.jsonl")]
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(folder / "together", folder / "together again")
            lines = (folder / "together" / "t.jsonl").read_bytes().splitlines(keepends=True)
            (folder / "together again" / "t.jsonl").write_bytes(b"".join(lines[:20] + lines[64:]))
        torch.distributed.barrier()
        found["together again"] = [t.index for t in write_together(folder / "together again" / "t.jsonl")]
        found["afresh"] = train_few(folder / "afresh", rollouts(), count)
        found["afresh, twice"] = train_few(folder / "twice", rollouts(), count, steps=2)
        found["printed"] = commands(folder, rank)
        found["sharded"] = train_sharded(folder / "sharded", count, rank)
    else:
        found["cut"] = [t.index for t in write(cut)]
    torch.save(found, folder / f"{count}-{rank}.pt")
