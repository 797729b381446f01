"""Tiny models that read images: two layers of vision, four placeholder tokens for an image."""

from __future__ import annotations

import torch
from family import LLAMA, VOCAB, WINDOW, Family

IMAGE_TOKEN = 200
"""These models have 208 words, so that random text ids `3..199` are never a placeholder."""

MULTI = dict(LLAMA, vocab_size=208)
MULTIMODAL: dict[str, Family] = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        dict(
            text_config=dict(MULTI, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3])),
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=48,
                num_heads=2,
                out_hidden_size=64,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
            image_token_id=IMAGE_TOKEN,
            video_token_id=201,
            vision_start_token_id=202,
            vision_end_token_id=203,
        ),
    ),
    "gemma3": Family(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        dict(
            text_config=dict(
                MULTI,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=4,
                vision_use_head=False,
            ),
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=202,
            eoi_token_index=203,
        ),
        sliding=True,
    ),
    "llava": Family(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        dict(
            text_config=dict(MULTI, model_type="llama"),
            vision_config=dict(
                model_type="clip_vision_model",
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                projection_dim=32,
            ),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
    ),
}


def image_batch(name: str, before: int = 3, after: int = 4, rows: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass: `rows` texts with one image of four placeholder tokens each."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, VOCAB, (rows, before + after), generator=generator)
    marks = {"qwen2_5_vl": (202, 203), "gemma3": (202, 203), "llava": ()}[name]
    image = [*marks[:1], *[IMAGE_TOKEN] * 4, *marks[1:]]
    ids = torch.cat([text[:, :before], torch.tensor(image).expand(rows, -1), text[:, before:]], dim=1)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if name == "qwen2_5_vl":  # 4 x 4 patches of 3 channels x 2 frames x 4 x 4 pixels, merged 2 x 2
        batch["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    else:
        batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return batch
