"""Tiny random models, one for each supported architecture."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "nemotron", "gpt2", "gpt_neox", "opt", "gemma3")
COMMON = {"vocab_size": 100, "max_position_embeddings": 128, "initializer_range": 0.3}
ROTARY = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA = {
    **ROTARY,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def tiny_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4}
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROTARY)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROTARY)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ROTARY, head_dim=8)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**ROTARY, sliding_window=8)),
        "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**ROTARY, partial_rotary_factor=0.5)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=100, n_positions=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3)
        ),
        "gpt_neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**COMMON, **heads, hidden_size=32, intermediate_size=48, rotary_pct=0.5)
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=100, max_position_embeddings=128, **heads, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32
            )
        ),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    }
    return makers[name]().eval()
