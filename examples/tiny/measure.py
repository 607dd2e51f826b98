"""Measure the tiny teacher and student of this folder on reasoning-gym's own problems.

python examples/tiny/measure.py
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import reasoning_gym
import torch
from reasoning_gym.dataset import ProceduralDataset
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SEED, TEST_SEED, HELD_OUT = 0, 2_000_000, 500
DELIMITER = ".\n\n"
EPSILON0, THETA, TEMPERATURE, MAX_NEW_TOKENS = (0.2, 0.5), 1.0, 0.6, 160

Model, Tokens = Qwen3ForCausalLM, PreTrainedTokenizerFast


class Written(NamedTuple):
    """Left-padded prompts with what a model wrote (B, T), their mask (B, T), and where the writing starts."""

    ids: torch.Tensor
    mask: torch.Tensor
    start: int

    def texts(self, tokenizer: Tokens) -> list[str]:
        return tokenizer.batch_decode(self.ids[:, self.start :], skip_special_tokens=True)


def held_out(seed: int) -> ProceduralDataset:
    """reasoning-gym's own problems; it draws problem i from seed + i, so seeds must lie HELD_OUT apart."""
    sizes = {"min_terms": 4, "max_terms": 6, "min_digits": 2, "max_digits": 2}
    return reasoning_gym.create_dataset("chain_sum", **sizes, seed=seed, size=HELD_OUT)


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokens,
    questions: list[str],
    temperature: float,
) -> Written:
    """Let the model answer, greedily at temperature 0."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        **sampling,
    )
    start = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], (ids[:, start:] != tokenizer.pad_token_id).long()], 1)
    return Written(ids, mask, start)


def accuracy(problems: ProceduralDataset, texts: list[str]) -> float:
    """Share of texts whose last box holds the right answer, by the data set's own scorer."""
    right = 0
    for problem, text in zip(problems, texts, strict=True):
        boxes = re.findall(r"\\boxed\{(.*?)\}", text)
        right += problems.score_answer(boxes[-1] if boxes else None, problem) == 1.0
    return right / len(texts)


def step_ends(tokenizer: Tokens, tokens: list[int]) -> list[int]:
    """Ends (exclusive) of the steps of one solution; a step's tokens include its delimiter."""
    text, ends = "", []
    for position, token in enumerate(tokens):
        seen = text.count(DELIMITER)
        text += tokenizer.decode([token])
        if text.count(DELIMITER) > seen or position == len(tokens) - 1:
            ends.append(position + 1)
    return ends


@torch.no_grad()
def breach_rate(teacher: Model, tokenizer: Tokens, written: Written, epsilon0: float) -> float:
    """Share of rows with a step whose value V falls below epsilon0 * exp(-THETA * H) under the teacher."""
    ids, mask, start = written
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = teacher(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logprobs = logits[:, start - 1 : -1].log_softmax(-1)  # what the teacher expects of each written token
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    chosen = logprobs.gather(-1, ids[:, start:, None]).squeeze(-1)
    breached = 0
    for row, length in enumerate(mask[:, start:].sum(1).tolist()):
        begin, strays = 0, False
        for end in step_ends(tokenizer, ids[row, start : start + length].tolist()):
            value = chosen[row, begin:end].mean().exp()
            strays |= not bool(value >= epsilon0 * torch.exp(-THETA * entropy[row, begin]))
            begin = end
        breached += strays
    return breached / len(ids)


def table_row(name: str, model: Model, teacher: Model, tokenizer: Tokens) -> str:
    """Parameters, accuracies and breach rates, on problems that no training or stopping rule saw."""
    problems = held_out(TEST_SEED)
    torch.manual_seed(SEED)
    questions = [problem["question"] for problem in problems]
    greedy, sample = (generate(model, tokenizer, questions, heat) for heat in (0.0, TEMPERATURE))
    shares = [accuracy(problems, written.texts(tokenizer)) for written in (greedy, sample)]
    shares += [breach_rate(teacher, tokenizer, sample, epsilon0) for epsilon0 in EPSILON0]
    cells = [f"{x:.3f} ± {math.sqrt(x * (1 - x) / HELD_OUT):.3f}" for x in shares]
    return f"| {name} | {sum(p.numel() for p in model.parameters()):,} | {' | '.join(cells)} |"


def table(folder: Path) -> str:
    """The saved pair as a Markdown table."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "teacher")
    teacher, student = (Qwen3ForCausalLM.from_pretrained(folder / name) for name in ("teacher", "student"))
    rates = " | ".join(f"breach, epsilon0 {epsilon0}" for epsilon0 in EPSILON0)
    head = f"| model | parameters | greedy | T = {TEMPERATURE} | {rates} |\n|{' --- |' * 6}"
    pair = (("teacher", teacher), ("student", student))
    return "\n".join([head, *(table_row(name, model, teacher, tokenizer) for name, model in pair)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(Path(__file__).parent))
