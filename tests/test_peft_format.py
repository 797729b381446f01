"""PEFT's adapters, read and written: PEFT itself, on a base of its own, must give the same logits and texts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES, Family
from helpers import assert_close, source_of, tokens
from peft_files import MADE_ALONE, P
from transformers import PreTrainedModel

from peft_prefix import PrefixConfig, PrefixModel, get_prefix_model

LENGTH = 20
"""Tokens of a text: far more than the windows of the families that have some."""
NOT_MADE_BY_PEFT = ["mpt", "falcon_multi_query"]
"""PEFT does not find their heads; it runs files that name them."""
PAIRS = ["t5", "umt5", "t5gemma", "bart", "mbart", "marian", "led", "bert_gpt2"]
"""Encoder-decoder models, whose two sides differ in depth and heads."""
COUNTS_PADDING = {"mpt"} | {name for name in MADE_ALONE if FAMILIES[name].sliding}
"""Families where padding on the left changes what PEFT computes: it counts as distance, or as a part of the window."""
PROJECTION: dict[str, Any] = {"prefix_projection": True, "encoder_hidden_size": 12}
CARTRIDGE: dict[str, Any] = {"method": "CartridgeConfig", "num_frozen_tokens": 2}


@pytest.fixture
def peft() -> Iterator[Any]:
    """PEFT, whose warnings about its own ways are no errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft")


def expressible(family: Family, base: PreTrainedModel | None = None, **config: Any) -> PrefixModel:
    """A model with a random prefix of the kind that PEFT has."""
    settings = dict(num_virtual_tokens=P, init="normal", init_std=1.0, sites=("decoder",))
    settings["sliding_window"] = "plain" if family.sliding else "pinned"
    return get_prefix_model(base or family.build(), PrefixConfig(**{**settings, **config})).eval()


def made_by_peft(
    peft: Any, base: PreTrainedModel, folder: Path, method: str = "PrefixTuningConfig", **config: Any
) -> Any:
    """A model of PEFT with a random prefix, saved to a folder."""
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    config = {"task_type": task, "num_virtual_tokens": P, **config}
    model = peft.get_peft_model(base, getattr(peft, method)(**config)).eval()
    torch.manual_seed(3)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    return model


def opened_by_peft(peft: Any, base: PreTrainedModel, folder: Path) -> Any:
    """A model of PEFT with an adapter from a folder."""
    return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_same(ours: PrefixModel, theirs: Any, *, left: bool = True) -> None:
    """Logits agree without padding, with padding on the right and on the left, and so do greedy texts."""
    if ours.base.config.is_encoder_decoder:
        assert_same_pair(ours, theirs)
        return
    text, mask = tokens(2, LENGTH, seed=4), torch.ones(2, LENGTH, dtype=torch.long)
    after, before = mask.clone(), mask.clone()
    after[0, -6:], before[0, :6] = 0, 0
    for padding in (mask, after, before) if left else (mask, after):
        # PEFT leaves positions to the base, which counts padding on the left; these are what `generate` would give.
        own = {"position_ids": (padding.cumsum(1) - 1).clamp(min=0)}
        own = own if "position_ids" in inspect.signature(ours.base.forward).parameters else {}
        real = padding.bool()
        with torch.no_grad():
            actual = ours(input_ids=text, attention_mask=padding).logits[real]
            expected = theirs(input_ids=text, attention_mask=padding, **own).logits[real]
        assert_close(actual, expected, ours.base.dtype)
        assert_matters(actual, ours, input_ids=text, attention_mask=padding, real=real)
    options = dict(attention_mask=before if left else mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(ours.generate(text, **options), theirs.generate(input_ids=text, **options))


def assert_same_pair(ours: PrefixModel, theirs: Any) -> None:
    """The same for an encoder-decoder model, with padding on both of its sides."""
    source, text = source_of(ours.base, 2), tokens(2, LENGTH, seed=4)
    source["attention_mask"][0, -3:] = 0
    mask = torch.ones_like(text)
    mask[0, -5:] = 0
    texts, real = {**source, "decoder_input_ids": text, "decoder_attention_mask": mask}, mask.bool()
    with torch.no_grad():
        actual, expected = ours(**texts).logits[real], theirs(**texts).logits[real]
    assert_close(actual, expected)
    assert_matters(actual, ours, **texts, real=real)
    for options in ({"num_beams": 1}, {"num_beams": 2}):
        given = {**source, "max_new_tokens": 10, "do_sample": False, **options}
        assert torch.equal(ours.generate(**given), theirs.generate(**given))


def assert_matters(actual: torch.Tensor, ours: PrefixModel, *, real: torch.Tensor, **texts: Any) -> None:
    """The base alone gives something else."""
    with torch.no_grad():
        assert (ours.base(**texts).logits[real] - actual).abs().max() > 1e-2


@pytest.mark.parametrize("family", MADE_ALONE + NOT_MADE_BY_PEFT + PAIRS)
def test_peft_gives_our_logits(peft: Any, family: str, tmp_path: Path) -> None:
    model = expressible(FAMILIES[family])
    model.save_as_peft(tmp_path)
    assert_same(model, opened_by_peft(peft, FAMILIES[family].build(), tmp_path), left=family not in COUNTS_PADDING)


WITH_EVERY_METHOD = ["gpt2", "gpt_bigcode", "llama", "mistral", "gemma3_text", "gemma4_text"]
"""Families that differ in kind: the layout does not know which method has made the numbers."""


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *(pytest.param(family, {}, id=f"{family}-direct") for family in MADE_ALONE),
        *(pytest.param(family, PROJECTION, id=f"{family}-projection") for family in WITH_EVERY_METHOD),
        *(pytest.param(family, CARTRIDGE, id=f"{family}-cartridge") for family in WITH_EVERY_METHOD),
    ],
)
def test_we_give_pefts_logits(peft: Any, family: str, config: dict[str, Any], tmp_path: Path) -> None:
    theirs = made_by_peft(peft, FAMILIES[family].build(), tmp_path, **config)
    ours = PrefixModel.from_pretrained(FAMILIES[family].build(), tmp_path)
    assert_same(ours, theirs, left=family not in COUNTS_PADDING)
    assert ours.prefixes.entry().config.sliding_window == ("plain" if FAMILIES[family].sliding else "pinned")


