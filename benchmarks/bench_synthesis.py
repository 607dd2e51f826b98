"""Monitored generation from end to end on the tiny pair: ours, the usual ways, and no monitoring.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_synthesis.py

The demo's problems, greedy, at most 160 new tokens, 1 and 32 trajectories at a time, on one thread. The providers:

- ours: `motab.synthesize` with `MotabPolicy`; compiled: the same with ``torch_compile``, after its compilation.
- sent anew: the same trajectories, made as in the paper's pipeline: one at a time whatever the batch, no cache kept
  between steps, the whole context sent for each, the teacher asked twice a step. By plain `generate` and forward
  passes in this process, so without the cost of a server.
- ours, no teacher: `OnPolicy`; it writes the same as `generate`, and shows the cost of the engine.
- generate: transformers' `generate` on the student. "generate, then score" adds a forward pass of the teacher over the
  text. Without interventions their text differs from ours after a breach: a lower bound of the cost of monitoring.

The larger teacher has four times as many layers, of which the added ones change nothing, so that it writes the same
text: there, ours is raced against itself without speculation, the teacher writing alone after a takeover. Under
`TeacherOnly`, where it writes everything, ours has a student that drafts, and "ours, no student" has none.

Each provider's text is compared token by token before it is timed. Texts differ in length and number, so the report's
ratios are of the time per token that a model wrote, which excludes the stitched phrase.
"""

import copy
import functools
import itertools
import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from transformers import StoppingCriteria

import motab
from benchmarks.timing import synchronise
from motab.data import load_problems
from motab.demo import TASK, TINY, TRAIN_SEED
from motab.models import load_model, load_tokenizer
from motab.speculation import Plan, Speculation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = motab.MotabPolicy(epsilon0=0.2, theta=1.0)
NEW = 160
MANY, FEW = 32, 8  # prompts: in a batch, and where there is one at a time; 2 of the 8 breach, 9 of the 32


class Pair:
    """Both models, the teacher with `depth` times its layers, their tokenizer and the demo's first prompts as ids."""

    def __init__(self, depth=1):
        self.student, self.teacher = (load_model(str(TINY / name)) for name in ("student", "teacher"))
        deepen(self.teacher, depth)
        self.tokenizer = load_tokenizer(str(TINY / "student"))
        problems = load_problems(f"reasoning-gym:{TASK}&size={MANY}&seed={TRAIN_SEED}")
        self.prompts = [
            self.tokenizer.apply_chat_template(p.messages(), add_generation_prompt=True, return_dict=False)
            for p in problems
        ]


def deepen(model, depth):
    """Add layers that add 0 to what they get."""
    config, layers = model.config, model.model.layers
    for layer in list(layers) * (depth - 1):
        idle = copy.deepcopy(layer)
        idle.self_attn.config, idle.self_attn.layer_idx = config, len(layers)
        for last in (idle.self_attn.o_proj, idle.mlp.down_proj):
            last.weight.data.zero_()
        layers.append(idle)
    config.num_hidden_layers, config.layer_types = len(layers), config.layer_types * depth


@dataclass
class Result:
    """What was written after one prompt; ``phrase`` counts the tokens that no model wrote, ``scores`` are the
    teacher's log-probabilities."""

    token_ids: list[int]
    breach_step: int | None = None
    rollback_step: int | None = None
    phrase: int = 0
    scores: list[float] | None = None


# ---------------------------------------------------------------- the providers: a result for each prompt


def ours(pair, prompts, batch_size, policy=POLICY, student=True, teacher=True, **options):
    settings = {"policy": policy, "max_new_tokens": NEW, "batch_size": batch_size, "temperature": 0.0, **options}
    models = pair.student if student else None, pair.teacher if teacher else None
    written = motab.synthesize(*models, pair.tokenizer, prompts, **settings)
    return [Result(t.token_ids, t.breach_step, t.rollback_step, t.author.count("stitch")) for t in written]


def unspeculative(pair, prompts, batch_size):
    with mock.patch.object(Speculation, "plan", lambda self, *rows: Plan(self.block_size, speculates=False)):
        return ours(pair, prompts, batch_size)


def ours_alone(pair, prompts, batch_size):
    return ours(pair, prompts, batch_size, motab.OnPolicy(), teacher=False)


class StepEnd(StoppingCriteria):
    """Stops `generate` when the text after the first ``start`` tokens holds the delimiter."""

    def __init__(self, tokenizer, start):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids, scores, **kwargs):
        ended = POLICY.delimiter in self.tokenizer.decode(input_ids[0, self.start :])
        return torch.tensor([ended], device=input_ids.device)


def write(model, context, count, stopping=()):
    """What one call of a server would return: up to ``count`` tokens after the context."""
    ids = torch.tensor([context], device=DEVICE)
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, stopping_criteria=list(stopping)
    )
    return out[0, len(context) :].tolist()


@torch.no_grad()
def logprobs(model, ids, kept):
    """Log-probabilities of the next token after each of the last ``kept`` ones."""
    return model(torch.tensor([ids], device=DEVICE), logits_to_keep=kept).logits[0].log_softmax(-1)


