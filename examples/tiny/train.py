"""Train the tiny teacher and the tiny student of this folder from scratch, on the CPU, from one seed.

    python examples/tiny/train.py

The task is reasoning-gym's `chain_sum`, 4 to 6 two-digit terms. Training problems come from a generator with
the same distribution; every accuracy is on reasoning-gym's own problems, scored by it.
"""

import argparse
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measure import DELIMITER, SEED, TEMPERATURE, accuracy, generate, held_out, table, table_row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VALIDATION_SEED = 1_000_000
BATCH, PEAK_LR, WARMUP = 32, 2e-3, 50
TEACHER_CYCLES = ((1000, 2e-3), (1200, 2e-3), (1200, 1e-3))  # steps and peak rate: cosines, each to zero
STUDENT_STEPS = 3000
STOP_ACCURACY, STOP_EVERY = 0.5, 50  # the student stops at the first check where greedy accuracy reaches this
GAIN_PROMPTS, GAIN_BATCH = 5120, 64  # --gain_lr: fresh solutions by the teacher, one epoch
TEACHER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 288}

# A user's message is its text and a newline; an answer ends with the end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
# Digits stand alone, an operator takes the spaces around it, the rest is split as in Qwen's tokenizer.
PRE_TOKEN = r"\p{N}| [+=-] | ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Model, Tokens = Qwen3ForCausalLM, PreTrainedTokenizerFast
Batch = tuple[torch.Tensor, torch.Tensor]


class Problem(NamedTuple):
    question: str
    solution: str
    answer: str


def solve(terms: list[int]) -> str:
    """The written solution: the tens of a term, then its units, a line each; last the answer in a box."""
    total, lines = terms[0], []
    for term in terms[1:]:
        sign = -1 if term < 0 else 1
        for part in (abs(term) // 10 * 10, abs(term) % 10):
            lines.append(f"{total} {'-' if term < 0 else '+'} {part} = {total + sign * part}{DELIMITER}")
            total += sign * part
    return "".join(lines) + f"The answer is \\boxed{{{total}}}."


def make_problems(rng: np.random.Generator, count: int) -> list[Problem]:
    """Draw problems as chain_sum does: uniform number of terms, operands and signs."""
    lengths = rng.integers(4, 7, count)
    values = rng.integers(10, 100, (count, 6)) * rng.choice([-1, 1], (count, 6))
    values[:, 0] = abs(values[:, 0])
    problems = []
    for length, row in zip(lengths.tolist(), values.tolist(), strict=True):
        terms = row[:length]
        expression = str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])
        question = f"State the final answer to the following arithmetic problem: {expression} ="
        problems.append(Problem(question, solve(terms), str(sum(terms))))
    return problems


def make_tokenizer() -> Tokens:
    """Byte-level BPE over all 256 bytes plus the words of the task and of the revise phrase."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = make_problems(np.random.default_rng(SEED), 100)
    corpus = [f"{p.question}\n{p.solution}" for p in problems] + ["However,\n\n"] * 100
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: Tokens, sizes: dict[str, int]) -> Model:
    """A freshly initialised Qwen3 of the given sizes."""
    torch.manual_seed(SEED)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {"head_dim": 32, "num_key_value_heads": sizes["num_attention_heads"], **sizes}
    common = {"max_position_embeddings": 512, "tie_word_embeddings": True, "dtype": "float32"}
    model = Model(Qwen3Config(vocab_size=len(tokenizer), bos_token_id=None, **ends, **shape, **common))
    model.generation_config = GenerationConfig(**ends)
    return model


def make_batch(tokenizer: Tokens, problems: list[Problem]) -> Batch:
    """Right-padded token ids and labels (B, T); only the solution and its end token are labelled."""
    prompts = tokenizer([p.question + "\n" for p in problems])["input_ids"]
    solutions = tokenizer([p.solution + tokenizer.eos_token for p in problems])["input_ids"]
    width = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
    ids = torch.full((len(problems), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        ids[row, :end] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : end] = torch.tensor(solution)
    return ids, labels


def fresh_batches(tokenizer: Tokens, rng: np.random.Generator) -> Iterator[Batch]:
    """Endless batches of new problems, each batch of similar lengths so that little of it is padding."""
    while True:
        pool = sorted(make_problems(rng, 32 * BATCH), key=lambda p: len(p.question) + len(p.solution))
        for index in rng.permutation(32).tolist():
            yield make_batch(tokenizer, pool[index * BATCH : (index + 1) * BATCH])


def train(
    model: Model,
    batches: Iterator[Batch],
    steps: int,
    schedule: Callable[[int], float],
    done: Callable[[int], bool] = lambda step: False,
) -> None:
    """Cross-entropy with AdamW for `steps` batches, or until `done(step)`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    start = time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
        if done(step):
            return


