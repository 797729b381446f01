"""Virtual tokens that are dropped while training: what a row sees, what it learns, and what stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES, supported_attention
from helpers import assert_close, random_model, source_of, tokens
from hidden_reference import hidden_at_layers, logits_without, unseen
from transformers import DynamicCache

from peft_prefix import PrefixConfig, PrefixModel
from peft_prefix.decoder import DecoderInjection
from peft_prefix.hidden_tokens import HiddenTokens, Hiding
from peft_prefix.masks import PrefixColumns

# Its new name is not known to all supported versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
ROWS, P = 3, 5


def inputs_of(family: str, base: Any, rows: int = ROWS) -> dict[str, Any]:
    """A text, or a source and a text, with padding in the first row."""
    if family not in ENCODER_DECODERS:
        mask = torch.ones(rows, 9, dtype=torch.long)
        mask[0, -2:] = 0
        return dict(input_ids=tokens(rows, 9), attention_mask=mask)
    inputs: dict[str, Any] = {**source_of(base, rows), "decoder_input_ids": tokens(rows, 9)}
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -2:] = 0
    return inputs


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was hidden, `(rows, p)`, whenever a site asked for it."""
    found: list[torch.Tensor] = []
    original = HiddenTokens.at

    def at(self: HiddenTokens, *args: Any) -> torch.Tensor | None:
        hidden = original(self, *args)
        if hidden is not None:
            found.append(hidden)
        return hidden

    monkeypatch.setattr(HiddenTokens, "at", at)
    return found


