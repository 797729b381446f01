"""Two tiny encoder-decoder models, a BART and a T5, pretrained for a minute or two to restore damaged texts.

The texts are a little news, WebNLG's, and those of E2E's training part, never a table. Both models learn to write the
whole text again from one in which spans are replaced by a mask token (BART) or by numbered ones (T5).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import table_to_text as t2t
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SENTINELS = [f"<extra_id_{index}>" for index in range(32)]
WIDTH, LAYERS, HEADS, VOCABULARY = 128, 2, 4, 2000


@dataclass(frozen=True)
class Recipe:
    """How a base is pretrained.

    Attributes:
        steps: Optimizer steps.
        rows: Texts in a batch.
        tokens: Tokens of a text.
        rate: Peak learning rate of AdamW (embeddings, biases, norms).
        muon_rate: Peak learning rate of Muon (the matrices).
        noise: Share of the tokens that are removed.
        span: Mean number of tokens that are removed in one place.
    """

    steps: int
    rows: int = 32
    tokens: int = 48
    rate: float = 3e-3
    muon_rate: float = 3e-2
    noise: float = 0.3
    span: float = 3.0


RECIPES = {"bart": Recipe(steps=500), "t5": Recipe(steps=800, tokens=32, rate=1e-2)}


def read_documents(data: Path) -> list[str]:
    """Texts about the same thing stand in one document; a twentieth of the news, which are long, is enough."""
    needed = [data / "e2e/src1_train.txt", data / "e2e/src1_valid.txt", data / "webnlg/train.json"]
    news = data / "xsum/subset.jsonl"
    missing = [str(file) for file in (*needed, news) if not file.is_file()]
    if missing:
        raise SystemExit(
            f"There is no {', '.join(missing)}. Pretraining needs real text: give the folder that holds the data sets "
            "E2E, WebNLG 2017 and XSum with --data (the first lines of encoder_decoder.py say which files)."
        )
    documents = [" ".join(example.references) for example in t2t.load(str(data / "e2e"), "train")[0]]
    for entry in json.loads(needed[2].read_text(encoding="utf-8"))["entries"]:
        for fields in entry.values():
            documents.append(" ".join(text["lex"] for text in fields["lexicalisations"] if text["comment"] == "good"))
    lines = news.read_text(encoding="utf-8").splitlines()
    documents += [" ".join(json.loads(line)["document"].split()) for line in lines[:: len(lines) // 200]]
    random.Random(0).shuffle(documents)
    return documents


def make_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerBase:
    """Byte pairs learned from the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<mask>", *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", mask_token="<mask>")


def damage(ids: list[int], recipe: Recipe, markers: Sequence[int], chance: random.Random) -> list[int]:
    """The text with a marker in place of each span that was removed."""
    removed = max(1, round(len(ids) * recipe.noise))
    count = min(max(1, round(removed / recipe.span)), len(markers))
    cuts = [0, *sorted(chance.sample(range(1, removed), count - 1)), removed]
    places = sorted(chance.sample(range(len(ids) - removed + 1), count))
    left: list[int] = []
    position = kept = 0
    for marker, place, start, end in zip(markers, places, cuts, cuts[1:], strict=False):
        left += [*ids[position : position + place - kept], marker]
        position += place - kept
        position += end - start
        kept = place
    return left + ids[position:]


def noise_for(kind: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Callable[..., dict[str, list[int]]]:
    """What turns a text into a training row: removed spans leave one mask token each, in T5 numbered ones."""
    end = tokenizer.eos_token_id
    markers = tokenizer.convert_tokens_to_ids(SENTINELS) if kind == "t5" else [tokenizer.mask_token_id] * len(SENTINELS)

    def make(ids: list[int], chance: random.Random) -> dict[str, list[int]]:
        return {"input_ids": [*damage(ids, recipe, markers, chance), end], "labels": [*ids, end]}

    return make


def build(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model with two layers on each side."""
    common = dict(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if kind == "bart":
        return BartForConditionalGeneration(
            BartConfig(
                **common,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_ffn_dim=4 * WIDTH,
                decoder_ffn_dim=4 * WIDTH,
                max_position_embeddings=256,
                dropout=0.0,
                bos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.eos_token_id,
                forced_eos_token_id=None,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            **common,
            d_kv=WIDTH // HEADS,
            d_ff=4 * WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    pieces: Sequence[list[int]], make: Callable[..., dict[str, list[int]]], collate: Any, recipe: Recipe
) -> Iterator[Any]:
    """Batches of damaged texts, every time damaged anew."""
    chance = random.Random(0)
    for step in range(recipe.steps):
        chosen = [pieces[(step * recipe.rows + row) % len(pieces)] for row in range(recipe.rows)]
        yield collate([make(ids, chance) for ids in chosen])


def pretrain(kind: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, float]:
    """A base that repairs texts, and its loss on the last fifty batches, whose texts it had not seen before."""
    recipe = RECIPES[kind]
    torch.manual_seed(0)
    model = build(kind, tokenizer).train()
    stream = [token for ids in tokenizer(list(documents))["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    pieces = [stream[start : start + recipe.tokens] for start in range(0, len(stream), recipe.tokens)][:-1]
    random.Random(0).shuffle(pieces)
    inner = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in ("shared", "embed", "relative", "lm_head"))
    ]
    chosen = {id(parameter) for parameter in inner}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers = [
        torch.optim.Muon(inner, lr=recipe.muon_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [recipe.muon_rate, recipe.rate]
    losses: list[float] = []
    collate = DataCollatorForSeq2Seq(tokenizer)
    for step, batch in enumerate(batches(pieces, noise_for(kind, tokenizer, recipe), collate, recipe)):
        progress = (step + 1) / recipe.steps
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, progress / 0.05) * (1.0 - progress + 1e-3)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval().requires_grad_(False), sum(losses[-50:]) / len(losses[-50:])
