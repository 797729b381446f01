"""A prefix of solved examples: what fills it, and that a row does not see itself in it while it is trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, tokens
from hidden_reference import hidden_at_layers, logits_without, unseen
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import Trainer, TrainingArguments

from peft_prefix import (
    PrefixConfig,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixModel,
    PrefixWarning,
    PromptTargetCollator,
    get_prefix_model,
)

TEXTS = [
    dict(prompt="name : Blue Spice | food : Thai", target="Blue Spice serves Thai food ."),
    dict(prompt="name : Punter | Type : pub", target="Punter is a pub ."),
    dict(prompt="name : Golden Palace", target="Golden Palace is cheap ."),
]
INSTRUCTION = "the price in the city :"


def make(family: str = "llama", p: int = 60, rows: Any = TEXTS, adds: str = "", **config: Any) -> PrefixModel:
    """A model whose prefix is made of demonstrations, without a warning of how many fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .* demonstrations have", PrefixWarning)
        return get_prefix_model(
            FAMILIES[family].build(),
            PrefixConfig(num_virtual_tokens=p, init="demonstrations", **config),
            tiny_tokenizer(adds=adds),
            demonstrations=rows,
        )


def encoded(model: PrefixModel, adds: str = "") -> list[dict[str, list[int]]]:
    """The demonstrations as training encodes them."""
    collator = PromptTargetCollator(tiny_tokenizer(adds=adds), model)
    return [collator.encode(row) for row in TEXTS]