def pair(name: str, encoder_layers: int, decoder_layers: int) -> Family:
    """A BART or T5 with equal heads on both sides, for which PEFT makes adapters by itself."""
    depth = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    if name == "t5":
        depth = {"num_layers": encoder_layers, "num_decoder_layers": decoder_layers}
        heads = {"d_kv": 16}
    return replace(FAMILIES[name], kwargs={**FAMILIES[name].kwargs, **depth, **heads})


DEPTHS = [(3, 3), (2, 2), (4, 4), (3, 2), (4, 3), (2, 1)]


@pytest.mark.parametrize("depths", DEPTHS, ids=str)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_layers_of_a_pair_read_what_they_read_in_peft(
    peft: Any, name: str, depths: tuple[int, int], tmp_path: Path
) -> None:
    family = pair(name, *depths)
    theirs = made_by_peft(peft, family.build(), tmp_path)
    ours = PrefixModel.from_pretrained(family.build(), tmp_path)
    assert_same(ours, theirs)
    keys = {float(one.sum()) for name, one in ours.prefix_state_dict().items() if name.endswith("key")}
    pairs, layers = depths  # PEFT has as many pairs as the encoder has layers
    assert len(keys) == min(layers, pairs if pairs % 2 else pairs // 2)


@pytest.mark.parametrize("depths", [*DEPTHS, (2, 3), (2, 4)], ids=str)
def test_peft_can_hold_different_numbers_in_every_layer_of_a_pair(
    peft: Any, depths: tuple[int, int], tmp_path: Path
) -> None:
    family = pair("bart", *depths)
    model = expressible(family)
    model.save_as_peft(tmp_path)
    assert_same(model, opened_by_peft(peft, family.build(), tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision(peft: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = expressible(FAMILIES["llama"])
    model.save_as_peft(tmp_path, dtype=dtype)
    theirs = opened_by_peft(peft, FAMILIES["llama"].build(), tmp_path)
    ours = PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    assert {one.dtype for one in ours.prefix_state_dict().values()} == {dtype}
    assert_same(ours, theirs)


def test_a_base_of_half_precision(peft: Any, tmp_path: Path) -> None:
    theirs = made_by_peft(peft, FAMILIES["qwen3"].build(dtype=torch.bfloat16), tmp_path)
    text = tokens(2, LENGTH)
    with torch.no_grad():
        actual = PrefixModel.from_pretrained(FAMILIES["qwen3"].build(dtype=torch.bfloat16), tmp_path)(
            input_ids=text
        ).logits
        assert_close(actual, theirs(input_ids=text).logits, torch.bfloat16)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_prefix_longer_than_the_window(peft: Any, family: str, tmp_path: Path) -> None:
    theirs = made_by_peft(peft, FAMILIES[family].build(), tmp_path / "theirs", num_virtual_tokens=12)
    assert_same(PrefixModel.from_pretrained(FAMILIES[family].build(), tmp_path / "theirs"), theirs, left=False)
    model = expressible(FAMILIES[family], num_virtual_tokens=12)
    model.save_as_peft(tmp_path / "ours")
    assert_same(model, opened_by_peft(peft, FAMILIES[family].build(), tmp_path / "ours"), left=False)


HEADS = ["LlamaForSequenceClassification", "LlamaForTokenClassification", "GPT2ForSequenceClassification"]
HEADS += ["GPT2ForTokenClassification", "BloomForSequenceClassification", "LlamaForQuestionAnswering"]
TASKS = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS", "Question": "QUESTION_ANS"}


def with_head(model: str) -> tuple[Family, str]:
    """A model with a head, and PEFT's name of its task."""
    name, task = model.split("For")
    family = replace(FAMILIES[name.lower()], model=model)
    return family, next(one for part, one in TASKS.items() if task.startswith(part))


def scores(model: Any) -> torch.Tensor:
    """What a head says about a batch with padding on the right."""
    text, mask = tokens(2, LENGTH, seed=4), torch.ones(2, LENGTH, dtype=torch.long)
    text[0, -6:], mask[0, -6:] = COMMON["pad_token_id"], 0
    with torch.no_grad():
        output = model(input_ids=text, attention_mask=mask)
    found: torch.Tensor = output.logits if "logits" in output else output.start_logits + 2 * output.end_logits
    return found[mask.bool()] if found.shape[1] == LENGTH else found


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("model", HEADS)
def test_peft_takes_the_head_along(peft: Any, model: str, own_head: bool, tmp_path: Path) -> None:
    family, _ = with_head(model)
    ours = expressible(family, modules_to_save=None if own_head else ())
    for parameter in ours.prefixes.entry().weights.parameters():
        parameter.data.normal_()
    ours.save_as_peft(tmp_path)
    torch.testing.assert_close(scores(opened_by_peft(peft, family.build(), tmp_path)), scores(ours))
    assert (scores(ours) - scores(family.build())).abs().max() > 1e-2


@pytest.mark.parametrize("model", HEADS)
def test_we_take_pefts_head_along(peft: Any, model: str, tmp_path: Path) -> None:
    family, task = with_head(model)
    theirs = made_by_peft(peft, family.build(), tmp_path / "before", task_type=task)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path)
    ours = PrefixModel.from_pretrained(family.build(), tmp_path)
    assert ours.prefixes.entry().config.modules_to_save
    torch.testing.assert_close(scores(ours), scores(theirs))


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_models_head_is_the_prefixs_own(peft: Any, tied: bool, tmp_path: Path) -> None:
    family = replace(FAMILIES["llama"], kwargs={**FAMILIES["llama"].kwargs, "tie_word_embeddings": tied})
    theirs = made_by_peft(peft, family.build(), tmp_path / "before", modules_to_save=["lm_head"])
    head = theirs.base_model.lm_head.modules_to_save["default"].weight
    head.data.normal_(0.0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours = PrefixModel.from_pretrained(family.build(), tmp_path)
    assert ours.prefixes.entry().config.modules_to_save == ("lm_head",)
    assert_same(ours, theirs)
    ours.save_as_peft(tmp_path / "again")
    assert_same(ours, opened_by_peft(peft, family.build(), tmp_path / "again"))


def test_a_backbone_alone(peft: Any, tmp_path: Path) -> None:
    family = replace(FAMILIES["llama"], model="LlamaModel")
    ours = expressible(family)
    ours.save_as_peft(tmp_path)
    text = tokens(2, LENGTH)
    with torch.no_grad():
        expected = opened_by_peft(peft, family.build(), tmp_path)(input_ids=text).last_hidden_state
        assert_close(ours(input_ids=text).last_hidden_state, expected)


def test_what_we_wrote_is_what_peft_writes(peft: Any, tmp_path: Path) -> None:
    model = expressible(FAMILIES["llama"])
    model.save_as_peft(tmp_path / "ours")
    opened_by_peft(peft, FAMILIES["llama"].build(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path / name) for name in ("ours", "theirs")
    )
    assert ours.prefixes.entry().config == theirs.prefixes.entry().config
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(ours.prefix_state_dict()[name], tensor)
        assert torch.equal(theirs.prefix_state_dict()[name], tensor)
