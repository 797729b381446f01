"""Teach a frozen SmolLM2-135M to describe restaurants, with a prefix as the only thing that is trained.

Run it with `make demo`, or `python examples/demo.py --help` for the options. Everything that it produces is in one
folder afterwards: the prefix, the loss curve, and a table of inputs, references and texts with and without the prefix.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib
import smollm2
import table_to_text as t2t
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from peft_prefix import PrefixConfig, PrefixModel, PromptTargetCollator, get_prefix_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Loss = list[tuple[int, float]]


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    base, tokenizer, model_origin = smollm2.load(options.model)
    training, data_origin = t2t.load(options.data, "train")
    development, _ = t2t.load(options.data, "dev")
    training = t2t.draw(training, options.train_examples, options.seed)
    development = t2t.draw(development, options.dev_examples, options.seed)
    print(f"\nModel: {model_origin}\nData:  {data_origin}: {len(training)} training, {len(development)} held out\n")

    config = PrefixConfig(num_virtual_tokens=options.virtual_tokens, init_seed=options.seed)
    model = get_prefix_model(base, config)
    model.print_trainable_parameters()
    collate = PromptTargetCollator(tokenizer, model)
    train_rows, dev_rows = ([t2t.row_of(example) for example in part] for part in (training, development))
    with model.disable_prefix():
        without = t2t.loss_per_token(model, dev_rows, collate)
    before = t2t.loss_per_token(model, dev_rows, collate)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 10,
            eval_strategy="steps",
            eval_steps=max(options.steps // 5, 1),
            per_device_eval_batch_size=16,
            logging_steps=max(options.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=options.seed,
        ),
        train_dataset=train_rows,
        eval_dataset=dev_rows,
        data_collator=collate,
    )
    trainer.train()
    after = t2t.loss_per_token(model, dev_rows, collate)

    folder = options.output / "prefix"
    model.save_pretrained(folder, dtype=torch.float16)
    kilobytes = (folder / "prefix.safetensors").stat().st_size / 1000
    loaded = PrefixModel.from_pretrained(base, folder)
    reloaded = t2t.loss_per_token(loaded, dev_rows, collate)

    history = trainer.state.log_history
    draw_curves(
        [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        [(0, before)] + [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        without,
        options.output / "loss.png",
    )
    shown = development[: options.generate]
    tables = compare(shown, *generate_both(loaded, tokenizer, shown))
    (options.output / "outputs.md").write_text("\n".join(tables), encoding="utf-8")
    summary = {
        "model": model_origin,
        "data": data_origin,
        "training examples": len(training),
        "steps": options.steps,
        "learning rate": options.learning_rate,
        "virtual tokens": options.virtual_tokens,
        "dev loss of the base": without,
        "dev loss before training": before,
        "dev loss after training": after,
        "dev loss of the reloaded prefix": reloaded,
        "prefix in KB": kilobytes,
        "seconds": time.perf_counter() - started,
    }
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"\nDev loss in nats per token: {without:.3f} without a prefix, {before:.3f} with the untrained one, "
        f"{after:.3f} after {options.steps} steps, {reloaded:.3f} loaded again from {kilobytes:.0f} KB."
        f"\nIn {options.output}: prefix/, loss.png, outputs.md, summary.json"
        f"\nOne of the held-out inputs, for example:\n\n{tables[0]}"
    )


def generate_both(
    model: PrefixModel, tokenizer: PreTrainedTokenizerBase, examples: list[t2t.Example]
) -> tuple[list[str], list[str]]:
    """Texts of the base and of the model with its prefix."""
    with model.disable_prefix():
        without = generate(model, tokenizer, examples, "without the prefix")
    return without, generate(model, tokenizer, examples, "with the prefix")


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[t2t.Example], name: str, batch: int = 8
) -> list[str]:
    """Greedy continuations of the examples' prompts, as batches that are padded on the left."""
    texts = []
    for start in tqdm(range(0, len(examples), batch), desc=f"Generating {name}"):
        prompts = [t2t.prompt_of(example) for example in examples[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def draw_curves(train: Loss, dev: Loss, without: float, file: Path) -> None:
    """Training and dev loss over the steps, with the base's dev loss as a line."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1.2, label="training batch")
    axes.plot(*zip(*dev, strict=True), color="#08519c", marker="o", label="held out")
    axes.axhline(without, color="#636363", linestyle="--", linewidth=1, label="held out, no prefix")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def compare(examples: list[t2t.Example], without: list[str], with_prefix: list[str]) -> list[str]:
    """A small Markdown table for each held-out input."""

    def one_line(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|") or "(nothing)"

    return [
        f"| | |\n| --- | --- |\n| input | {one_line(example.table)} |\n"
        f"| reference | {one_line(example.target)} |\n| base model | {one_line(base)} |\n"
        f"| with the prefix | {one_line(prefixed)} |\n"
        for example, base, prefixed in zip(examples, without, with_prefix, strict=True)
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for everything produced")
    parser.add_argument("--model", help="another causal model: a folder or an id on the Hub (default: SmolLM2-135M)")
    parser.add_argument(
        "--data",
        help="a folder with the E2E files, or a data set id on the Hub (default: E2E if it is at hand, else a sample)",
    )
    parser.add_argument("--train-examples", type=int, default=200)
    parser.add_argument("--dev-examples", type=int, default=64)
    parser.add_argument("--generate", type=int, default=16, help="number of held-out inputs to write texts for")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