def sent_anew(pair, prompt):
    """One trajectory."""
    end, text = pair.tokenizer.eos_token_id, []
    starts, values = [], []
    while len(text) < NEW and text[-1:] != [end]:
        context = prompt + text
        step = write(pair.student, context, NEW - len(text), [StepEnd(pair.tokenizer, len(context))])
        first = logprobs(pair.teacher, context, 1)[0]
        entropy = -float((first.exp() * first).sum())
        column = torch.tensor(step, device=DEVICE)[:, None]
        values.append(math.exp(float(logprobs(pair.teacher, context + step[:-1], len(step)).gather(1, column).mean())))
        starts.append(len(text))
        text += step
        if not values[-1] >= POLICY.epsilon0 * math.exp(-POLICY.theta * entropy):
            break
    else:
        return Result(text)
    falls = [after - before for before, after in itertools.pairwise(values)]
    back = falls.index(min(falls)) + 1 if falls else 0
    safe = text[: starts[back]]
    flawed = text[:-1] if text[-1] == end else text
    written = pair.tokenizer.decode(flawed)
    blank = "\n" * max(0, 2 - (len(written) - len(written.rstrip("\n"))))
    phrase = pair.tokenizer.encode(f"{blank}{POLICY.stitch}\n\n", add_special_tokens=False)
    takeover = write(pair.teacher, prompt + safe, NEW - len(safe))
    return Result(flawed + phrase + takeover, len(values) - 1, back, phrase=len(phrase))


def generated(pair, prompts):
    """The student's own texts after the prompts, padded on the left: (b, S) ids, their mask, where the texts begin."""
    start = max(map(len, prompts))
    ids = torch.tensor([[pair.tokenizer.pad_token_id] * (start - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (start - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    return pair.student.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False), mask, start


def texts_of(pair, ids):
    """Each row up to its end token."""
    end = pair.tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


def generate(pair, prompts, batch_size):
    results = []
    for first in range(0, len(prompts), batch_size):
        ids, _, start = generated(pair, prompts[first : first + batch_size])
        results += [Result(text) for text in texts_of(pair, ids[:, start:])]
    return results


@torch.no_grad()
def generate_then_score(pair, prompts, batch_size):
    results = []
    for first in range(0, len(prompts), batch_size):
        ids, mask, start = generated(pair, prompts[first : first + batch_size])
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - start), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = pair.teacher(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        scores = logits[:, start - 1 : -1].log_softmax(-1).gather(2, ids[:, start:, None])[..., 0].tolist()
        texts = texts_of(pair, ids[:, start:])
        results += [Result(text, scores=row[: len(text)]) for text, row in zip(texts, scores, strict=True)]
    return results


PROVIDERS = {
    "ours": ours,
    "ours, compiled": functools.partial(ours, torch_compile=True),
    "sent anew": lambda pair, prompts, batch_size: [sent_anew(pair, prompt) for prompt in prompts],
    "ours, no teacher": ours_alone,
    "generate": generate,
    "generate, then score": generate_then_score,
}
MONITORED = ("ours", "ours, compiled", "sent anew")
TEACHER_ONLY = {
    "ours": functools.partial(ours, policy=motab.TeacherOnly()),
    "ours, no student": functools.partial(ours, policy=motab.TeacherOnly(), student=False),
}


# ---------------------------------------------------------------- the race


@pytest.fixture(autouse=True)
def one_thread():
    """A second thread gains a sixth on models this small on an idle machine, and spins on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def pair(depth=1):
    return Pair(depth)


@functools.cache
def expected(author):
    """For the first prompts: the text that "both" write in monitored generation, the "student"'s own with the
    teacher's log-probabilities, or the "teacher"'s own."""
    prompts = pair().prompts[:FEW]
    if author == "both":
        return [sent_anew(pair(), prompt) for prompt in prompts]
    if author == "teacher":
        return [Result(write(pair().teacher, prompt, NEW)) for prompt in prompts]
    return generate_then_score(pair(), prompts, 1)


def check(author, results):
    known = expected(author)
    assert any(result.breach_step is not None for result in known) == (author == "both")
    for result, other in zip(results[:FEW], known, strict=True):
        assert result.token_ids == other.token_ids
        assert (result.breach_step, result.rollback_step) == (other.breach_step, other.rollback_step)
        if result.scores is not None:
            torch.testing.assert_close(torch.tensor(result.scores), torch.tensor(other.scores), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_synthesis(benchmark, provider, batch_size):
    # Its text is the one that ours must write too, and takes long.
    known = expected("both") if provider == "sent anew" else None
    author = "both" if provider in MONITORED else "student"
    race(benchmark, "synthesis", PROVIDERS[provider], author, pair(), batch_size, known)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("provider", ["ours", "ours, teacher alone"])
def test_larger_teacher(benchmark, provider, batch_size):
    function = ours if provider == "ours" else unspeculative
    race(benchmark, "synthesis with a teacher of 16 layers", function, "both", pair(depth=4), batch_size)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("provider", TEACHER_ONLY)
def test_teacher_only(benchmark, provider, batch_size):
    name, function = "TeacherOnly with a teacher of 16 layers", TEACHER_ONLY[provider]
    race(benchmark, name, function, "teacher", pair(depth=4), batch_size)


def race(benchmark, name, function, author, models, batch_size, known=None):
    one_by_one = batch_size == 1 or known is not None
    prompts = models.prompts[: FEW if one_by_one else MANY]

    def run():
        results = function(models, prompts, batch_size)
        synchronise(DEVICE)
        return results

    results = run() if known is None else known
    check(author, results)
    benchmark.group = f"{name}, {batch_size} at a time, one thread"
    benchmark.extra_info["tokens"] = sum(len(result.token_ids) - result.phrase for result in results)
    benchmark.pedantic(run, rounds=1 if known is not None else 2 if one_by_one else 3)
