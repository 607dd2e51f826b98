"""Training on trajectories: what the loss sees, that it learns, that it resumes."""

import copy
import dataclasses
import pathlib

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, TrainerCallback

import motab
import motab_kernels as mk
from motab import distillation
from motab.config import LOSS_TYPES
from motab.models import load_model, load_with_adapters, with_lora


def trajectory(index, prompt_ids, token_ids, author):
    return motab.Trajectory(index, prompt_ids, token_ids, author, "", [], None, None, "eos")


TRAJECTORIES = [
    trajectory(0, [1, 2], [3, 4, 5, 6, 7], ["student", "flawed", "stitch", "teacher", "teacher"]),
    trajectory(1, [8], [9, 0], ["student", "student"]),
]


def config(folder, **settings):
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return motab.MotabConfig(output_dir=str(folder), **{**defaults, **settings})


def mean_cross_entropy(model, smoothing=0.0):
    """Over the tokens of both targets."""
    losses = []
    with torch.no_grad():
        for t in TRAJECTORIES:
            ids = t.prompt_ids + t.token_ids
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for place in range(len(t.prompt_ids), len(ids)):
                row = logprobs[place - 1]
                losses.append(-float((1 - smoothing) * row[ids[place]] + smoothing * row.mean()))
    return sum(losses) / len(losses)


def test_loss_by_definition(tmp_path):
    """Whatever the micro-batch."""
    model = make_model(3)
    for size, accumulation in ((2, 1), (1, 2)):
        args = config(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
        )
        trainer = motab.MotabTrainer(copy.deepcopy(model), args=args, train_dataset=TRAJECTORIES)
        trainer.train()
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert logged == pytest.approx(mean_cross_entropy(model), rel=1e-3)


def test_label_smoothing_by_definition(tmp_path):
    """As transformers smooths, over the tokens of a whole step, and without full logits."""
    model, size = make_model(3), 0.2
    args = config(tmp_path, per_device_train_batch_size=2, max_steps=1, logging_steps=1, label_smoothing_factor=size)
    trainer = motab.MotabTrainer(copy.deepcopy(model), args=args, train_dataset=TRAJECTORIES)
    assert trainer.fuses_head
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(mean_cross_entropy(model, size), rel=1e-3)


def test_no_layer_s_states_are_kept_in_mixed_precision(tmp_path, monkeypatch):
    """accelerate makes float32 copies of all that a forward pass returns."""
    returned = []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda *args, **kw: returned.append(forward(*args, **kw)) or returned[-1]
    )
    args = config(tmp_path, loss_type="jsd", max_steps=1, bf16=True)
    pair = [make_model(seed).float() for seed in (3, 4)]
    motab.MotabTrainer(*pair, args, train_dataset=TRAJECTORIES).train()
    assert [(x.hidden_states, x.logits.shape[1]) for x in returned[-2:]] == [(None, 1)] * 2


def test_the_teacher_keeps_nothing_but_its_last_hidden_states(tmp_path):
    teacher = make_model(4)
    args = config(tmp_path, loss_type="jsd", max_steps=1)
    trainer = motab.MotabTrainer(make_model(3), teacher, args, train_dataset=TRAJECTORIES)
    asked, logits = [], []
    teacher.model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    teacher.register_forward_hook(lambda *call: logits.append(call[-1].logits))
    trainer.train()
    assert [(x["use_cache"], x.get("output_hidden_states")) for x in asked] == [(False, None)]
    assert [x.shape[1] for x in logits] == [1]


