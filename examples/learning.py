"""Measure what a prefix learns in 50 steps, for every initializer and both parameterizations.

200 E2E examples, 50 steps of batch 8, 64 held-out examples, AdamW with 5 warm-up steps and linear decay, gradients
clipped at 1. Prints a Markdown table and writes the same numbers as JSON. Run it with

    python examples/learning.py --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import smollm2
import table_to_text as t2t
import torch
import transformers
from transformers import Trainer, TrainingArguments

from peft_prefix import PrefixConfig, PromptTargetCollator, __version__, get_prefix_model

VIRTUAL_TOKENS = 40
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "vocabulary (default)": (dict(init="vocabulary"), 3e-2),
    "text": (dict(init="text"), 3e-2),
    "normal, std 0.02": (dict(init="normal", init_std=0.02), 3e-2),
    "zeros": (dict(init="zeros"), 3e-2),
    "vocabulary, MLP": (dict(init="vocabulary", reparameterization="mlp"), 1e-3),
    "text, MLP": (dict(init="text", reparameterization="mlp"), 1e-3),
}
"""Configuration and peak learning rate by name."""


class Task:
    """The data of the measurement, and the text of the `text` initializer."""

    def __init__(self, base: Any, tokenizer: Any, data: str | None) -> None:
        training = t2t.draw(t2t.load(data, "train")[0], 200, seed=0)
        held_out = t2t.draw(t2t.load(data, "dev")[0], 64, seed=0)
        self.train = [t2t.row_of(example) for example in training]
        self.dev = [t2t.row_of(example) for example in held_out]
        self.collate = PromptTargetCollator(tokenizer, base)
        texts = [f"Describe the restaurant .\n{t2t.prompt_of(example)}{example.target}\n" for example in training]
        self.text = max(
            (text for text in texts if len(tokenizer(text)["input_ids"]) <= VIRTUAL_TOKENS),
            key=lambda text: len(tokenizer(text)["input_ids"]),
        )


def measure(base: Any, tokenizer: Any, task: Task, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train once and return the dev loss before and after."""
    fields, rate = METHODS[name]
    length = VIRTUAL_TOKENS
    if fields["init"] == "text":
        fields = {**fields, "init_text": task.text}
        length = len(tokenizer(task.text)["input_ids"])
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=length, init_seed=seed, **fields), tokenizer)
    before = t2t.loss_per_token(model, task.dev, task.collate)
    started = time.perf_counter()
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=50,
            per_device_train_batch_size=8,
            learning_rate=rate,
            warmup_steps=5,
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=task.train,
        data_collator=task.collate,
    ).train()
    seconds = time.perf_counter() - started
    after = t2t.loss_per_token(model, task.dev, task.collate)
    trained, _ = model.get_nb_trainable_parameters()
    saved = sum(tensor.numel() for tensor in model.prefix_state_dict().values())
    return dict(
        method=name,
        seed=seed,
        learning_rate=rate,
        virtual_tokens=length,
        trained=trained,
        saved=saved,
        before=before,
        after=after,
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", help="another causal model: a folder or an id on the Hub")
    parser.add_argument("--data", help="a folder with the E2E files, or a data set id on the Hub")
    parser.add_argument("--output", type=Path, default=Path("learning-output"))
    options = parser.parse_args()

    base, tokenizer, origin = smollm2.load(options.model)
    task = Task(base, tokenizer, options.data)
    without = t2t.loss_per_token(base, task.dev, task.collate)
    print(f"base model {origin}: {without:.3f} nats per token\n\ntext: {task.text!r}\n")
    print("| method | seed | trained numbers | before | after | seconds |\n| --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in options.methods:
        for seed in options.seeds:
            row = measure(base, tokenizer, task, name, seed, options.output)
            rows.append(row)
            print(
                f"| {name}, p={row['virtual_tokens']}, lr {row['learning_rate']:g} | {seed} | {row['trained']:,} "
                f"| {row['before']:.3f} | {row['after']:.3f} | {row['seconds']:.0f} |",
                flush=True,
            )
    versions = dict(
        peft_prefix=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    content = dict(base=origin, base_loss=without, text=task.text, versions=versions, runs=rows)
    (options.output / "learning.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
