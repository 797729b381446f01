"""One frozen model, a prefix for each of eight users, all trained and served in the same batches.

Every user has a dozen examples of a way to write (`styles.py`) and gets a prefix of their own (Li & Liang 2021,
sections 8.1 and 8.2, name this as what prefixes are for). Then new restaurants are described for all users in one call
of `generate`. And since nobody's data may show in the prefix of another, everything is trained a second time without
one of the users: the prefixes of the others come out bit for bit the same.

    python examples/many_users.py            # SmolLM2-135M, about eight minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import smollm2
import styles
import table_to_text as t2t
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from peft_prefix import PrefixBankTrainer, PrefixConfig, PrefixModel, PromptTargetCollator, get_prefix_model

Row = dict[str, str | None]


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    base, tokenizer, origin = smollm2.load(options.model)
    known, _ = t2t.load(str(t2t.SAMPLE), "train")
    new, _ = t2t.load(str(t2t.SAMPLE), "dev")
    rows = [
        user.row(example)
        for number, user in enumerate(styles.USERS)
        for example in t2t.draw(known, options.examples, options.seed + number)
    ]
    print(f"\nModel: {origin}\n{len(styles.USERS)} users with {options.examples} examples each\n")

    started = time.perf_counter()
    model = trained(base, tokenizer, rows, options)
    print(f"Trained together in {time.perf_counter() - started:.0f} s.")
    model.save_pretrained(options.output / "prefixes")
    results = served(model, tokenizer, new[: options.requests])
    losses = cross_losses(model, tokenizer, new)
    report(results, losses)

    left_out = styles.USERS[1].name
    without = [{**row, "prefix_names": None} if row["prefix_names"] == left_out else row for row in rows]
    other = trained(base, tokenizer, without, options)
    same = [user.name for user in styles.USERS if identical(model, other, user.name)]
    changed = [user.name for user in styles.USERS if user.name not in same]
    print(
        f"\nTrained again without {left_out}: bit for bit the same are {', '.join(same)}; others: {', '.join(changed)}."
    )
    record = {"texts": results, "losses": losses, "left out": left_out, "identical": same}
    (options.output / "users.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"Prefixes and results are in {options.output}.")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal model; default SmolLM2-135M")
    parser.add_argument("--output", type=Path, default=Path("users-output"))
    parser.add_argument("--examples", type=int, default=12, help="examples of each user")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--virtual-tokens", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--requests", type=int, default=4, help="new restaurants for each user")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def trained(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: argparse.Namespace
) -> PrefixModel:
    """A model with a prefix for each user, trained on all rows in mixed batches."""
    config = PrefixConfig(num_virtual_tokens=options.virtual_tokens, init_seed=options.seed)
    model = get_prefix_model(base, config)
    for user in styles.USERS:
        model.add_prefix(user.name, config)
    model.remove_prefix("default")
    model.set_prefix(None)  # every row says whose prefix it trains
    arguments = TrainingArguments(
        output_dir=str(options.output / "training"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        warmup_steps=3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
        remove_unused_columns=False,  # the collator reads texts
    )
    collate = PromptTargetCollator(tokenizer, model, pad_to_multiple_of=8)
    PrefixBankTrainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    return model.eval()


def served(model: PrefixModel, tokenizer: PreTrainedTokenizerBase, examples: list[t2t.Example]) -> list[dict[str, str]]:
    """New restaurants described for all users in one batch, each row with the prefix of its user."""
    requests = [(user, example) for user in styles.USERS for example in examples]
    tokenizer.padding_side = "left"
    inputs = tokenizer([f"{example.table}\n" for _, example in requests], return_tensors="pt", padding=True)
    started = time.perf_counter()
    ids = model.generate(
        **inputs,
        prefix_names=[user.name for user, _ in requests],
        max_new_tokens=70,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"{len(requests)} requests of {len(styles.USERS)} users served in {time.perf_counter() - started:.1f} s.")
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [
        {"user": user.name, "table": example.table, "text": text.strip()}
        for (user, example), text in zip(requests, texts, strict=True)
    ]


def cross_losses(
    model: PrefixModel, tokenizer: PreTrainedTokenizerBase, examples: list[t2t.Example]
) -> dict[str, dict[str, float]]:
    """Loss per token of what each user would write, with each user's prefix and without any."""
    collate = PromptTargetCollator(tokenizer, model)
    losses: dict[str, dict[str, float]] = {}
    for writer in styles.USERS:
        rows = [writer.row(example) for example in examples[:8]]
        readers = [*(user.name for user in styles.USERS), None]
        losses[writer.name] = {
            str(reader): t2t.loss_per_token(model, [{**row, "prefix_names": reader} for row in rows], collate)
            for reader in readers
        }
    return losses


def identical(one: PrefixModel, other: PrefixModel, name: str) -> bool:
    """Whether a user's prefix is the same in two models, bit for bit."""
    mine, theirs = one.prefix_state_dict(name), other.prefix_state_dict(name)
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def report(results: list[dict[str, str]], losses: dict[str, dict[str, float]]) -> None:
    table = Table(
        "user", "style", "recognized", "loss: own", "best other", "no prefix", "a new restaurant", show_lines=True
    )
    for user in styles.USERS:
        texts = [result["text"] for result in results if result["user"] == user.name]
        own = losses[user.name]
        others = [loss for name, loss in own.items() if name not in (user.name, "None")]
        kept = f"{sum(map(user.recognize, texts))} of {len(texts)}"
        numbers = (f"{loss:.2f}" for loss in (own[user.name], min(others), own["None"]))
        table.add_row(user.name, user.style, kept, *numbers, texts[0])
    Console(width=150).print(table, markup=False)


if __name__ == "__main__":
    main()