def gradient_slots(model: PrefixModel, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each tensor of the prefix, which virtual tokens get a gradient from each row, `(rows, p)`."""
    found: dict[str, list[torch.Tensor]] = {}
    for row in output:
        model.zero_grad()
        row.float().square().sum().backward(retain_graph=True)
        for name, parameter in model.prefixes.named_parameters():
            assert parameter.grad is not None
            found.setdefault(name, []).append(parameter.grad.abs().sum(dim=(0, 2)) > 0)
    return {name: torch.stack(slots) for name, slots in found.items()}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_a_row_gives_what_the_base_gives_if_a_mask_hides_the_tokens(
    family: str, side: str, attn: str, decisions: list[torch.Tensor]
) -> None:
    model = random_model(FAMILIES[family].build(attn), P, token_dropout=0.5).train()
    length = 12 if side == "none" else 7  # beyond the window, where nothing is padded
    ids, mask = tokens(ROWS, length), torch.ones(ROWS, length, dtype=torch.long)
    if side == "left":
        mask[0, :2] = 0
    elif side == "right":
        mask[0, -2:] = 0
    torch.manual_seed(5)
    logits = model(input_ids=ids, attention_mask=None if side == "none" else mask).logits
    hidden = decisions[0]
    assert hidden.any()
    assert not hidden.all()
    real = mask.bool()
    expected = logits_without(model, hidden, ids, mask)
    assert_close(logits[real].detach(), expected[real])
    open_ones = logits_without(model, torch.zeros_like(hidden), ids, mask)
    assert (open_ones[real] - expected[real]).abs().max() > 1e-2
    for name, slots in gradient_slots(model, logits * mask[..., None]).items():
        assert torch.equal(slots, ~hidden), name


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bart", "t5", "bloom", "falcon_alibi"])
def test_layers_get_masks_that_hide_the_tokens(family: str, attn: str, decisions: list[torch.Tensor]) -> None:
    """Also where positions are counted in the mask: those of all others stay as they are."""
    if attn not in supported_attention(FAMILIES[family]):
        pytest.skip("has no such attention")
    base = FAMILIES[family].build(attn)
    inputs = inputs_of(family, base)
    if family in ENCODER_DECODERS:
        inputs["decoder_attention_mask"] = torch.ones(ROWS, 9, dtype=torch.long)
    model = random_model(base, P, token_dropout=0.5).train()
    torch.manual_seed(5)
    actual = model(**inputs).logits.detach()
    hidden = decisions[0]
    assert all(torch.equal(one, hidden) for one in decisions)
    with torch.no_grad(), hidden_at_layers(model.eval(), dict.fromkeys(model.geometry.sites, hidden)):
        expected = model(**inputs).logits
    assert_close(actual, expected)
    with torch.no_grad():
        assert (model(**inputs).logits - expected).abs().max() > 1e-2


def test_positions_that_are_counted_in_the_cache_stay_as_they_are(decisions: list[torch.Tensor]) -> None:
    """MPT's, whose 2D mask moves nothing: the base itself hides what it says."""
    model = random_model(FAMILIES["mpt"].build(), P, token_dropout=0.5).train()
    ids, cache = tokens(ROWS, 6), DynamicCache()
    actual = model(input_ids=ids).logits.detach()
    for index in range(3):
        keys, values = (
            model.prefix_state_dict()[f"decoder.layers.{index}.{role}"].expand(ROWS, -1, -1, -1)
            for role in ("key", "value")
        )
        cache.update(keys, values, index)
    mask = torch.cat([(~decisions[0]).long(), torch.ones(ROWS, 6, dtype=torch.long)], dim=1)
    with torch.no_grad():
        assert_close(actual, model.base(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_padding_on_the_left_changes_nothing_where_the_prefix_stands_behind_it(
    family: str, decisions: list[torch.Tensor]
) -> None:
    model = random_model(FAMILIES[family].build(), P, token_dropout=0.5).train()
    ids = tokens(1, 6)
    torch.manual_seed(5)
    alone = model(input_ids=ids).logits
    torch.manual_seed(5)
    padded = torch.cat([ids[:, :1].expand(-1, 3), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    behind = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    assert torch.equal(decisions[0], decisions[1])
    assert decisions[0].any()
    assert_close(behind.detach(), alone.detach())


@pytest.mark.parametrize("family", ["bart", "led", "pegasus_x", "whisper"])
def test_an_encoder_that_does_not_see_tokens_is_one_with_a_shorter_prefix(
    family: str, decisions: list[torch.Tensor]
) -> None:
    """Encoders shift nothing, so a token that is hidden might as well not be there, also in hand-written attention."""
    base = FAMILIES[family].build()
    inputs = inputs_of(family, base)
    sites = ("encoder", "cross")
    model = random_model(base, P, token_dropout=0.4, sites=sites).train()
    torch.manual_seed(2)
    actual = model(**inputs).logits.detach()
    hidden, state = decisions[0], model.prefix_state_dict()
    assert hidden.any()
    for row in range(ROWS):
        seen = ~hidden[row]
        shorter = random_model(base, int(seen.sum()), sites=sites).eval()
        shorter.prefixes["default"].start_from({name: tensor[:, seen] for name, tensor in state.items()})
        with torch.no_grad():
            expected = shorter(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        assert_close(actual[row : row + 1], expected)


@pytest.mark.parametrize("family", ["prophetnet", "longt5_global", "t5gemma", "qwen3_next", "gpt_neo", "gemma3n_text"])
def test_hidden_tokens_learn_nothing_from_a_row(family: str, decisions: list[torch.Tensor]) -> None:
    base = FAMILIES[family].build()
    model = random_model(base, P, token_dropout=0.5).train()
    torch.manual_seed(1)
    logits = model(**inputs_of(family, base)).logits
    assert decisions[0].any()
    for name, slots in gradient_slots(model, logits).items():
        assert torch.equal(slots, ~decisions[0]), name


def test_slots_that_are_hidden_leave_positions_as_they_are(decisions: list[torch.Tensor]) -> None:
    """ProphetNet's: its one token is hidden, and the text still starts behind it."""
    base = FAMILIES["prophetnet"].build()
    model = random_model(base, 1, token_dropout=0.9999, sites=("decoder",)).train()
    source, ids = source_of(base, 1), tokens(1, 6)
    actual = model(**source, decoder_input_ids=ids).logits.detach()
    assert decisions[0].all()
    mask = torch.tensor([[0] + [1] * 6])
    with torch.no_grad():
        expected = base.eval()(
            **source, decoder_input_ids=torch.cat([ids[:, :1], ids], dim=1), decoder_attention_mask=mask
        ).logits[:, 1:]
    assert_close(actual, expected)


def test_the_share_of_hidden_tokens_is_the_rate_in_every_row_and_place() -> None:
    model = random_model(FAMILIES["llama"].build(), 40, token_dropout=0.3).train()
    torch.manual_seed(0)
    ids = tokens(50, 2)
    hidden = torch.stack(
        [unseen(model(input_ids=ids, output_attentions=True).attentions, 40) for _ in range(5)]
    ).float()
    assert hidden.mean() == pytest.approx(0.3, abs=0.02)
    assert hidden.mean(dim=(0, 1)).min() > 0.15  # 250 rows for each token
    assert hidden.mean(dim=(0, 1)).max() < 0.45
    assert not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0, 0], hidden[0, 1])


def test_seeds_decide_what_is_hidden() -> None:
    model = random_model(FAMILIES["llama"].build(), P, token_dropout=0.5).train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(input_ids=tokens(ROWS, 4)).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_without_dropped_tokens_no_mask_is_made(attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    original = DecoderInjection.enter

    def enter(self: DecoderInjection, *args: Any) -> dict[str, Any]:
        entered = original(self, *args)
        masks.append(entered.get("attention_mask"))
        return entered

    monkeypatch.setattr(DecoderInjection, "enter", enter)
    base = FAMILIES["llama"].build(attn)
    ids, state = tokens(2, 6), torch.get_rng_state()
    plain = random_model(base, P).train()(input_ids=ids).logits
    assert masks[-1] is None
    assert torch.equal(torch.get_rng_state(), state)
    dropping = random_model(base, P, token_dropout=0.5)
    assert torch.equal(dropping.eval()(input_ids=ids).logits, plain)
    assert masks[-1] is None
    dropping.train()(input_ids=ids)
    assert masks[-1] is not None
    assert PrefixColumns(P).all_exist
    assert not Hiding(P).acts


def test_evaluation_and_generation_see_all() -> None:
    base = FAMILIES["llama"].build()
    plain, dropping = random_model(base, P), random_model(base, P, token_dropout=0.9)
    ids = tokens(2, 5)
    expected = plain.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    for training in (False, True):
        dropping.train(training)
        assert torch.equal(dropping.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(dropping.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.equal(dropping.train()(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    ("family", "sites"),
    [("llama", None), ("gemma3_text", None), ("bloom", None), ("bart", None), ("bart", ("cross",)), ("led", None)],
)
def test_layers_that_run_again_hide_the_same(family: str, sites: Any, reentrant: bool) -> None:
    kwargs = dict(FAMILIES[family].kwargs)
    if family == "bart":
        kwargs |= dict(dropout=0.2)  # so that the random state in the second run matters
    base = type(FAMILIES[family])(FAMILIES[family].config, FAMILIES[family].model, kwargs).build()
    model = random_model(base, P, token_dropout=0.5, dropout=0.2, sites=sites).train()

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(4)
        loss = model(**inputs_of(family, base)).logits.square().mean()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.prefixes.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), gradients

    loss, gradients = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again, others = step()
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            others[name], gradient, rtol=1e-4, atol=2e-6 * max(float(gradient.abs().max()), 1e-3)
        )


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_every_row_has_the_rate_of_its_own_prefix(family: str) -> None:
    model = random_model(FAMILIES[family].build(), 6, token_dropout=0.9)
    model.add_prefix("short", PrefixConfig(num_virtual_tokens=2, init="normal", init_std=1.0, token_dropout=0.9))
    model.add_prefix("all", PrefixConfig(num_virtual_tokens=4, init="normal", init_std=1.0))
    model.train()
    names, seen = ["default", "short", "all", None], []
    for seed in range(20):
        torch.manual_seed(seed)
        attentions = model(input_ids=tokens(4, 3), prefix_names=names, output_attentions=True).attentions
        seen.append(~unseen(attentions, 6))
    share = torch.stack(seen).float().mean(dim=0)
    assert share[0].max() < 0.4
    assert share[0].mean() > 0.02
    assert share[1, :4].max() == 0
    assert 0 < share[1, 4:].mean() < 0.4
    assert share[2].tolist() == [0, 0, 1, 1, 1, 1]
    assert share[3].max() == 0


def test_packed_texts_of_a_row_miss_the_same_tokens() -> None:
    model = random_model(FAMILIES["llama"].build(), P, token_dropout=0.5).train()
    texts = tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    torch.manual_seed(1)
    output = model(input_ids=texts, position_ids=positions, output_attentions=True)
    hidden = unseen(output.attentions, P)
    assert hidden.any()
    for part in (slice(0, 4), slice(4, 9)):
        expected = logits_without(model, hidden, texts[:, part])
        assert_close(output.logits[:, part].detach(), expected)