@pytest.mark.parametrize(
    ("own", "finish_reasons", "expected"),
    [
        (0, ["eos", "eos"], [0, 7]),  # the last tokens are 7 and 0
        (0, ["length", "eos"], 0),
        ([5, 0], ["eos", "length"], [5, 0, 7]),
        (None, ["eos", "length"], 7),
        (None, ["length", "length"], None),
    ],
)
def test_the_saved_model_ends_where_its_trajectories_do(tmp_path, own, finish_reasons, expected):
    """A base model's end token is not that of the chat model whose text it learns."""
    model = make_model(3)
    model.generation_config.eos_token_id = own
    data = [dataclasses.replace(t, finish_reason=x) for t, x in zip(TRAJECTORIES, finish_reasons, strict=True)]
    trainer = motab.MotabTrainer(model, args=config(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    trainer.save_model()
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
def test_adapters_end_where_their_trajectories_do(tmp_path):
    """However they are loaded; those without a generation config of their own end where the model below does."""
    base, out = str(tmp_path / "base"), tmp_path / "adapters"
    make_model(3).save_pretrained(base)
    model = with_lora(load_model(base), 4, 8, 0.0, "all-linear")
    args = config(out, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = motab.MotabTrainer(model, args=args, train_dataset=TRAJECTORIES)
    trainer.train()
    trainer.save_model()

    def ends(folder):
        found = [load_model(folder), *(load_with_adapters(folder, train_them=them) for them in (True, False))]
        return [model.generation_config.eos_token_id for model in found]

    assert ends(str(out)) == ends(str(out / "checkpoint-1")) == [[0, 7]] * 3
    (out / "generation_config.json").unlink()
    assert ends(str(out)) == [0] * 3


def test_several_gpus_in_one_process(tmp_path):
    args = config(tmp_path)
    assert args.n_gpu < 2
    args._n_gpu = 2  # what transformers finds on a machine with two GPUs and no launcher
    with pytest.raises(ValueError, match=r"got 2 GPUs in one process: .* --num_processes 2 -m motab.cli train"):
        motab.MotabTrainer(make_model(3), args=args, train_dataset=TRAJECTORIES)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_learns_and_resumes(tmp_path):
    def train(folder, resume=None, stop=None):
        settings = {"save_strategy": "steps", "save_steps": 10, "learning_rate": 1e-2, "num_train_epochs": 20}
        args = config(folder, per_device_train_batch_size=1, seed=5, **settings)
        model = make_model(4)
        trainer = motab.MotabTrainer(model, args=args, train_dataset=TRAJECTORIES)
        if stop:
            trainer.add_callback(StopAt(stop))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", stop=20)
    resumed = train(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-20"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    ids = torch.tensor([TRAJECTORIES[0].prompt_ids + TRAJECTORIES[0].token_ids])
    assert whole(ids).logits[0, 1:-1].argmax(-1).tolist() == TRAJECTORIES[0].token_ids


class Checkpoints(TrainerCallback):
    """After which steps there is one, and how many there are."""

    def __init__(self):
        self.steps, self.most = [], 0

    def on_save(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        self.most = max(self.most, len(list(pathlib.Path(args.output_dir).glob("checkpoint-*"))))


@pytest.mark.parametrize(
    ("settings", "steps", "most"),
    [({}, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20], 1), ({"save_steps": 8, "save_total_limit": 2}, [8, 16, 20], 2)],
)
def test_checkpoints(tmp_path, settings, steps, most):
    args = config(tmp_path, per_device_train_batch_size=2, num_train_epochs=20, save_strategy="steps", **settings)
    seen = Checkpoints()
    motab.MotabTrainer(make_model(3), args=args, train_dataset=TRAJECTORIES, callbacks=[seen]).train()
    assert (seen.steps, seen.most) == (steps, most)


def softcapped_model(seed):
    """Gemma 2 caps its logits."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 12}
    config = AutoConfig.for_model(
        "gemma2", **sizes, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=2.0, pad_token_id=0
    )
    return AutoModelForCausalLM.from_config(config).double().eval()


def step(folder, student, teacher, size, **settings):
    """The loss and the gradient's norm that a step on both trajectories logs."""
    args = config(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2 // size,
        max_steps=1,
        logging_steps=1,
        **settings,
    )
    trainer = motab.MotabTrainer(copy.deepcopy(student), teacher, args, train_dataset=TRAJECTORIES)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return logged["loss"], logged["grad_norm"], trainer


def test_cross_entropy_makes_logits_for_some_positions_at_a_time(tmp_path, monkeypatch):
    """The loss and the gradient are those of transformers' own."""
    monkeypatch.setattr("motab.distillation.BUDGET", 2 * 12 * 24)  # two positions

    def logged(folder):
        model, lengths = make_model(3), []
        model.get_output_embeddings().register_forward_hook(lambda _, args, out: lengths.append(out.shape[-2]))
        *numbers, trainer = step(folder, model, None, 2)
        return numbers, trainer.fuses_head, max(n for n in lengths if n != 2)  # the tokens of the start

    numbers, fused, length = logged(tmp_path / "heads")
    monkeypatch.setattr("motab.trainer.has_plain_head", lambda model: False)
    expected, fused_then, length_then = logged(tmp_path / "logits")
    assert (fused, fused_then) == (True, False)
    assert (length, length_then) == (1, 7)
    assert numbers == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:1 of 2 trajectories have no token to train on")
@pytest.mark.parametrize("ignored", [[], ["student"]])
def test_no_logits_of_prompts_and_padding(tmp_path, monkeypatch, ignored):
    """The heads see what counts: of 7 targets in two rows of 7 tokens those of authors that are not ignored."""
    seen = []
    divergence, product = mk.fused_linear_divergence, distillation.linear

    def noting(student, *tensors, **settings):
        seen.append(tuple(student.shape))
        return divergence(student, *tensors, **settings)

    monkeypatch.setattr(mk, "fused_linear_divergence", noting)
    monkeypatch.setattr(distillation, "linear", lambda x, *rest: seen.append(tuple(x.shape)) or product(x, *rest))
    for name, teacher in (("jsd", make_model(4)), ("cross_entropy", None)):
        step(tmp_path / name, make_model(3), teacher, 2, loss_type=name, ignore_authors=ignored)
    assert {n for n, _ in seen} == {7 - 3 * len(ignored)}


@pytest.mark.parametrize("loss_type", ["cross_entropy", "jsd"])
@pytest.mark.parametrize("make", [make_model, softcapped_model])
def test_held_out_loss(tmp_path, loss_type, make):
    """That of a step on the same trajectories, of 4 and 2 tokens that count, before it is taken, however many are in a
    batch; of several sets by name, and as it trains."""
    student, teacher = make(3), make_model(4) if loss_type == "jsd" else None
    expected, *_ = step(tmp_path, student, teacher, 2, loss_type=loss_type, ignore_authors=["flawed"])
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(t.to_json() + "\n" for t in TRAJECTORIES))
    settings = {"loss_type": loss_type, "ignore_authors": ["flawed"], "eval_strategy": "steps", "num_train_epochs": 10}
    sets = ((TRAJECTORIES, [""], 8), (path, [""], 1), ({"a": path, "b": TRAJECTORIES}, ["a_", "b_"], 1))
    for held_out, names, size in sets:
        model, sizes = copy.deepcopy(student), {"per_device_train_batch_size": 2, "per_device_eval_batch_size": size}
        args = config(tmp_path, **sizes, learning_rate=1e-2, **settings)
        trainer = motab.MotabTrainer(model, teacher, args, train_dataset=TRAJECTORIES, eval_dataset=held_out)
        before = {name: value for name, value in trainer.evaluate().items() if name.endswith("_loss")}
        assert before == {f"eval_{name}loss": pytest.approx(expected, rel=1e-3) for name in names}
        for other in (path, TRAJECTORIES):
            assert trainer.evaluate(other)["eval_loss"] == pytest.approx(expected, rel=1e-3)
        trainer.train()
        logged = [[entry[name] for entry in trainer.state.log_history if name in entry] for name in before]
        assert all(len(losses) == 10 and losses[-1] < losses[0] for losses in logged)


@pytest.mark.parametrize(
    ("make", "make_teacher"),
    [(make_model, make_model), (softcapped_model, make_model), (make_model, softcapped_model)],
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES[1:])
def test_divergence_by_definition(tmp_path, loss_type, make, make_teacher):
    """The mean over the targets' tokens but the ignored ones, whatever the micro-batch, and its gradient."""
    student, teacher = make(3), make_teacher(4)
    own = {"jsd": {"beta": 0.3}, "skew_forward_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}}
    settings = {"loss_type": loss_type, "temperature": 1.5, "ignore_authors": ["flawed"], **own.get(loss_type, {})}
    losses = []
    for t in TRAJECTORIES:
        ids = torch.tensor([t.prompt_ids + t.token_ids])
        logits = [model(ids).logits[0] for model in (student, teacher)]
        q, p = (x.div(1.5).softmax(-1) for x in logits)
        for place, author in enumerate(t.author, len(t.prompt_ids) - 1):
            if author != "flawed":
                losses.append(divergence(loss_type, p[place].detach(), q[place]))
    expected = sum(losses) / len(losses)
    expected.backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in student.parameters() if x.grad is not None])
    student.zero_grad()
    for size in (1, 2):
        loss, grad_norm, trainer = step(tmp_path / str(size), student, teacher, size, **settings)
        assert trainer.fuses_head == (make is make_teacher)
        assert loss == pytest.approx(expected.item(), rel=1e-3)
        assert grad_norm == pytest.approx(norm.item(), rel=1e-3)


def divergence(loss_type, p, q):
    def kl(a, b):
        return (a * (a / b).log()).sum()

    m = 0.3 * p + 0.7 * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m),
        "skew_forward_kl": kl(p, 0.2 * p + 0.8 * q),
        "skew_reverse_kl": kl(q, 0.8 * p + 0.2 * q),
        "tvd": (p - q).abs().sum() / 2,
    }[loss_type]


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_counts_whole(tmp_path, drop_last):
    """Three trajectories in batches of two: one is left over, or dropped."""
    rows = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "dataloader_drop_last": drop_last}
    seen = []

    class Noting(motab.MotabTrainer):
        def compute_loss(self, model, inputs, *arguments, **settings):
            seen.append((inputs["labels"] != -100).any(1).tolist())
            return super().compute_loss(model, inputs, *arguments, **settings)

    Noting(make_model(3), args=config(tmp_path, **rows), train_dataset=[*TRAJECTORIES, TRAJECTORIES[0]]).train()
    assert seen == [[True, True], *([] if drop_last else [[True]])]


