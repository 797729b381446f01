"""Tiny models of every supported family."""

from __future__ import annotations

from families_encoder_decoder import ENCODER_DECODERS
from families_hybrid import HYBRIDS
from families_multimodal import MULTIMODAL
from family import COMMON, LLAMA, VOCAB, WINDOW, Family, supported_attention

__all__ = [
    "CAUSAL",
    "DECODERS",
    "ENCODER_DECODERS",
    "FAMILIES",
    "KINDS",
    "MULTIMODAL",
    "VOCAB",
    "WINDOW",
    "Family",
    "supported_attention",
]

EVEN = dict(LLAMA, num_hidden_layers=2)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
MLA = dict(
    LLAMA,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
GPT = dict(COMMON, n_embd=64, n_layer=3, n_head=4, n_positions=256)
MIXED = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=WINDOW)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _falcon(**kwargs: object) -> Family:
    sizes = dict(COMMON, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
    return Family("FalconConfig", "FalconForCausalLM", {**sizes, **kwargs})


DECODERS: dict[str, Family] = {
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", {**GPT, **NO_DROPOUT}),
    "gpt_neo": Family(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        dict(
            COMMON,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            max_position_embeddings=256,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
        ),
        sliding=True,
    ),
    "gptj": Family("GPTJConfig", "GPTJForCausalLM", {**GPT, **NO_DROPOUT, "rotary_dim": 8}),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", EVEN),
    "gpt_bigcode": Family("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**GPT, **NO_DROPOUT, "multi_query": True}),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        dict(
            COMMON,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=64,
            dropout=0.0,
        ),
    ),
    "bloom": Family("BloomConfig", "BloomForCausalLM", dict(COMMON, hidden_size=64, n_layer=2, n_head=4), limit=None),
    "mpt": Family(
        "MptConfig", "MptForCausalLM", dict(COMMON, d_model=64, n_heads=4, n_layers=3, max_seq_len=256), limit=256
    ),
    "falcon_multi_query": _falcon(multi_query=True, new_decoder_architecture=False, alibi=False),
    "falcon_grouped": _falcon(new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon_alibi": _falcon(multi_query=False, new_decoder_architecture=False, alibi=True),
    "codegen": Family("CodeGenConfig", "CodeGenForCausalLM", {**GPT, **NO_DROPOUT, "rotary_dim": 8}),
    "biogpt": Family(
        "BioGptConfig",
        "BioGptForCausalLM",
        dict(
            COMMON,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    "llama": Family("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "llama_wide_heads": Family("LlamaConfig", "LlamaForCausalLM", {**EVEN, "head_dim": 24}),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": WINDOW}, sliding=True),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {**EVEN, **MOE, "sliding_window": WINDOW}, sliding=True),
    "qwen2": Family(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        sliding=True,
    ),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {**EVEN, "head_dim": 16}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**EVEN, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM", {**LLAMA, "head_dim": 24}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**LLAMA, **MIXED, "head_dim": 16, "query_pre_attn_scalar": 16},
        sliding=True,
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**LLAMA, **MIXED, "head_dim": 16, "query_pre_attn_scalar": 16},
        sliding=True,
    ),
    "phi": Family("PhiConfig", "PhiForCausalLM", {**EVEN, "partial_rotary_factor": 0.5}),
    "phi3": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        {**LLAMA, "sliding_window": WINDOW, "original_max_position_embeddings": 256},
        sliding=True,
    ),
    "stablelm": Family("StableLmConfig", "StableLmForCausalLM", EVEN),
    "starcoder2": Family(
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        {**LLAMA, "sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
        sliding=True,
    ),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM", EVEN),
    "olmo3": Family("Olmo3Config", "Olmo3ForCausalLM", {**LLAMA, **MIXED}, sliding=True),
    "cohere2": Family(
        "Cohere2Config", "Cohere2ForCausalLM", {**LLAMA, **MIXED, "head_dim": 16, "logit_scale": 1.0}, sliding=True
    ),
    "glm4": Family("Glm4Config", "Glm4ForCausalLM", {**EVEN, "head_dim": 16}),
    "smollm3": Family("SmolLM3Config", "SmolLM3ForCausalLM", {**EVEN, "no_rope_layers": [1, 0]}),
    "granite": Family("GraniteConfig", "GraniteForCausalLM", {**LLAMA, "attention_multiplier": 0.25}),
    "deepseek_v2": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", MLA),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", {**MLA, "num_hidden_layers": 2}),
    "gpt_oss": Family("GptOssConfig", "GptOssForCausalLM", {**LLAMA, **MIXED, **MOE, "head_dim": 16}, sliding=True),
    "llama4_text": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **LLAMA,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": WINDOW,
            "moe_layers": [1],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        sliding=True,
        since="5.23",
    ),
    "gemma3n_text": Family(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **LLAMA,
            "num_hidden_layers": 5,
            "head_dim": 16,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
        },
        sliding=True,
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **LLAMA,
            "num_hidden_layers": 5,
            "head_dim": 8,  # q and k are normed and not scaled: wide heads make attention so sharp that rounding shows
            "global_head_dim": 16,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
        },
        sliding=True,
    ),
}

CAUSAL = {**DECODERS, **HYBRIDS, **MULTIMODAL}
FAMILIES = {**CAUSAL, **ENCODER_DECODERS}

_KINDS = "gpt2 llama qwen3 gemma3_text deepseek_v3 falcon_multi_query mpt qwen3_next t5 bart"
KINDS = {name: FAMILIES[name] for name in _KINDS.split()}
"""Families that differ in kind: positions, windows, latent attention, biases by distance, recurrence, two parts."""
