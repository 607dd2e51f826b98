"""A step of on-policy distillation from end to end: the student writes, the teacher scores, the student learns.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_training.py

ours: `motab.MotabTrainer` on `motab.Rollouts` with `OnPolicy`; TRL: its `DistillationTrainer`, on transformers'
`generate`. Models of random weights with a vocabulary of 151936 that never end, so that both write equally many tokens,
drawn at temperature 1; the reverse KL, TRL's default. Before that both take the same greedy step with the tiny pair:
the losses and the gradients' norms must agree.
"""

import functools
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import motab
from benchmarks.timing import peak_mib, synchronise
from motab.demo import TINY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 151936
# Hidden size and layers of the student and the teacher, prompts of a step, new tokens.
STUDENT, TEACHER, PROMPTS, NEW = ((1024, 8), (2048, 16), 32, 256) if DEVICE == "cuda" else ((128, 2), (256, 4), 8, 32)


def settings(prompts):
    return {
        "max_steps": 1,
        "per_device_train_batch_size": len(prompts),
        "learning_rate": 1e-4,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
        "bf16": DEVICE == "cuda",
    }


def ours(folder, student, teacher, tokenizer, prompts, new, greedy):
    writing = {"max_new_tokens": new, "batch_size": len(prompts), "temperature": 0.0 if greedy else 1.0}
    return motab.MotabTrainer(
        student,
        teacher,
        motab.MotabConfig(folder, loss_type="reverse_kl", **settings(prompts)),
        train_dataset=motab.Rollouts(prompts, motab.OnPolicy(), **writing),
        processing_class=tokenizer,
    )


def trl(folder, student, teacher, tokenizer, prompts, new, greedy):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    writing = {"max_completion_length": new, "top_k": 1 if greedy else 0}
    return DistillationTrainer(
        student,
        teacher,
        DistillationConfig(folder, gradient_checkpointing=False, **writing, **settings(prompts)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


PROVIDERS = {"ours": ours, "TRL": trl}


def random_model(seed, sizes):
    torch.manual_seed(seed)
    hidden, layers = sizes
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    model.generation_config.eos_token_id = None
    return model


def prompts_of(count):
    question = "State the final answer to the following arithmetic problem: {} - 57 + 90 ="
    return [[{"role": "user", "content": question.format(number)}] for number in range(10, 10 + count)]


@functools.cache
def greedy_step(provider, folder):
    """What a step with the tiny pair logs."""
    pair = [motab.load_model(str(TINY / name)) for name in ("student", "teacher")]
    tokenizer = motab.load_tokenizer(str(TINY / "student"))
    trainer = PROVIDERS[provider](folder, *pair, tokenizer, prompts_of(4), 160, greedy=True)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return logged["loss"], logged["grad_norm"]


@pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing\W is deprecated:FutureWarning")  # TRL uses it
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark, provider, tmp_path_factory):
    if provider == "TRL" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    folder = str(tmp_path_factory.getbasetemp() / "training")
    assert greedy_step(provider, folder) == pytest.approx(greedy_step("ours", folder), rel=1e-3)
    student, teacher = random_model(0, STUDENT), random_model(1, TEACHER)
    tokenizer = motab.load_tokenizer(str(TINY / "student"))

    def step():
        trainer = PROVIDERS[provider](folder, student, teacher, tokenizer, prompts_of(PROMPTS), NEW, greedy=False)
        trainer.train()
        synchronise(DEVICE)

    benchmark.extra_info |= {"peak MiB": peak_mib(step, DEVICE), "tokens": PROMPTS * NEW}
    benchmark.group = f"on-policy step, {PROMPTS} prompts, {NEW} tokens each, V={V}"
    benchmark.pedantic(step, rounds=1)
