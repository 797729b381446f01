"""Measure what the three sites of an encoder-decoder are worth, on a tiny BART and a tiny T5.

No pretrained encoder-decoder is needed: each base is pretrained here, for a minute or two, to restore damaged texts
(`denoising.py`), and then frozen. A prefix then teaches the base to describe tables, which it has not done before. One
prefix of 10 virtual tokens acts in the encoder's self-attention, the decoder's self-attention and the cross-attention;
the other, of 30 virtual tokens, in the decoder's self-attention only. Both train the same number of numbers, with the
same steps on the same batches, each at that learning rate of `--rates` which serves it best with the first seed. Full
fine-tuning with as many steps, at one learning rate, is the yardstick.

Prints a Markdown table of losses on 128 held-out tables, in nats per target token, one number for each seed, and writes
all runs as JSON. Run it with

    python examples/encoder_decoder.py --data ../shared/data --seeds 0 1

The folder holds `e2e/src1_train.txt` and `e2e/src1_valid.txt` (lines `table||text`), `webnlg/train.json` (WebNLG 2017)
and `xsum/subset.jsonl` (lines with a `document`). Without them nothing is measured: a base that has read no real text
has nothing for a prefix to steer.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import table_to_text as t2t
import torch
import transformers
from denoising import RECIPES, make_tokenizer, pretrain, read_documents
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peft_prefix import PrefixConfig, __version__, get_prefix_model

DATA_BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data"
SITES = ("encoder", "decoder", "cross")
VIRTUAL_TOKENS = 10
METHODS: dict[str, tuple[tuple[str, ...], int]] = {
    "three sites": (SITES, VIRTUAL_TOKENS),
    "decoder only": (("decoder",), VIRTUAL_TOKENS * len(SITES)),
}
"""Sites and virtual tokens by name."""
FULL_RATE = 1e-3


class Task:
    """Tables to describe, tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
        self.tokenizer = tokenizer
        self.train = [self.encode(example) for example in t2t.load(str(data / "e2e"), "train")[0]]
        self.dev = [self.encode(example) for example in t2t.draw(t2t.load(str(data / "e2e"), "dev")[0], 128, seed=0)]
        self.collate = DataCollatorForSeq2Seq(tokenizer)

    def encode(self, example: t2t.Example) -> dict[str, list[int]]:
        source, target = (self.tokenizer(text)["input_ids"] for text in (example.table, example.target))
        end = [self.tokenizer.eos_token_id]
        return {"input_ids": source + end, "attention_mask": [1] * (len(source) + 1), "labels": target + end}

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean loss over all target tokens of the held-out tables, in nats."""
        model.eval()
        total, tokens = 0.0, 0
        for start in range(0, len(self.dev), 32):
            batch = self.collate(self.dev[start : start + 32])
            count = int((batch["labels"] != t2t.IGNORED).sum())
            total += float(model(**batch).loss) * count
            tokens += count
        return total / tokens


def train(model: nn.Module, task: Task, rate: float, seed: int, steps: int, folder: Path) -> None:
    """The stock trainer: AdamW, a tenth of the steps to warm up, linear decay, gradients clipped at 1."""
    Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=rate,
            warmup_steps=steps // 10,
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=task.train,
        data_collator=task.collate,
    ).train()


def measure(
    kind: str, base: PreTrainedModel, task: Task, method: str, rate: float, seed: int, steps: int, folder: Path
) -> dict[str, Any]:
    """Train once and return the dev loss before and after."""
    started = time.perf_counter()
    if method == "full fine-tuning":
        sites, virtual_tokens = (), 0
        model: Any = copy.deepcopy(base).requires_grad_(True)
    else:
        sites, virtual_tokens = METHODS[method]
        config = PrefixConfig(num_virtual_tokens=virtual_tokens, sites=sites, init_seed=seed)
        model = get_prefix_model(base, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    before = task.loss(model)
    train(model, task, rate, seed, steps, folder)
    after = task.loss(model)
    return dict(
        model=kind,
        method=method,
        sites=sites,
        virtual_tokens=virtual_tokens,
        trained=trained,
        learning_rate=rate,
        seed=seed,
        before=before,
        after=after,
        seconds=time.perf_counter() - started,
    )


def compare(kind: str, base: PreTrainedModel, task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs with one base. The first seed chooses each method's learning rate, the others repeat the best."""
    runs: list[dict[str, Any]] = []
    for method, rates in {**dict.fromkeys(METHODS, options.rates), "full fine-tuning": [FULL_RATE]}.items():

        def once(rate: float, seed: int, method: str = method) -> dict[str, Any]:
            row = measure(kind, base, task, method, rate, seed, options.steps, options.output)
            print(f"{kind}, {method}, lr {rate:g}, seed {seed}: {row['before']:.3f} -> {row['after']:.3f}", flush=True)
            return row

        first, *others = options.seeds
        swept = [once(rate, first) for rate in rates]
        best = min(swept, key=lambda row: row["after"])
        chosen = [best, *(once(best["learning_rate"], seed) for seed in others)]
        runs += [*({**row, "chosen": row is best} for row in swept), *({**row, "chosen": True} for row in chosen[1:])]
    return runs


def table(runs: Sequence[dict[str, Any]], bases: dict[str, dict[str, Any]]) -> str:
    """The chosen runs in Markdown, one line for each method."""
    lines = ["| model | method | virtual tokens | trained numbers | learning rate | before | after |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, base in bases.items():
        lines.append(f"| {kind} | frozen base | | | | {base['loss']:.3f} | |")
        for method in dict.fromkeys(run["method"] for run in runs):
            rows = [run for run in runs if run["chosen"] and (run["model"], run["method"]) == (kind, method)]
            before, after = (", ".join(f"{row[name]:.3f}" for row in rows) for name in ("before", "after"))
            lines.append(
                f"| {kind} | {method} | {rows[0]['virtual_tokens'] or ''} | {rows[0]['trained']:,} "
                f"| {rows[0]['learning_rate']:g} | {before} | {after} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150, help="steps of every training on tables")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 3e-2, 1e-1, 3e-1])
    parser.add_argument("--data", type=Path, default=DATA_BESIDE_CHECKOUT, help="the folder with the data sets")
    parser.add_argument("--output", type=Path, default=Path("encoder-decoder-output"))
    options = parser.parse_args()

    documents = read_documents(options.data)
    tokenizer = make_tokenizer(documents)
    task = Task(tokenizer, options.data)
    runs: list[dict[str, Any]] = []
    bases: dict[str, dict[str, Any]] = {}
    for kind in options.models:
        started = time.perf_counter()
        base, repair = pretrain(kind, documents, tokenizer)
        seconds = time.perf_counter() - started
        numbers = sum(parameter.numel() for parameter in base.parameters())
        bases[kind] = dict(numbers=numbers, repair_loss=repair, loss=task.loss(base), seconds=seconds)
        print(
            f"{kind}: {numbers:,} numbers, pretrained in {seconds:.0f} s to {repair:.3f} nats per token of repaired "
            f"text; {bases[kind]['loss']:.3f} on tables",
            flush=True,
        )
        runs += compare(kind, base, task, options)
    print("\n" + table(runs, bases))
    versions = dict(
        peft_prefix=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    content = dict(versions=versions, steps=options.steps, bases=bases, runs=runs)
    (options.output / "encoder_decoder.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
