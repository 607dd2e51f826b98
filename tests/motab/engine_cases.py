"""How tests run the engine."""

import torch

import motab

POLICY = motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,")
SAMPLING = [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "min_p": 0.1}]
SETTINGS = {"max_new_tokens": 40, "batch_size": 3, "block_size": 4, "temperature": 0.0}


def run(student, teacher, tokenizer, prompts, policy, **settings):
    return list(motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **{**SETTINGS, **settings}))


def check_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.author, ours.breach_step) == (theirs.token_ids, theirs.author, theirs.breach_step)
        assert (ours.rollback_step, ours.finish_reason) == (theirs.rollback_step, theirs.finish_reason)
        for name, numbers in ours.statistics.items():
            pairs = [pair for pair in zip(numbers, theirs.statistics[name], strict=True) if None not in pair]
            both = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