def cosine(peak: float, steps: int, warm: int) -> Callable[[int], float]:
    """Linear warm-up over `warm` steps, then a cosine to zero at `steps`."""
    return lambda step: peak * min(step / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_teacher(tokenizer: Tokens) -> Model:
    """Trained to the end of its last cycle."""
    model = make_model(tokenizer, TEACHER)
    for cycle, (steps, peak) in enumerate(TEACHER_CYCLES):
        batches = fresh_batches(tokenizer, np.random.default_rng([SEED, 1, cycle] if cycle else [SEED, 1]))
        train(model, batches, steps, cosine(peak, steps, WARMUP))
    return model


def train_student(tokenizer: Tokens) -> Model:
    """Stopped half way up its learning curve, at a constant rate: right steps, often a wrong end."""
    model = make_model(tokenizer, STUDENT)
    problems = held_out(VALIDATION_SEED)
    questions = [problem["question"] for problem in problems]

    def good_enough(step: int) -> bool:
        if step % STOP_EVERY:
            return False
        reached = accuracy(problems, generate(model, tokenizer, questions, 0.0).texts(tokenizer))
        print(f"  step {step:5d}  validation accuracy {reached:.3f}", flush=True)
        return reached >= STOP_ACCURACY

    batches = fresh_batches(tokenizer, np.random.default_rng([SEED, 2]))
    train(model, batches, STUDENT_STEPS, lambda step: PEAK_LR * min(step / WARMUP, 1.0), good_enough)
    return model


def save(model: Model, folder: Path) -> None:
    """Write beside the folder, then rename into place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    make_tokenizer().save_pretrained(temporary)  # a new one: a used one would save its padding too
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def check_gain(tokenizer: Tokens, folder: Path, rates: list[float]) -> None:
    """What one epoch over fresh solutions by the teacher, by cross-entropy, does to the student."""
    teacher = Qwen3ForCausalLM.from_pretrained(folder / "teacher")
    problems = make_problems(np.random.default_rng([SEED, 3]), GAIN_PROMPTS)
    torch.manual_seed(SEED)
    texts = []
    for at in range(0, GAIN_PROMPTS, 256):
        questions = [problem.question for problem in problems[at : at + 256]]
        texts += generate(teacher, tokenizer, questions, TEMPERATURE).texts(tokenizer)
    taught = [problem._replace(solution=text) for problem, text in zip(problems, texts, strict=True)]
    steps = GAIN_PROMPTS // GAIN_BATCH
    for rate in rates:
        student = Qwen3ForCausalLM.from_pretrained(folder / "student")
        chunks = (taught[at : at + GAIN_BATCH] for at in range(0, GAIN_PROMPTS, GAIN_BATCH))
        train(student, (make_batch(tokenizer, chunk) for chunk in chunks), steps, cosine(rate, steps, 5))
        print(table_row(f"student + {steps} steps, lr {rate:g}", student, teacher, tokenizer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--train", nargs="*", choices=["teacher", "student"], default=["teacher", "student"])
    parser.add_argument("--gain_lr", nargs="*", type=float, default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    for name in arguments.train:
        print(name, flush=True)
        start = time.time()
        model = train_teacher(tokenizer) if name == "teacher" else train_student(tokenizer)
        print(f"{name} trained in {time.time() - start:.0f} s", flush=True)
        save(model, arguments.output_dir / name)

    print(table(arguments.output_dir))
    if arguments.gain_lr:
        check_gain(tokenizer, arguments.output_dir, arguments.gain_lr)


if __name__ == "__main__":
    main()
