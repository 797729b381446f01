"""What a prefix costs: training steps and decoding, with and without, side by side in one process.

Every round runs all variants once, in turn, so that whatever else the machine does meets them alike; the figure is the
median over rounds of each variant's time divided by the base's in the same round.

    .venv/bin/python benchmarks/overhead.py            # SmolLM2-135M, batch 8, 64 tokens, 20 virtual tokens
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from measuring import Seconds, Variants, measured, ratios
from rich.console import Console
from transformers import PreTrainedModel

from peft_prefix import PrefixConfig, PrefixModel, get_prefix_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal model; default SmolLM2-135M")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of each text")
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=25, help="training steps of each variant")
    parser.add_argument("--decoding-rounds", type=int, default=9)
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    base, _, origin = smollm2.load(options.model)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=options.virtual_tokens))
    ids = torch.randint(100, base.config.vocab_size, (options.batch, options.length))
    console = Console(width=120)
    console.print(
        f"{origin}; batch {options.batch}, {options.length} tokens, {options.virtual_tokens} virtual tokens; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads",
        highlight=False,
    )
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    for row, length in enumerate(torch.linspace(options.length // 2, options.length, options.batch).int().tolist()):
        padded[row, length:] = 0
    model.train()
    report(console, "training step", measured(training(base, model, ids, whole), options.rounds))
    report(console, "training step, padded rows", measured(training(base, model, ids, padded), options.rounds))
    decode = decoding(base.eval(), model.eval(), ids, options.new_tokens)
    report(console, f"{options.new_tokens} tokens decoded", measured(decode, options.decoding_rounds))


def training(base: PreTrainedModel, model: PrefixModel, ids: torch.Tensor, mask: torch.Tensor) -> Variants:
    """Forward and backward passes; the base's gradients go to its embeddings, as far as a prefix's go."""
    places = mask.cumsum(dim=1)
    every = ids.masked_fill(mask == 0, -100)
    half = every.masked_fill(places <= places[:, -1:] // 2, -100)
    embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()

    def plain(labels: torch.Tensor) -> Callable[[], object]:
        inputs = dict(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False)
        return lambda: base(**inputs).loss.backward()

    def prefixed(labels: torch.Tensor, label_only: bool) -> Callable[[], object]:
        def step() -> None:
            model.label_only_logits = label_only
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            model.zero_grad()

        return step

    return {
        "base": plain(every),
        "prefix, all tokens labelled": prefixed(every, True),
        "prefix, half labelled, all logits": prefixed(half, False),
        "prefix, half labelled": prefixed(half, True),
    }


def decoding(base: PreTrainedModel, model: PrefixModel, ids: torch.Tensor, new: int) -> Variants:
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
    return {
        "base": lambda: base.generate(ids, **options),
        "prefix": lambda: model.generate(ids, **options),
    }


def report(console: Console, what: str, seconds: Seconds) -> None:
    """A Markdown table: medians, and the median and the quartiles of ratios to the first variant."""
    reference = next(iter(seconds.values()))
    lines = ["", f"| {what} | milliseconds | of the base | quartiles |", "| --- | --: | --: | --: |"]
    for name, values in seconds.items():
        low, middle, high = ratios(values, reference)
        time_of = 1000 * statistics.median(values)
        lines.append(f"| {name} | {time_of:.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    console.print("\n".join(lines), highlight=False)


if __name__ == "__main__":
    main()
