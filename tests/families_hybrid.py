"""Tiny models that mix attention (layers 1 and 3, mostly) with recurrent or convolution layers."""

from __future__ import annotations

from family import LLAMA, Family

MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
DEEP = dict(LLAMA, num_hidden_layers=4)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=8)
HYBRIDS: dict[str, Family] = {
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **DEEP,
            "head_dim": 16,
            "layer_types": MIXED,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        recurrent=True,
    ),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        {
            **DEEP,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        limit=None,
        recurrent=True,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **DEEP,
            **MAMBA2,
            "layer_types": MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "attention_multiplier": 0.25,
            "position_embedding_type": "rope",
        },
        recurrent=True,
    ),
    "granitemoehybrid_nope": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **DEEP,
            **MAMBA2,
            "layer_types": MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "attention_multiplier": 0.25,
        },
        limit=None,
        recurrent=True,
    ),
    "falcon_h1": Family(
        "FalconH1Config", "FalconH1ForCausalLM", {**LLAMA, **MAMBA2, "mamba_d_ssm": 128}, recurrent=True
    ),
    "lfm2": Family(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            **DEEP,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        recurrent=True,
    ),
    "zamba2": Family(
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {
            **DEEP,
            "num_key_value_heads": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "adapter_rank": 8,
            "use_mem_rope": True,
        },
        recurrent=True,
    ),
    "bamba": Family(
        "BambaConfig",
        "BambaForCausalLM",
        {**DEEP, **MAMBA2, "attn_layer_indices": [1, 3]},
        recurrent=True,
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            **{key: value for key, value in DEEP.items() if key != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "full_attention"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
        },
        recurrent=True,
    ),
}
