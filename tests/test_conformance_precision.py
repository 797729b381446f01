"""Ways to train: lower precision, accumulated gradients, packed texts, quantized bases."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ENCODER_DECODERS, KINDS, supported_attention
from helpers import (
    after_tokens,
    fits_window,
    model_with_tokens,
    random_model,
    source_of,
    tokens,
)
from torch.utils.data import Dataset
from transformers import (
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedModel,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from peft_prefix import PrefixInputError, PrefixModel, PrefixWarning

every_kind = pytest.mark.parametrize("family", KINDS)
LOW = [torch.bfloat16, torch.float16]
every_low_precision = pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
ROUNDING = {torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""How far losses and gradients of these small models are moved by rounding, relative to their size."""
LOGITS = {torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""How far two ways to compute the same logits (standard deviation 0.65) differ in that precision."""


def one_batch(base: PreTrainedModel, rows: int = 2, length: int = 12) -> dict[str, Any]:
    """Inputs with labels; the first row of a causal model is padded."""
    if base.config.is_encoder_decoder:
        return {**source_of(base, rows), "labels": tokens(rows, length)}
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[0, -3:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def loss_and_gradients(model: PrefixModel, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss as a number and what it does to the prefix, which keeps nothing of it."""
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.prefixes.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


def assert_gradients_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Gradients agree, all together up to `tolerance` of their length and each up to ten times that."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert actual[name].dtype == gradient.dtype == torch.float32
        assert gradient.norm() > 1e-5, name
        assert (actual[name] - gradient).norm() < 10 * tolerance * gradient.norm(), name
    left, right = (torch.cat([g[name].flatten() for name in expected]) for g in (actual, expected))
    assert (left - right).norm() < tolerance * right.norm()


def assert_is_float32(tensors: Iterable[torch.Tensor]) -> None:
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


# ---------------------------------------------------------------------- autocast


@pytest.mark.ways("autocast")
@every_low_precision
@every_kind
def test_autocast_gives_the_loss_and_gradients_of_float32(family: str, dtype: torch.dtype) -> None:
    model = random_model(KINDS[family].build()).train()
    batch = one_batch(model.base)
    loss, gradients = loss_and_gradients(model, model(**batch).loss)
    with torch.autocast("cpu", dtype=dtype):
        low = model(**batch)
    low_loss, low_gradients = loss_and_gradients(model, low.loss)
    assert low_loss != loss
    assert low_loss == pytest.approx(loss, rel=ROUNDING[dtype])
    assert_gradients_close(low_gradients, gradients, ROUNDING[dtype])
    assert_is_float32(model.prefix_state_dict().values())


@pytest.mark.ways("autocast")
@every_low_precision
@every_kind
def test_under_autocast_a_prefix_of_tokens_acts_like_those_tokens(family: str, dtype: torch.dtype) -> None:
    if family in ENCODER_DECODERS:
        pytest.skip("no text stands for a prefix on all sites at once")
    base = KINDS[family].build()
    prefix, text = tokens(1, 3, seed=2)[0], tokens(2, fits_window(KINDS[family], 16) - 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = after_tokens(base, prefix, text, recurrent=KINDS[family].recurrent).float()
        actual = model_with_tokens(base, prefix)(input_ids=text).logits.float()
        without = base(input_ids=text).logits.float()
    tolerance = LOGITS[dtype] * max(1.0, float(expected.std()) / 0.65)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    assert (actual - without).abs().max() > 10 * tolerance


# ---------------------------------------------------------------------- a base in bfloat16


@pytest.mark.ways("bfloat16 base")
@every_kind
def test_a_float32_prefix_on_a_bfloat16_base(family: str) -> None:
    low = KINDS[family].build(dtype=torch.bfloat16)
    model = random_model(low).train()
    assert_is_float32(model.prefixes.parameters())
    batch = one_batch(low)
    low_loss, low_gradients = loss_and_gradients(model, model(**batch).loss)
    rounded = random_model(copy.deepcopy(low).float()).train()
    loss, gradients = loss_and_gradients(rounded, rounded(**batch).loss)
    assert low_loss == pytest.approx(loss, rel=ROUNDING[torch.bfloat16])
    assert_gradients_close(low_gradients, gradients, ROUNDING[torch.bfloat16])


# ---------------------------------------------------------------------- accumulation


class Rows(Dataset):
    """Texts whose number of labels differs from row to row, in models whose loss can weigh that."""

    def __init__(self, model: PrefixModel) -> None:
        self.rows = []
        for index in range(4):
            source = {name: tensor[0] for name, tensor in source_of(model.base, 1).items()}
            ids = tokens(1, 10, seed=20 + index)[0]
            if model.base.config.is_encoder_decoder:
                self.rows.append({**source, "input_ids": ids, "labels": ids.flip(0)})
            else:
                self.rows.append({"input_ids": ids, "labels": ids.where(torch.arange(10) > 2 * index, -100)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.rows[index].items() if name != "attention_mask"}


@pytest.mark.ways("accumulation")
@every_kind
def test_accumulated_gradients_are_those_of_the_large_batch(family: str, tmp_path: Path) -> None:
    def step(batch: int, accumulation: int) -> dict[str, torch.Tensor]:
        """What one step of plain gradient descent with rate 1 takes away: the gradient."""
        model = random_model(KINDS[family].build())
        before = model.prefix_state_dict()
        Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Rows(model),
        ).train()
        return {name: before[name] - tensor for name, tensor in model.prefix_state_dict().items()}

    assert_gradients_close(step(1, 4), step(4, 1), 1e-4)


# ---------------------------------------------------------------------- packed texts

LENGTHS = (12, 19, 10)


def packed(texts: list[torch.Tensor], **more: Any) -> dict[str, Any]:
    """Texts in one row, as the collator of transformers packs them."""
    return dict(DataCollatorWithFlattening(**more)([{"input_ids": text.tolist()} for text in texts]))


@pytest.mark.ways("packed")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_kind
def test_packed_texts_are_what_they_are_alone(family: str, training: bool) -> None:
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    reason = None
    for attn in supported_attention(KINDS[family]):
        model = random_model(KINDS[family].build(attn)).train(training)
        if family in ENCODER_DECODERS or "position_ids" not in KINDS[family].arguments():
            reason = "takes no position_ids, so nothing can tell it where a packed text begins; refused"
            with pytest.raises(PrefixInputError, match="does not understand position_ids"):
                model(**packed(texts))
        elif KINDS[family].recurrent:
            reason = "its recurrent layers do not know where a packed text begins; refused"
            with pytest.raises(PrefixInputError, match="would carry what they know from one packed text"):
                model(**packed(texts))
        else:
            _compare_packed(model, texts)
    if reason:
        pytest.skip(reason)


def _compare_packed(model: PrefixModel, texts: list[torch.Tensor]) -> None:
    together = model(**packed(texts))
    assert together.get("past_key_values") is None
    loss, gradients = loss_and_gradients(model, together.loss)
    alone = [model(input_ids=text[None], labels=text[None]) for text in texts]
    expected = torch.cat([output.logits[0] for output in alone])
    torch.testing.assert_close(together.logits[0], expected, rtol=0, atol=3e-5)
    weighted = sum(output.loss * (len(text) - 1) for output, text in zip(alone, texts, strict=True))
    expected_loss, expected_gradients = loss_and_gradients(model, weighted / (sum(LENGTHS) - len(LENGTHS)))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients_close(gradients, expected_gradients, 1e-4)


def test_what_repeats_the_positions_of_packed_texts_is_compared_with_them() -> None:
    model = random_model(KINDS["llama"].build())
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    batch = packed(texts, return_flash_attn_kwargs=True, return_seq_idx=True)
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"} < set(batch)
    expected = model(**packed(texts)).logits
    assert torch.equal(model(**batch).logits, expected)
    for name, wrong in {"max_length_k": 7, "seq_idx": batch["seq_idx"] // 2, "cu_seq_lens_q": torch.arange(4)}.items():
        with pytest.raises(PrefixInputError, match=f"{name} and position_ids disagree"):
            model(**{**batch, name: wrong})
    without_positions = packed(texts, return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(PrefixInputError, match="position_ids must tell it, which start again at 0"):
        model(**without_positions)
    with pytest.raises(PrefixInputError, match=r"does not understand .*seq_idx"):
        random_model(KINDS["bart"].build())(**batch)


def test_a_cache_cannot_hold_packed_texts() -> None:
    model = random_model(KINDS["llama"].build())
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    with pytest.raises(PrefixInputError, match="a cache cannot keep those apart"):
        model(**packed(texts), past_key_values=DynamicCache())


# ---------------------------------------------------------------------- quantized bases


NOT_QUANTIZED = {
    "gpt2": "torchao quantizes torch.nn.Linear, and this base has none but its vocabulary projection",
    "falcon_multi_query": "the base itself does not run: torchao's int8 weights cannot be transposed",
}


def quantized(family: str, folder: Path, config: Any, **sizes: int) -> PreTrainedModel:
    """A tiny base that transformers quantizes while it loads it."""
    kind = KINDS[family]
    plain = type(kind)(kind.config, kind.model, {**kind.kwargs, **sizes}).build()
    plain.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the packages' own futures and missing kernels
        base = getattr(transformers, kind.model).from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
    base.generation_config = plain.generation_config
    assert any(type(parameter) is not torch.nn.Parameter for parameter in base.parameters())
    return base.eval()  # type: ignore[no-any-return]


def check_quantized(base: PreTrainedModel, family: str) -> None:
    """A prefix of real tokens acts like them in the quantized base, generation works, and the prefix alone learns."""
    if family not in ENCODER_DECODERS:
        check_oracle(base, family)
    model = random_model(base)
    assert_is_float32(model.prefixes.parameters())
    batch = one_batch(base, length=20)
    labels = batch.pop("labels")
    if family in ENCODER_DECODERS:
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False, min_new_tokens=6)
        with torch.no_grad():
            chosen = model(**batch, decoder_input_ids=ids).logits.argmax(-1)
        assert torch.equal(chosen[:, 2:-1], ids[:, 3:])  # some models are told how to begin
    plain = {**batch, "decoder_input_ids": labels} if family in ENCODER_DECODERS else batch
    with torch.no_grad(), model.disable_prefix():
        before = model(**plain).logits
    first = model.train()(**batch, labels=labels).loss
    first.backward()
    for name, parameter in model.prefixes.named_parameters():
        assert (parameter.grad.abs().sum(dim=(0, 2)) > 1e-9).all(), name
    assert all(parameter.grad is None for parameter in base.parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    assert model(**batch, labels=labels).loss < first
    with torch.no_grad(), model.eval().disable_prefix():
        assert torch.equal(model(**plain).logits, before)


def check_oracle(base: PreTrainedModel, family: str) -> None:
    """Logits and generated tokens behind a prefix of real tokens are those of the quantized base behind the tokens."""
    prefix, text = tokens(1, 3, seed=2)[0], tokens(2, 5)
    with torch.no_grad():
        expected = after_tokens(base, prefix, text, recurrent=KINDS[family].recurrent)
        model = model_with_tokens(base, prefix)
        torch.testing.assert_close(model(input_ids=text).logits, expected, rtol=0, atol=1e-4)
        assert (base(input_ids=text).logits - expected).abs().max() > 1e-2
    if not KINDS[family].recurrent:
        whole = torch.cat([prefix, text[0]])[None]
        expected_ids = base.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=5, do_sample=False)
        ids = model.generate(text[:1], attention_mask=torch.ones_like(text[:1]), max_new_tokens=5, do_sample=False)
        assert torch.equal(ids[0, text.shape[1] :], expected_ids[0, whole.shape[1] :])


@pytest.mark.ways("quantized")
@every_kind
def test_a_base_of_int8_weights(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    if family in NOT_QUANTIZED:
        pytest.skip(NOT_QUANTIZED[family])
    from torchao.quantization import Int8WeightOnlyConfig

    base = quantized(family, tmp_path, TorchAoConfig(Int8WeightOnlyConfig()))
    check_quantized(base, family)
    random_model(base).save_pretrained(tmp_path / "prefix")
    PrefixModel.from_pretrained(base, tmp_path / "prefix")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_base_that_torchao_has_quantized_in_place(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = KINDS[family].build()
    quantize_(base, Int8WeightOnlyConfig())
    assert any(type(parameter.detach()) is not torch.Tensor for parameter in base.parameters())
    check_quantized(base, family)
    random_model(base).save_pretrained(tmp_path)
    PrefixModel.from_pretrained(base, tmp_path)
    PrefixModel.from_pretrained(KINDS[family].build(), tmp_path)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_trainer_trains_a_prefix_on_a_quantized_base(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    base = quantized("llama", tmp_path, TorchAoConfig(Int8WeightOnlyConfig()))
    model = random_model(base)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=6,
            learning_rate=3e-2,
            logging_steps=1,
            gradient_checkpointing=True,
            bf16=True,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Rows(model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    loaded = PrefixModel.from_pretrained(base, tmp_path / "checkpoint-6")
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(loaded.prefix_state_dict()[name], tensor)


WIDTHS = {
    "llama": dict(intermediate_size=128),
    "gpt2": {},
    "bart": dict(encoder_ffn_dim=128, decoder_ffn_dim=128),
}
"""Sizes that are multiples of 64, as bitsandbytes needs them."""


@pytest.mark.ways("quantized")
@pytest.mark.parametrize("family", WIDTHS)
def test_a_base_of_8_bit_layers_of_bitsandbytes(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    check_quantized(quantized(family, tmp_path, BitsAndBytesConfig(load_in_8bit=True), **WIDTHS[family]), family)


@pytest.mark.ways("quantized")
@pytest.mark.parametrize("family", WIDTHS)
def test_a_base_of_4_bit_layers_of_bitsandbytes(family: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = quantized(family, tmp_path, config, **WIDTHS[family])
    layers = [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers
    if not getattr(layers[0], "support_avx512bf16_for_cpu", False):
        check_quantized(base, family)
        return
    if family not in ENCODER_DECODERS:
        check_oracle(base, family)
    if family == "llama":  # elsewhere the layers' biases make it an error of bitsandbytes itself
        model = random_model(base).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
            model(**one_batch(base)).loss.backward()
        with pytest.warns(PrefixWarning, match="no gradient has reached 6 of the prefix's 6 tensors"):
            optimizer.step()
