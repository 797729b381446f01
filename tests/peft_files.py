"""What the tests of PEFT's files share. PEFT itself is not needed here."""

from __future__ import annotations

P = 4
"""Virtual tokens."""
MADE_ALONE = [
    *("gpt2", "gptj", "gpt_bigcode", "opt", "bloom", "falcon_grouped", "falcon_alibi", "llama", "llama_wide_heads"),
    *("mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gemma3n_text", "gemma4_text", "phi", "qwen2_5_vl"),
]
"""Families of decoders alone for which PEFT makes adapters by itself."""
