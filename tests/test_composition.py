"""New prefixes out of others: one after another, their mean, and a start from another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from helpers import assert_close, cache_of_tokens, model_with_states, pinned_masks, random_model, source_of, tokens
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixInputError, PrefixModel, get_prefix_model
from peft_prefix.parameterization import StoredPrefix
from peft_prefix.recording import States, record
from peft_prefix.structure import find_structure


def random(p: int, seed: int, **config: Any) -> PrefixConfig:
    return PrefixConfig(**{"num_virtual_tokens": p, "init": "normal", "init_std": 1.0, "init_seed": seed, **config})


def three(base: PreTrainedModel | None = None, **config: Any) -> PrefixModel:
    """A model with the prefixes `a`, `b` of four virtual tokens and `c` of two."""
    model = PrefixModel(FAMILIES["llama"].build() if base is None else base)
    for seed, (name, p) in enumerate([("a", 4), ("b", 4), ("c", 2)]):
        model.add_prefix(name, random(p, seed, **config))
    return model


def state(model: PrefixModel, name: str) -> dict[str, torch.Tensor]:
    return model.prefix_state_dict(name)


def of_caches(base: PreTrainedModel, caches: list[Any], lengths: list[int], **config: Any) -> PrefixModel:
    """A model with a prefix for each cache, and the concatenation of all as the active one."""
    model = PrefixModel(base)
    for number, (cache, p) in enumerate(zip(caches, lengths, strict=True)):
        model.add_prefix(str(number), PrefixConfig(num_virtual_tokens=p, init="cache", **config), past_key_values=cache)
    model.concatenate_prefixes(list(model.prefixes), "all")
    return model


def in_a_row(caches: list[Any], rows: int) -> DynamicCache:
    """By hand: a cache with the keys and values of several, one after another, for some rows."""
    result = DynamicCache()
    for index in range(len(caches[0].layers)):
        keys, values = (
            torch.cat([getattr(cache.layers[index], role) for cache in caches], dim=2) for role in ("keys", "values")
        )
        result.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "deepseek_v3", "gemma3_text"])
def test_a_concatenation_is_the_base_behind_a_cache_of_both(family: str) -> None:
    base = FAMILIES[family].build()
    caches = [cache_of_tokens(base, tokens(1, p, seed=p)) for p in (3, 2)]
    length = 3 if FAMILIES[family].sliding else 9  # all fits the window
    model, text = of_caches(base, caches, [3, 2]), tokens(2, length)
    positions = torch.arange(5, 5 + length).expand(2, -1)
    with torch.no_grad():
        expected = base(input_ids=text, past_key_values=in_a_row(caches, 2), position_ids=positions).logits
        as_text = base(input_ids=torch.cat([tokens(2, 5), text], dim=1)).logits[:, 5:]
        assert_close(model(input_ids=text).logits, expected)
    assert (expected - as_text).abs().max() > 1e-2
    assert model.prefixes.entry().config.num_virtual_tokens == 5


def test_every_part_of_a_concatenation_stays_visible_beyond_windows() -> None:
    base = FAMILIES["gemma3_text"].build()
    caches, text = [cache_of_tokens(base, tokens(1, p, seed=p)) for p in (3, 2)], tokens(2, 20)
    model = of_caches(base, caches, [3, 2])
    masks = pinned_masks(base, 5, 20)
    assert isinstance(masks, dict)
    by_hand = {kind: mask[:, :, 5:] for kind, mask in masks.items()}
    positions = torch.arange(5, 25).expand(2, -1)
    with torch.no_grad():
        expected = base(
            input_ids=text, past_key_values=in_a_row(caches, 2), position_ids=positions, attention_mask=by_hand
        ).logits
        assert_close(model(input_ids=text).logits, expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_concatenation_in_an_encoder_decoder_is_the_base_behind_caches_of_both(family: str) -> None:
    base = FAMILIES[family].build()
    source, text = source_of(base, 2), tokens(2, 6)
    caches = []
    for p in (3, 2):
        with torch.no_grad():  # decoder prefixes of `p` tokens, read behind a source of `p` tokens
            ids = tokens(1, p, seed=p)
            caches.append(base(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values)
    model = of_caches(base, caches, [3, 2], sites=("decoder", "cross"))
    with torch.no_grad():
        encoded = base.get_encoder()(**source)
        own = base(encoder_outputs=encoded, decoder_input_ids=text[:, :1], use_cache=True).past_key_values
        cross = in_a_row([_expanded(cache.cross_attention_cache) for cache in caches] + [own.cross_attention_cache], 2)
        past = EncoderDecoderCache(in_a_row([cache.self_attention_cache for cache in caches], 2), cross)
        expected = base(encoder_outputs=encoded, decoder_input_ids=text, past_key_values=past).logits
        actual = model(encoder_outputs=encoded, decoder_input_ids=text).logits
        plain = base(encoder_outputs=encoded, decoder_input_ids=text).logits
    assert_close(actual, expected)
    assert (expected - plain).abs().max() > 1e-2


def _expanded(cache: DynamicCache) -> DynamicCache:
    return in_a_row([cache], 2)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_concatenation_at_every_site_is_a_prefix_of_the_concatenated_states(family: str) -> None:
    base = FAMILIES[family].build()
    source, text = source_of(base, 2), tokens(2, 6)
    states: list[States] = []
    for p in (3, 2):
        ids = tokens(1, p, seed=p)
        states.append(record(base, find_structure(base), {"input_ids": ids, "decoder_input_ids": ids}))
    model = model_with_states(base, states[0], 3)
    model.add_prefix("second", PrefixConfig(num_virtual_tokens=2, init="zeros"))
    loaded = model_with_states(base, states[1], 2).prefix_state_dict()
    model.prefixes.entry("second").module.start_from(loaded)
    model.concatenate_prefixes(["default", "second"], "both")
    joined: States = {
        site: [
            None
            if one is None or other is None
            else (torch.cat([one[0], other[0]], 2), torch.cat([one[1], other[1]], 2))
            for one, other in zip(states[0][site], states[1][site], strict=True)
        ]
        for site in states[0]
    }
    by_hand = model_with_states(base, joined, 5)
    with torch.no_grad():
        arguments = dict(source, decoder_input_ids=text)
        assert torch.equal(model(**arguments).logits, by_hand(**arguments).logits)


def test_in_a_concatenation_order_matters_only_where_the_cache_counts() -> None:
    """With positions in the keys or none at all, attention sees a set; a bias by distance counts entries."""
    text = tokens(2, 6)
    for family, same in (("llama", True), ("gpt2", True), ("bloom", False), ("mpt", False)):
        model = three(FAMILIES[family].build())
        model.concatenate_prefixes(["a", "c"], "ac")
        model.concatenate_prefixes(["c", "a"], "ca")
        with torch.no_grad():
            one, other = (model(input_ids=text, prefix_names=[name] * 2).logits for name in ("ac", "ca"))
        assert torch.allclose(one, other, atol=1e-5) is same, family


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (None, (0.5, 0.5)),
        ([1, 1], (0.5, 0.5)),
        ([3, 1], (0.75, 0.25)),
        ([2.0, -1.0], (2.0, -1.0)),
        ((0, 5), (0.0, 1.0)),
    ],
)
def test_an_average_is_the_mean_by_hand(weights: Any, shares: tuple[float, float]) -> None:
    model = three()
    a, b = state(model, "a"), state(model, "b")
    model.average_prefixes(["a", "b"], "mean", weights=weights)
    for name, tensor in state(model, "mean").items():
        expected = (shares[0] * a[name].double() + shares[1] * b[name].double()).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        by_hand = {name: shares[0] * a[name] + shares[1] * b[name] for name in a}
        model.prefixes.entry("a").module.start_from(by_hand)
        text = tokens(2, 7)
        assert_close(
            model(input_ids=text, prefix_names=["mean"] * 2).logits,
            model(input_ids=text, prefix_names=["a"] * 2).logits,
        )


def test_an_average_of_three_by_generator_and_numpy_weights() -> None:
    model = three()
    model.add_prefix("d", random(4, 9))
    model.average_prefixes((name for name in "abd"), "mean", weights=np.array([1.0, 2.0, 1.0], dtype=np.float32))
    parts = [state(model, name)["decoder.layers.1.value"] for name in "abd"]
    expected = (parts[0] + 2 * parts[1] + parts[2]) / 4
    torch.testing.assert_close(state(model, "mean")["decoder.layers.1.value"], expected)


def classifier() -> PrefixModel:
    """Two prefixes with heads of their own, and one without."""
    sizes = dict(FAMILIES["llama"].kwargs, num_labels=3)
    base = LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()  # type: ignore[arg-type]
    model = get_prefix_model(base, random(3, 0))
    model.add_prefix("other", random(3, 1))
    model.add_prefix("headless", random(3, 2, modules_to_save=()))
    with torch.no_grad():
        for name in ("default", "other"):
            model.prefixes.entry(name).weights.get_parameter("score.weight").normal_()
    return model


def test_heads_are_averaged_and_not_concatenated() -> None:
    model = classifier()
    model.average_prefixes(["default", "other"], "mean", weights=[1, 3])
    key = "modules_to_save.score.weight"
    expected = 0.25 * state(model, "default")[key] + 0.75 * state(model, "other")[key]
    torch.testing.assert_close(state(model, "mean")[key], expected)
    assert model.prefixes.entry("mean").weights.get_parameter("score.weight").requires_grad
    with pytest.raises(PrefixConfigError, match=r"different modules_to_save: score\.weight and none"):
        model.average_prefixes(["default", "headless"], "x")
    with pytest.raises(PrefixConfigError, match=r"'other' has weights of its own for score.*average_prefixes"):
        model.concatenate_prefixes(["headless", "other"], "x")
    model.add_prefix("headless_too", random(2, 5, modules_to_save=()))
    model.concatenate_prefixes(["headless", "headless_too"], "both")
    assert not [key for key in state(model, "both") if key.startswith("modules_to_save")]


def test_a_new_prefix_is_active_and_independent_of_its_parts() -> None:
    for compose in ("concatenate_prefixes", "average_prefixes"):
        model = three()
        before = {name: state(model, name) for name in "abc"}
        getattr(model, compose)(["a", "b"], "new")
        assert model.active_prefix == "new"
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss.backward()
        learning = {name.split(".")[0] for name, p in model.prefixes.named_parameters() if p.grad is not None}
        assert learning == {"new"}
        changed = state(model, "new")
        optimizer.step()
        assert all(not torch.equal(tensor, changed[key]) for key, tensor in state(model, "new").items())
        for name, tensors in before.items():
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in state(model, name).items())


def test_a_new_prefix_may_be_frozen() -> None:
    model = three()
    model.concatenate_prefixes(["a", "c"], "both", is_trainable=False)
    assert isinstance(model.prefixes["both"], StoredPrefix)
    model.average_prefixes(["a", "b"], "mean", is_trainable=False)
    assert not list(model.prefixes["mean"].parameters())
    expected = torch.cat([state(model, "a")["decoder.layers.0.key"], state(model, "c")["decoder.layers.0.key"]], dim=1)
    assert torch.equal(state(model, "both")["decoder.layers.0.key"], expected)


def test_saved_and_loaded_and_named_for_rows(tmp_path: Path) -> None:
    model, text = three(dropout=0.1), tokens(4, 6)
    model.concatenate_prefixes(["a", "c"], "both")
    model.average_prefixes(["a", "b"], "mean")
    model.add_prefix("copy", PrefixConfig(num_virtual_tokens=2, init="prefix"), initial_prefix="c")
    model.eval()
    new = ["both", "mean", "copy"]
    for name in new:
        model.save_pretrained(tmp_path / name, prefix_name=name)
    config = json.loads((tmp_path / "both" / "prefix_config.json").read_text())
    assert (config["init"], config["num_virtual_tokens"], config["dropout"]) == ("prefix", 6, 0.1)
    loaded = PrefixModel.from_pretrained(model.base, tmp_path / "both", name="both")
    for name in new[1:]:
        loaded.load_prefix(tmp_path / name, name, is_trainable=name == "copy")
    names = [*new, None]
    with torch.no_grad():
        together = model(input_ids=text, prefix_names=names).logits
        assert torch.equal(loaded(input_ids=text, prefix_names=names).logits, together)
        for row, name in enumerate(names):
            assert_close(model(input_ids=text[row : row + 1], prefix_names=[name]).logits, together[row : row + 1])


def test_a_rounded_and_a_full_prefix_lose_nothing(tmp_path: Path) -> None:
    model = three()
    model.save_pretrained(tmp_path / "a", prefix_name="a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "b", prefix_name="b", dtype=torch.float16)
    model.load_prefix(tmp_path / "a", "bf16", device="cpu")
    model.load_prefix(tmp_path / "b", "fp16")
    key = "decoder.layers.2.value"
    rounded = [state(model, "bf16")[key], state(model, "fp16")[key], state(model, "b")[key]]
    model.concatenate_prefixes(["bf16", "fp16", "b"], "row", is_trainable=False)
    assert torch.equal(state(model, "row")[key], torch.cat([one.float() for one in rounded], dim=1))
    model.average_prefixes(["bf16", "fp16", "b"], "mean", is_trainable=False)
    torch.testing.assert_close(state(model, "mean")[key], sum(one.float() for one in rounded) / 3)


def test_networks_take_part_with_what_they_give() -> None:
    model = three(reparameterization="mlp", mlp_hidden_size=8, dropout=0.2)
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.average_prefixes(["a", "b"], "mean")
    assert model.prefixes.entry("mean").config.reparameterization == "none"
    for key, tensor in state(model, "mean").items():
        torch.testing.assert_close(tensor, (state(model, "a")[key] + state(model, "b")[key]) / 2)


@pytest.mark.parametrize("names", [["a", "x"], ["x", "a"]])
@pytest.mark.parametrize("compose", ["concatenate_prefixes", "average_prefixes"])
def test_unknown_names(compose: str, names: list[str]) -> None:
    with pytest.raises(PrefixConfigError, match="no prefix 'x'; there are 'a', 'b', 'c'"):
        getattr(three(), compose)(names, "new")


@pytest.mark.parametrize("compose", ["concatenate_prefixes", "average_prefixes"])
def test_names_that_cannot_be(compose: str) -> None:
    model = three()
    wrong: list[tuple[Any, str, str]] = [
        ([], "new", r"Two prefixes are needed at least, not \[\]"),
        (["a"], "new", r"Two prefixes are needed at least.*init=\"prefix\""),
        ("ab", "new", "must be a list of prefixes' names, not 'ab'"),
        (None, "new", "must be a list of prefixes' names, not None"),
        (["a", None], "new", "None is none"),
        (["a", ["b"]], "new", "is none"),
        (["a", "b", "a"], "new", "'a' is named more than once"),
        (["a", "b"], "c", "a prefix 'c' already"),
        (["a", "b"], "a/b", "letters, digits"),
    ]
    for names, new, message in wrong:
        with pytest.raises(PrefixConfigError, match=message):
            getattr(model, compose)(names, new)
    assert list(model.prefixes) == ["a", "b", "c"]
    assert model.active_prefix == "c"


def test_weights_that_cannot_be() -> None:
    model = three()
    wrong: list[tuple[Any, str]] = [
        ([1.0], "1 weights for 2 prefixes"),
        ([1, 1, 1], "3 weights for 2 prefixes"),
        ([], "0 weights for 2"),
        ([1.0, float("nan")], "must be finite"),
        ([1.0, float("inf")], "must be finite"),
        ([1, -1], r"add up to 0.*Choose weights whose sum is not zero"),
        ([0, 0], "add up to 0"),
        (["1", "1"], "must be a list of numbers"),
        ("11", "must be a list of numbers"),
        ([True, False], "must be a list of numbers"),
        (1.0, "must be a list of numbers"),
        ({"a": 1.0}, "must be a list of numbers"),
    ]
    for weights, message in wrong:
        with pytest.raises(PrefixConfigError, match=message):
            model.average_prefixes(["a", "b"], "new", weights=weights)
    assert list(model.prefixes) == ["a", "b", "c"]


def test_prefixes_that_do_not_go_together() -> None:
    model = three()
    with pytest.raises(PrefixConfigError, match=r"different lengths: 4 and 2\. .*concatenate_prefixes"):
        model.average_prefixes(["a", "b", "c"], "new")
    model.add_prefix("plain", random(4, 3, sliding_window="plain"))
    for compose in (model.concatenate_prefixes, model.average_prefixes):
        with pytest.raises(PrefixConfigError, match=r"different sliding_window: 'pinned' and 'plain'.*a copy"):
            compose(["a", "plain"], "new")
    model.add_prefix("pinned", PrefixConfig(num_virtual_tokens=4, init="prefix"), initial_prefix="plain")
    model.concatenate_prefixes(["a", "pinned"], "new")  # the way out
    bart = three(FAMILIES["bart"].build())
    bart.add_prefix("decoder", random(4, 3, sites=("decoder",)))
    for compose in (bart.concatenate_prefixes, bart.average_prefixes):
        with pytest.raises(PrefixConfigError, match="different sites: 'encoder', 'decoder', 'cross' and 'decoder'"):
            compose(["a", "decoder"], "new")


def test_a_concatenation_leaves_room_for_text() -> None:
    model = three(FAMILIES["gpt2"].build())
    model.add_prefix("long", random(200, 3))
    model.add_prefix("medium", random(56, 3))
    with pytest.raises(PrefixConfigError, match=r"256 virtual tokens leave no room for text.* 256 positions"):
        model.concatenate_prefixes(["long", "medium"], "new")
    assert "new" not in model.prefixes
    model.add_prefix("shorter", random(55, 3))
    model.concatenate_prefixes(["long", "shorter"], "new")
    with torch.no_grad():
        assert model(input_ids=tokens(1, 1)).logits.shape[1] == 1
    with pytest.raises(PrefixInputError, match="256"):
        model(input_ids=tokens(1, 2))


@pytest.mark.parametrize("compose", ["concatenate_prefixes", "average_prefixes"])
def test_a_diverged_prefix_spoils_no_other(compose: str) -> None:
    model = three()
    with torch.no_grad():
        model.prefixes["b"].get_parameter("decoder.layers.1.key")[0, 0, 0] = float("nan")
    with pytest.raises(PrefixInputError, match=r"'b' holds NaN or infinity in decoder\.layers\.1\.key"):
        getattr(model, compose)(["a", "b"], "new")


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_copy_starts_exactly_at_its_source(family: str, reparameterization: Any, tmp_path: Path) -> None:
    trained = random_model(FAMILIES[family].build(), p=4)
    trained.save_pretrained(tmp_path)
    model = PrefixModel.from_pretrained(trained.base, tmp_path, name="source")  # frozen
    before = state(model, "source")
    config = PrefixConfig(num_virtual_tokens=4, init="prefix", reparameterization=reparameterization, mlp_hidden_size=8)
    model.add_prefix("copy", config, initial_prefix="source")
    assert model.active_prefix == "copy"
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model, "copy").items())
    arguments = dict(source_of(model.base, 2), decoder_input_ids=tokens(2, 5)) if family == "bart" else {}
    arguments = arguments or dict(input_ids=tokens(2, 5))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**arguments, labels=tokens(2, 5)).loss.backward()
    optimizer.step()
    assert not any(torch.equal(tensor, before[key]) for key, tensor in state(model, "copy").items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model, "source").items())


def test_a_copy_brings_its_head() -> None:
    model = classifier()
    model.add_prefix("copy", PrefixConfig(num_virtual_tokens=3, init="prefix"), initial_prefix="other")
    key = "modules_to_save.score.weight"
    assert torch.equal(state(model, "copy")[key], state(model, "other")[key])
    with torch.no_grad():
        model.prefixes.entry("copy").weights.get_parameter("score.weight").zero_()
    assert state(model, "other")[key].abs().max() > 0
    model.add_prefix("fresh", PrefixConfig(num_virtual_tokens=3, init="prefix"), initial_prefix="headless")
    assert torch.equal(state(model, "fresh")[key], model.base.get_parameter("score.weight"))
    model.add_prefix(
        "bare", PrefixConfig(num_virtual_tokens=3, init="prefix", modules_to_save=()), initial_prefix="other"
    )
    assert key not in state(model, "bare")


def test_what_a_copy_needs() -> None:
    model = three()
    copy = PrefixConfig(num_virtual_tokens=4, init="prefix")
    with pytest.raises(PrefixConfigError, match=r"pass initial_prefix=\"\.\.\.\" to add_prefix"):
        model.add_prefix("new", copy)
    with pytest.raises(PrefixConfigError, match="no prefix 'x'"):
        model.add_prefix("new", copy, initial_prefix="x")
    with pytest.raises(PrefixConfigError, match=r"has 2 virtual tokens, the new one 4\. Set num_virtual_tokens=2"):
        model.add_prefix("new", copy, initial_prefix="c")
    with pytest.raises(PrefixConfigError, match=r"init='normal' does not read it: use init=\"prefix\""):
        model.add_prefix("new", random(4, 0), initial_prefix="a")
    with pytest.raises(PrefixConfigError, match="input_ids is given, but init='prefix'"):
        model.add_prefix("new", copy, initial_prefix="a", input_ids=tokens(1, 4))
    with pytest.raises(PrefixConfigError, match=r"the model has none yet.*add_prefix\(name, config, initial_prefix"):
        get_prefix_model(FAMILIES["llama"].build(), copy)
    bart = get_prefix_model(FAMILIES["bart"].build(), random(4, 0, sites=("decoder",)))
    with pytest.raises(PrefixConfigError, match=r"acts at 'decoder', the new one at .*Set sites=\['decoder'\]"):
        bart.add_prefix("new", copy, initial_prefix="default")
    bart.add_prefix("new", copy.replace(sites=("decoder",)), initial_prefix="default")
    assert list(model.prefixes) == ["a", "b", "c"]