def states_of(base: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """Independent of the library: the base's own cache."""
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    return {
        f"decoder.layers.{index}.{role}": getattr(layer, f"{role}s")[0]
        for index, layer in enumerate(cache.layers)
        for role in ("key", "value")
    }


def assert_holds(model: PrefixModel, ids: list[int]) -> None:
    assert model.prefixes.entry().config.num_virtual_tokens == len(ids)
    state = model.prefix_state_dict()
    for name, tensor in states_of(model.base, ids).items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_the_prefix_reads_the_instruction_and_the_demonstrations(adds: str) -> None:
    """One beginning, and behind each demonstration the end token that training puts there."""
    tokenizer = tiny_tokenizer(adds=adds)
    start = [1] if adds else []
    rows = [row["input_ids"][len(start) :] for row in encoded(make(), adds)]
    assert all(row[-1] == 2 for row in rows)
    instruction = tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"]
    whole = [*start, *instruction, *rows[0], *rows[1], *rows[2]]
    assert_holds(make(p=len(whole), adds=adds, init_text=INSTRUCTION), whole)
    # the first demonstrations are used again as far as there is room, and the beginning of all is lost
    more = [*start, *[*rows[0], *rows[1], *rows[2], *rows[0]][-50:]]
    assert_holds(make(p=len(more), adds=adds), more)


def test_the_last_demonstrations_stay_whole_and_a_warning_counts_them() -> None:
    rows = [row["input_ids"] for row in encoded(make())]
    config = PrefixConfig(num_virtual_tokens=len(rows[1]) + len(rows[2]) + 3, init="demonstrations")
    total = sum(map(len, rows))
    with pytest.warns(
        PrefixWarning, match=rf"3 demonstrations have {total} tokens, .*: the last 3 are used, 2 of them"
    ):
        model = get_prefix_model(FAMILIES["llama"].build(), config, tiny_tokenizer(), demonstrations=TEXTS)
    assert_holds(model, [*rows[0][-3:], *rows[1], *rows[2]])
    with pytest.warns(PrefixWarning, match=rf"not a single one fits whole, .* num_virtual_tokens={total} to use them"):
        model = get_prefix_model(
            model.base, config.replace(num_virtual_tokens=4), tiny_tokenizer(), demonstrations=TEXTS
        )
    assert_holds(model, rows[2][-4:])
    kept = model.state_dict()["prefixes.default.demonstrations._extra_state"].tolist()
    assert kept == [len(rows[2]), -1, 4, 0, *rows[2], 0, 1, 2, 3]  # one without a place is not looked for
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_prefix_model(model.base, config.replace(num_virtual_tokens=total), tiny_tokenizer(), demonstrations=TEXTS)


def test_rows_may_come_encoded_and_without_a_tokenizer() -> None:
    model = make()
    rows = encoded(model)
    padded = [
        dict(
            input_ids=torch.tensor([0, *row["input_ids"]]),
            labels=row["labels"],
            attention_mask=[0] + [1] * len(row["input_ids"]),
        )
        for row in rows
    ]
    config = model.prefixes.entry().config
    for given in (rows, iter(padded)):
        other = get_prefix_model(FAMILIES["llama"].build(), config, demonstrations=given)
        for name, tensor in model.prefix_state_dict().items():
            assert torch.equal(other.prefix_state_dict()[name], tensor)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_each_site_gets_activations_of_its_own_kind(family: str) -> None:
    """Sources in the encoder and in cross-attention; in the decoder targets, written about those sources."""
    model = make(family, 30, adds="eos", init_text=INSTRUCTION)
    base, rows = model.base, encoded(model, "eos")
    instruction = tiny_tokenizer()(INSTRUCTION, add_special_tokens=False)["input_ids"]
    sources = [token for row in rows for token in row["input_ids"]] * 3
    copies = [row["input_ids"] for row in rows]
    while sum(map(len, copies)) < 30 - len(instruction):
        copies.append(copies[len(copies) - 3])
    sources = [token for row in copies for token in row][-(30 - len(instruction)) :]
    written = [row["labels"] for row in rows]
    while sum(map(len, written)) < 29:
        written.append(written[len(written) - 3])
    target = [base.config.decoder_start_token_id, *[token for row in written for token in row][-29:]]
    with torch.no_grad():
        cache = base(
            input_ids=torch.tensor([instruction + sources]), decoder_input_ids=torch.tensor([target]), use_cache=True
        ).past_key_values
    state = model.prefix_state_dict()
    for site, kept in (("decoder", cache.self_attention_cache), ("cross", cache.cross_attention_cache)):
        for index, layer in enumerate(kept.layers):
            torch.testing.assert_close(state[f"{site}.layers.{index}.key"], layer.keys[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(state[f"{site}.layers.{index}.value"], layer.values[0], rtol=0, atol=1e-6)
    text = get_prefix_model(
        base,
        PrefixConfig(num_virtual_tokens=30, init="text", sites=("encoder",)),
        input_ids=torch.tensor(instruction + sources),
    ).prefix_state_dict()
    for name, tensor in text.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize(
    ("config", "given", "error", "message"),
    [
        ({}, {}, PrefixConfigError, "needs them: pass demonstrations="),
        ({}, dict(demonstrations=TEXTS), PrefixConfigError, "needs a tokenizer to read texts"),
        (dict(init="vocabulary"), dict(demonstrations=TEXTS), PrefixConfigError, 'use init="demonstrations"'),
        ({}, dict(demonstrations=[]), PrefixInputError, "demonstrations is empty"),
        ({}, dict(demonstrations="text"), PrefixInputError, "is a list of rows, not 'text'"),
        ({}, dict(demonstrations=["text"]), PrefixInputError, "is a row with prompt and target, not 'text'"),
        ({}, dict(demonstrations=[dict(input_ids=[[1]])]), PrefixInputError, "one row of at least one real token id"),
        ({}, dict(demonstrations=[dict(input_ids=[])]), PrefixInputError, "one row of at least one real token id"),
        (
            dict(init_text="the " * 8),
            dict(tokenizer=tiny_tokenizer(), demonstrations=TEXTS),
            PrefixConfigError,
            "no room",
        ),
        ({}, dict(tokenizer=tiny_tokenizer(), demonstrations=[dict(a=1)]), PrefixInputError, "this one has 'a'"),
        ({}, dict(input_ids=torch.tensor([5]), demonstrations=[dict(input_ids=[5])]), PrefixConfigError, 'init="text"'),
    ],
)
@pytest.mark.filterwarnings("ignore:The .* demonstrations have")
def test_what_is_lacking_is_named(config: dict[str, Any], given: dict[str, Any], error: Any, message: str) -> None:
    fields = dict(num_virtual_tokens=8, init="demonstrations")
    with pytest.raises(error, match=message):
        get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(**{**fields, **config}), **given)


def test_models_that_read_no_text_take_no_demonstrations() -> None:
    with pytest.raises(PrefixConfigError, match="reads input_features"):
        make("whisper", 4)


def batch(model: PrefixModel, side: str, adds: str = "") -> dict[str, torch.Tensor]:
    """The second demonstration, a row that is none, and the last demonstration."""
    collator = PromptTargetCollator(tiny_tokenizer(adds=adds), model)
    other = dict(prompt="name : Blue Spice | food : Thai", target="the food is cheap .")
    rows = collator([TEXTS[1], other, TEXTS[2]])
    if side == "right":
        return rows
    lengths = rows["attention_mask"].sum(dim=1)
    return {
        name: torch.stack([row.roll(len(row) - int(n)) for row, n in zip(tensor, lengths, strict=True)])
        for name, tensor in rows.items()
    }


def own_slots(model: PrefixModel, adds: str = "") -> torch.Tensor:
    """By hand: where the second, no and the last demonstration stand in a prefix that ends with the last, `(3, p)`."""
    p = model.prefixes.entry().config.num_virtual_tokens
    lengths = [len(row["input_ids"]) - ("bos" in adds) for row in encoded(model, adds)]
    hidden = torch.zeros(3, p, dtype=torch.bool)
    hidden[0, p - lengths[1] - lengths[2] : p - lengths[2]] = True
    hidden[2, p - lengths[2] :] = True
    return hidden


@pytest.mark.parametrize("adds", ["", "bos"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["none", "mlp"])
def test_a_row_does_not_see_itself(form: str, side: str, adds: str) -> None:
    model = make(p=28, adds=adds, reparameterization=form, mlp_hidden_size=8).train()
    inputs, hidden = batch(model, side, adds), own_slots(model, adds)
    output = model(**inputs, output_attentions=True)
    real = inputs["attention_mask"].bool()
    assert torch.equal(unseen(output.attentions, 28), hidden)
    model.label_only_logits = False
    logits = model(**inputs).logits
    expected = logits_without(model, hidden, inputs["input_ids"], inputs["attention_mask"])
    assert_close(logits[real].detach(), expected[real])
    if form == "none":
        for row in range(3):
            model.zero_grad()
            logits[row].square().sum().backward(retain_graph=True)
            for name, parameter in model.prefixes.named_parameters():
                assert torch.equal(parameter.grad.abs().sum(dim=(0, 2)) == 0, hidden[row]), name
    model.eval()
    assert not unseen(model(**inputs, output_attentions=True).attentions, 28).any()


def test_it_can_be_switched_off_and_is_off_without_ids() -> None:
    model = make(p=28, leave_one_out=False).train()
    inputs = batch(model, "right")
    assert not unseen(model(**inputs, output_attentions=True).attentions, 28).any()
    assert not any("demonstrations" in key for key in model.state_dict())
    model = make(p=28).train()
    embedded = model.base.get_input_embeddings()(inputs.pop("input_ids"))
    assert not unseen(model(inputs_embeds=embedded, **inputs, output_attentions=True).attentions, 28).any()


def test_every_copy_of_a_demonstration_is_hidden_and_dropped_tokens_beside_them() -> None:
    model = make(p=60)
    lengths = [len(row["input_ids"]) for row in encoded(model)]
    assert sum(lengths) < 60 - 2
    inputs = batch(model, "right")
    owners = torch.tensor([*[0] * lengths[0], *[1] * lengths[1], *[2] * lengths[2]] * 2)
    count = next(n for n in range(3, 7) if sum((lengths * 2)[:n]) >= 60)
    owners = owners[: sum((lengths * 2)[:count])][-60:]
    expected = torch.stack([owners == 1, owners == 9, owners == 2])
    hidden = unseen(model.train()(**inputs, output_attentions=True).attentions, 60)
    assert torch.equal(hidden, expected)
    both = make(p=60, token_dropout=0.5, freeze_first_token=True).train()
    torch.manual_seed(0)
    more = unseen(both(**inputs, output_attentions=True).attentions, 60)
    assert more[expected].all()
    assert 0.3 < more[1].float().mean() < 0.7
    assert not more[1, 0]


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_sources_and_targets_are_hidden_where_they_are(family: str, smoothed: bool) -> None:
    """With label smoothing the model gets no labels, and rows are recognized by what the decoder reads."""
    model = make(family, 24, adds="eos").train()
    inputs = batch(model, "right", "eos")
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    same_source = dict(TEXTS[1], target="the pub is cheap .")
    collator = PromptTargetCollator(tiny_tokenizer(adds="eos"), model)
    other = collator([same_source, TEXTS[1]])
    rows = encoded(model, "eos")
    hidden = {site: torch.zeros(3, 24, dtype=torch.bool) for site in ("encoder", "cross", "decoder")}
    sources, targets = [len(row["input_ids"]) for row in rows], [len(row["labels"]) for row in rows]

    def places(lengths: list[int], opening: int) -> torch.Tensor:
        order = [owner for number in range(9) for owner in [number % 3] * lengths[number % 3]]
        ends = [sum((lengths * 3)[: number + 1]) for number in range(9)]
        end = next(end for number, end in enumerate(ends) if number >= 2 and end >= 24 - opening)
        return torch.tensor([-1] * opening + order[:end][-(24 - opening) :])

    for site, owners in (
        ("encoder", places(sources, 0)),
        ("cross", places(sources, 0)),
        ("decoder", places(targets, 1)),
    ):
        hidden[site][0], hidden[site][2] = owners == 1, owners == 2
    model.label_only_logits = False
    if smoothed:
        del inputs["labels"], other["labels"]
    actual = model(**inputs).logits
    with torch.no_grad(), hidden_at_layers(model.eval(), hidden):
        expected = model(**inputs).logits
    assert_close(actual.detach(), expected)
    model.zero_grad()
    actual[0].square().sum().backward()
    for name, parameter in model.prefixes.named_parameters():
        site = name.split(".")[1]
        assert torch.equal(parameter.grad.abs().sum(dim=(0, 2)) == 0, hidden[site][0]), name
    # the same source with another target is another row
    attentions = model.train()(**other, output_attentions=True).decoder_attentions
    assert unseen(attentions, 24).any(dim=1).tolist() == [False, True]


def test_rows_of_other_prefixes_are_not_touched() -> None:
    model = make(p=28)
    expected = own_slots(model)
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=30, init="normal"))
    inputs = batch(model.train(), "right")
    names = ["other", "default", "default"]
    hidden = unseen(model(**inputs, prefix_names=names, output_attentions=True).attentions, 30)
    assert not hidden[0].any()
    assert not hidden[1, 2:].any()
    assert torch.equal(hidden[2, 2:], expected[2])


def trainer(model: PrefixModel, folder: Path, steps: int) -> Trainer:
    """A trainer over the demonstrations themselves."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = PromptTargetCollator(tiny_tokenizer(), model)
    return Trainer(model, arguments, train_dataset=encoded(model), data_collator=collator)


def hides(model: PrefixModel) -> bool:
    """Whether the demonstrations are hidden from themselves, and are where they should be."""
    hidden = unseen(model.train()(**batch(model, "right"), output_attentions=True).attentions, 28)
    assert not hidden.any() or torch.equal(hidden, own_slots(model))
    return bool(hidden.any())


def test_a_training_that_goes_on_still_hides_them(tmp_path: Path) -> None:
    whole = make(p=28, token_dropout=0.2)
    trainer(whole, tmp_path / "runs", 4).train()
    resumed = make(p=28, rows=TEXTS[:1], token_dropout=0.2)
    trainer(resumed, tmp_path / "resumed", 4).train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    for name, tensor in whole.prefix_state_dict().items():
        assert torch.equal(resumed.prefix_state_dict()[name], tensor)
    plain = make(p=28)
    plain.load_state_dict(whole.state_dict())
    assert hides(plain)
    loaded = PrefixModel.from_pretrained(
        FAMILIES["llama"].build(), tmp_path / "runs" / "checkpoint-4", name="mine", is_trainable=True
    )
    entry = loaded.prefixes.entry()
    entry.config = entry.config.replace(token_dropout=0.0)
    assert hides(loaded)


def test_the_published_file_has_none_of_them(tmp_path: Path) -> None:
    model = make(p=28)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "prefix.safetensors", framework="pt") as content:
        assert set(content.keys()) == set(model.geometry.tensor_shapes(28))
        assert "Punter" not in str(content.metadata())
    assert not (tmp_path / "model.safetensors").exists()
    frozen = PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    assert not hides(frozen)
    with pytest.warns(PrefixWarning, match="does not say which demonstrations it was made of"):
        loaded = PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, is_trainable=True)
    assert not hides(loaded)
    loaded.initialize_prefix(text="the", demonstrations=TEXTS[1:], tokenizer=tiny_tokenizer())
    assert loaded.prefixes.entry().config.init_text == "the"
    assert unseen(loaded.train()(**batch(loaded, "right"), output_attentions=True).attentions, 28)[0].any()
    loaded.initialize_prefix(text=INSTRUCTION, tokenizer=tiny_tokenizer())
    assert not hides(loaded)
    assert not any("demonstrations" in key for key in loaded.state_dict())


@pytest.mark.filterwarnings("ignore:The .* demonstrations have")
def test_several_prefixes_of_a_checkpoint_find_their_own(tmp_path: Path) -> None:
    model = make(p=28)
    model.add_prefix("other", model.prefixes.entry().config, tokenizer=tiny_tokenizer(), demonstrations=encoded(model))
    model.set_prefix(None)
    folder = tmp_path / "checkpoint-7"
    model.save_pretrained(folder)
    base = FAMILIES["llama"].build()
    loaded = PrefixModel.from_pretrained(base, folder / "other", is_trainable=True)
    assert hides(loaded)
    state = load_file(folder / "model.safetensors")
    key = "prefixes.other.demonstrations._extra_state"
    for damaged in (torch.tensor([5, -1, 0]), state[key][:-1], torch.tensor([1, -1, 1, 0, 7, 99]), torch.zeros(3)):
        save_file({**state, key: damaged}, folder / "model.safetensors", {"peft_prefix": "training state"})
        with pytest.raises(PrefixFileError, match="what it says about demonstrations does not fit"):
            PrefixModel.from_pretrained(base, folder / "other", is_trainable=True)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PrefixFileError, match="is damaged"):
        PrefixModel.from_pretrained(base, folder / "other", is_trainable=True)


def test_a_packed_row_does_not_see_the_demonstrations_that_it_holds() -> None:
    model = make(p=28)
    rows = [row["input_ids"] for row in encoded(model)]
    packed = torch.tensor([[*tokens(1, 4)[0].tolist(), *rows[1]]])
    positions = torch.tensor([[*range(4), *range(len(rows[1]))]])
    hidden = unseen(model.train()(input_ids=packed, position_ids=positions, output_attentions=True).attentions, 28)
    assert torch.equal(hidden[0], own_slots(model)[0])