def test_a_divergence_leaves_the_teacher_as_it_is_and_closes_in_on_it(tmp_path):
    student, teacher = make_model(3), make_model(4)
    before = copy.deepcopy(teacher.state_dict())
    settings = {"loss_type": "forward_kl", "learning_rate": 1e-2, "num_train_epochs": 30, "logging_steps": 1}
    args = config(tmp_path, per_device_train_batch_size=2, **settings)
    trainer = motab.MotabTrainer(student, teacher, args, train_dataset=TRAJECTORIES)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 10
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_the_papers_settings(tmp_path):
    args = config(tmp_path)
    assert (args.learning_rate, args.num_train_epochs) == (5e-5, 6.0)
    assert args.lr_scheduler_type == "cosine_with_min_lr"
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({}, 1e-6),
        ({"learning_rate": 1e-6}, 5e-7),  # it would rise to 1e-6
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.5}}, 2.5e-5),
        ({"lr_scheduler_kwargs": '{"min_lr": 2e-5}'}, 2e-5),  # as a flag gives it
        ({"lr_scheduler_type": "linear"}, 0.0),
        ({"lr_scheduler_type": "cosine"}, 0.0),
    ],
)
def test_where_the_learning_rate_ends(tmp_path, settings, last):
    trainer = motab.MotabTrainer(make_model(3), args=config(tmp_path, **settings), train_dataset=TRAJECTORIES)
    trainer.create_optimizer_and_scheduler(8)
    rates = []
    for _ in range(8):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates += trainer.lr_scheduler.get_last_lr()[:1]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(last)
