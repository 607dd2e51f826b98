"""Tiny models that keep recurrent or convolutional states, of each kind that transformers knows."""

import importlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache

if not hasattr(Cache, "get_recurrent_state"):
    pytest.skip("transformers before 5.24 has other caches for states", allow_module_level=True)

VOCAB = 61
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.1,  # so that what a layer keeps counts for much in the logits
)
DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "full_attention"],
)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=4)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16, experts_implementation="eager")
LATENT = dict(num_key_value_heads=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, kv_lora_rank=8)
MODELS = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_next": DELTA | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=16),
    "olmo_hybrid": DELTA,
    "kimi_linear": DELTA | LATENT | EXPERTS | dict(num_experts=4, linear_head_dim=8, linear_num_heads=4),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(layer_types=["conv", "sliding_attention", "full_attention", "conv"], sliding_window=5),
    "zaya": EXPERTS
    | dict(layer_types=["hybrid", "hybrid"], num_experts=4, num_experts_per_tok=1, router_hidden_size=8),
    "granitemoehybrid": MAMBA
    | EXPERTS
    | dict(layer_types=["mamba", "attention"], num_local_experts=4, shared_intermediate_size=16),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64, num_hidden_layers=2),  # both in each layer
    "nemotron_h": EXPERTS
    | dict(layer_types=["mamba", "moe", "attention", "mamba"])
    | dict(n_routed_experts=4, moe_shared_expert_intermediate_size=16)
    | dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, expand=2, chunk_size=4),
    "zamba2": dict(layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, adapter_rank=4, use_mem_rope=True)
    | dict(mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_expand=2, chunk_size=4),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4)
    | dict(num_experts=2, num_experts_per_tok=1, experts_implementation="eager"),
}


def recurrent_model(name, seed=0, attention=None, dtype=torch.float64, **sizes):
    """A random model; its layers are those of PyTorch, since those of fla, where it is installed, need a GPU."""
    torch.manual_seed(seed)
    settings = SIZES | MODELS[name] | sizes
    kinds = settings.get("layer_types") or settings.get("layers_block_type")
    settings["num_hidden_layers"] = len(kinds) if kinds else 2
    config = AutoConfig.for_model(name, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    for parameter in model.parameters():
        if not parameter.any():  # what it multiplies would have no effect
            torch.nn.init.normal_(parameter, std=0.1)
    code = importlib.import_module(type(model).__module__)
    for function, wrapped in [(key, getattr(x, "__wrapped__", None)) for key, x in vars(code).items()]:
        if "delta" in function and wrapped is not None:
            setattr(code, function, wrapped)
    return model
