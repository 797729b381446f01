"""Where a head begins, for models that are put together in different ways."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import COMMON, FAMILIES
from torch import nn

from peft_prefix import PrefixConfigError
from peft_prefix.backbone import backbone_of, head_modules

BERT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
T5 = dict(COMMON, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)


@pytest.mark.parametrize(
    ("model", "config", "backbone", "head"),
    [
        ("LlamaForCausalLM", FAMILIES["llama"], "", ()),
        ("LlamaModel", FAMILIES["llama"], "", ()),
        ("LlamaForSequenceClassification", FAMILIES["llama"], "model", ("score",)),
        ("LlamaForQuestionAnswering", FAMILIES["llama"], "transformer", ("qa_outputs",)),
        ("GPT2ForTokenClassification", FAMILIES["gpt2"], "transformer", ("classifier",)),
        ("GPT2DoubleHeadsModel", FAMILIES["gpt2"], "", ()),
        ("OPTForSequenceClassification", FAMILIES["opt"], "model", ("score",)),
    ],
)
def test_decoders(model: str, config: object, backbone: str, head: tuple[str, ...]) -> None:
    base = getattr(transformers, model)(getattr(transformers, config.config)(**config.kwargs))  # type: ignore[attr-defined]
    assert backbone_of(base) is base.get_submodule(backbone)
    assert head_modules(base) == head


def test_other_architectures() -> None:
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    assert backbone_of(bert) is bert.bert
    assert head_modules(bert) == ("classifier",)
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    assert head_modules(masked) == ()
    t5 = transformers.T5ForSequenceClassification(transformers.T5Config(**T5))
    assert backbone_of(t5) is t5.transformer
    assert head_modules(t5) == ("classification_head",)


def test_every_module_behind_the_backbone_that_has_weights_belongs_to_the_head() -> None:
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**FAMILIES["llama"].kwargs))
    base.between = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    base.dropout = nn.Dropout()
    assert head_modules(base) == ("score", "between")


def test_a_head_that_cannot_be_told_from_the_backbone_must_be_named() -> None:
    question_answering = transformers.T5ForQuestionAnswering(transformers.T5Config(**T5))
    with pytest.raises(PrefixConfigError, match="T5ForQuestionAnswering has a head, but where it begins"):
        head_modules(question_answering)
    loose = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**FAMILIES["llama"].kwargs))
    loose.temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(PrefixConfigError, match="from its parts model, score, temperature"):
        head_modules(loose)
