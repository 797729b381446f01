"""Peak memory of one training step, each variant in a process of its own: gradient checkpointing and label-only logits.

The figure is the largest resident size during the second step, as Linux counts it, less the size before it; the
allocator is told to give freed memory back at once.

    .venv/bin/python benchmarks/memory.py              # SmolLM2-135M, batch 2, 1,024 tokens, 20 virtual tokens
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import transformers
from measuring import mebibytes
from rich.console import Console

from peft_prefix import PrefixConfig, get_prefix_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import smollm2

VARIANTS = {
    "base": dict(prefix=False),
    "base, gradient checkpointing": dict(prefix=False, checkpointing=True),
    "prefix, all logits": dict(prefix=True),
    "prefix, all logits, gradient checkpointing": dict(prefix=True, checkpointing=True),
    "prefix": dict(prefix=True, label_only=True),
    "prefix, gradient checkpointing": dict(prefix=True, label_only=True, checkpointing=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal model; default SmolLM2-135M")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="tokens of each text, the second half labelled")
    parser.add_argument("--virtual-tokens", type=int, default=20)
    options = parser.parse_args()
    console = Console(width=120)
    console.print(
        f"batch {options.batch}, {options.length} tokens, half labelled, {options.virtual_tokens} virtual tokens; "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        highlight=False,
    )
    lines = ["", "| training step | peak, MiB |", "| --- | --: |"]
    os.environ.update(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("spawn")
    for name, variant in VARIANTS.items():
        with context.Pool(1) as pool:
            peak = pool.apply(
                peak_of_step, (options.model, options.batch, options.length, options.virtual_tokens), variant
            )
        lines.append(f"| {name} | {peak:,.0f} |")
    console.print("\n".join(lines), highlight=False)


def peak_of_step(
    model_name: str | None,
    batch: int,
    length: int,
    virtual_tokens: int,
    prefix: bool,
    checkpointing: bool = False,
    label_only: bool = False,
) -> float:
    """MiB that one training step needs on top of the model."""
    transformers.utils.logging.disable_progress_bar()
    base, _, _ = smollm2.load(model_name)
    ids = torch.randint(100, base.config.vocab_size, (batch, length))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    if prefix:
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=virtual_tokens))
        model.label_only_logits = label_only
        inputs = {"input_ids": ids}
    else:
        model = base.requires_grad_(False)
        inputs = {"inputs_embeds": base.get_input_embeddings()(ids).detach().requires_grad_()}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step() -> None:
        model.train()(**inputs, labels=labels, use_cache=False).loss.backward()
        model.zero_grad()

    step()
    before = mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return mebibytes("VmHWM") - before


if __name__ == "__main__":
    main()
