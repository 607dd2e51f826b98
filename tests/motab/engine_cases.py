"""How tests run the engine."""

import motab

POLICY = motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,")
SAMPLING = [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "min_p": 0.1}]
SETTINGS = {"max_new_tokens": 40, "batch_size": 3, "block_size": 4, "temperature": 0.0}


def run(student, teacher, tokenizer, prompts, policy, **settings):
    return list(motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **{**SETTINGS, **settings}))
