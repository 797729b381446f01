"""Ways to generate that users switch on without thinking: with a prefix they give the same numbers, or an error."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, KINDS
from helpers import (
    assert_close,
    model_with_tokens,
    random_model,
    source_of,
    tokens,
    with_text,
)
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.logits_process import (
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WatermarkLogitsProcessor,
)

from peft_prefix import PrefixConfig, PrefixInputError

NEW = 10
GREEDY: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, use_cache=True)
CAUSAL_KINDS = {name: family for name, family in KINDS.items() if not FAMILIES[name].model.endswith("Generation")}
every_kind = pytest.mark.parametrize("family", KINDS)
every_causal_kind = pytest.mark.parametrize("family", CAUSAL_KINDS)
FAULTS = (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, IndexError, KeyError)
"""What bases raise in ways of generating that they do not support."""


def inputs_of(base: PreTrainedModel, rows: int = 2) -> dict[str, torch.Tensor]:
    return source_of(base, rows) if base.config.is_encoder_decoder else dict(input_ids=tokens(rows, 8))


def start_of(base: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What generation begins with: the prompt, or the start token of a decoder."""
    return base.generate(**inputs, max_new_tokens=1)[:, :1] if base.config.is_encoder_decoder else inputs["input_ids"]


def full_logits(model: Any, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of one pass over the whole text, without a cache."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        return model(input_ids=ids, use_cache=False).logits


def by_hand(model: Any, inputs: dict[str, torch.Tensor], new: int = NEW, processors: Any = ()) -> torch.Tensor:
    """Greedy decoding from full forward passes."""
    ids = start_of(getattr(model, "base", model), inputs)
    for _ in range(new):
        scores = full_logits(model, inputs, ids)[:, -1]
        for processor in processors:
            scores = processor(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


def require_base(base: PreTrainedModel, inputs: dict[str, torch.Tensor], why: str, **more: Any) -> None:
    """Skip if the base itself does not support a way of generating, or gets other tokens with it."""
    plain = {name: value for name, value in more.items() if name in ("num_beams", "num_return_sequences")}
    try:
        works = torch.equal(base.generate(**inputs, **GREEDY, **more), base.generate(**inputs, **GREEDY, **plain))
    except FAULTS:
        works = False
    if not works:
        pytest.skip(f"the base itself {why}")


class ExactStart(CacheLayerMixin):
    """A cache layer whose first `p` tokens are kept as they are; the others go to a layer of transformers."""

    is_sliding = False
    is_compileable = False

    def __init__(self, p: int, others: CacheLayerMixin) -> None:
        super().__init__()
        self.p, self.others = p, others
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.start is None:
            self.start = keys[:, :, : self.p], values[:, :, : self.p]
            keys, values = keys[:, :, self.p :], values[:, :, self.p :]
        keys, values = self.others.update(keys, values, *args, **kwargs)
        return torch.cat([self.start[0], keys], dim=2), torch.cat([self.start[1], values], dim=2)

    def get_seq_length(self) -> int:
        return 0 if self.start is None else self.p + self.others.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


@pytest.mark.ways("quantized cache")
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@every_kind
def test_real_tokens_are_quantized_and_the_prefix_is_not(family: str, backend: str) -> None:
    """The base reads the prefix as text, in a cache that keeps the first tokens exactly and quantizes the others."""
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend], reason=f"needs {backend}")
    base = KINDS[family].build()
    if base.config.is_encoder_decoder or KINDS[family].sliding or KINDS[family].recurrent:
        pytest.skip("the base itself has no quantized cache")
    bits = {"quanto": 2, "hqq": 1}[backend]  # so few that every error shows
    sizes = dict(nbits=bits, residual_length=4, q_group_size=8, axis_key=0, axis_value=0)
    prefix, text = tokens(1, 3, seed=2)[0], tokens(2, 8)
    options = dict(GREEDY, return_dict_in_generate=True, output_logits=True)
    quantized = dict(cache_implementation="quantized", cache_config=dict(backend=backend, **sizes))
    layer = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}[backend]
    make = getattr(transformers.cache_utils, layer)
    try:
        base.generate(text, **options, **quantized)
        layers = [ExactStart(len(prefix), make(**sizes)) for _ in range(base.config.num_hidden_layers)]
        expected = base.generate(with_text(prefix, text), past_key_values=Cache(layers=layers), **options)
    except FAULTS as error:
        pytest.skip(f"the base itself has no quantized cache: {error}")
    model = model_with_tokens(base, prefix)
    actual = model.generate(text, **options, **quantized)
    assert torch.equal(actual.sequences, expected.sequences[:, len(prefix) :])
    logits = torch.stack(expected.logits)
    torch.testing.assert_close(torch.stack(actual.logits), logits, rtol=0, atol=1e-4)
    everything = base.generate(with_text(prefix, text), **options, **quantized)
    nothing = base.generate(with_text(prefix, text), **options)
    for other in (everything, nothing):  # so it matters what is quantized
        assert float((torch.stack(other.logits) - logits).abs().max()) > 1e-2


@pytest.mark.ways("offloaded cache")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@every_kind
def test_an_offloaded_cache_generates_the_same(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator; where there is none, with streams that do nothing, so that layers come and go all the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        for name in ("Stream", "cuda.Stream", "cuda.default_stream", "cuda.stream"):
            monkeypatch.setattr(f"torch.{name}", NoStream)
    base = KINDS[family].build().to(device)
    inputs = {name: value.to(device) for name, value in inputs_of(base).items()}
    require_base(base, inputs, "has no such cache", cache_implementation=kind)
    model, offloaded = random_model(base), []
    method = Cache.offload
    monkeypatch.setattr(Cache, "offload", lambda self, *args: [offloaded.append(1), method(self, *args)])
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation=kind), by_hand(model, inputs))
    assert offloaded


class NoStream:
    """A stream of a device that has none."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.mark.ways("sliding caches")
@pytest.mark.parametrize("sliding", ["pinned", "plain"])
@pytest.mark.parametrize("family", [*KINDS, "mistral", "gpt_oss"])
def test_caches_with_windows_keep_what_they_should(family: str, sliding: str) -> None:
    """Several windows of 8 tokens, one row padded; caches that grow, of fixed size, and the user's own."""
    if not FAMILIES[family].sliding:
        pytest.skip("has no sliding window")
    base = FAMILIES[family].build()
    model = random_model(base, sliding_window=sliding)
    text, pad, new = tokens(2, 14), 6, 2 * NEW
    text[0, :pad] = 0
    rows = [by_hand(model, dict(input_ids=text[row : row + 1, start:]), new) for row, start in ((0, pad), (1, 0))]
    options = {**GREEDY, "attention_mask": (text != 0).long(), "max_new_tokens": new}
    caches: list[dict[str, Any]] = [
        {},
        dict(cache_implementation="static"),
        dict(past_key_values=DynamicCache(config=base.config)),
        dict(past_key_values=DynamicCache()),  # one that knows no windows and keeps everything
        dict(prefill_chunk_size=5),
    ]
    for cache in caches:
        together = model.generate(text, **options, **cache)
        for row, start in ((0, pad), (1, 0)):
            assert torch.equal(together[row, start:], rows[row][0]), (cache, row)


@pytest.mark.ways("static cache, beams")
@every_kind
def test_a_static_cache_serves_beams_and_several_sequences(family: str) -> None:
    base = KINDS[family].build()
    inputs = inputs_of(base)
    beams = dict(num_beams=4, num_return_sequences=2)
    require_base(base, inputs, "has no static cache for beams", cache_implementation="static", **beams)
    model = random_model(base)
    expected = model.generate(**inputs, **{**GREEDY, "use_cache": False}, **beams)
    assert torch.equal(model.generate(**inputs, **GREEDY, **beams, cache_implementation="static"), expected)


@pytest.mark.ways("assisted")
@pytest.mark.parametrize("assistant", ["other base", "base", "itself", "other prefix", "other base, prefix"])
@every_kind
def test_an_assistant_changes_nothing(family: str, assistant: str) -> None:
    base, other = KINDS[family].build(), KINDS[family].build(seed=3)
    inputs = inputs_of(base, rows=1)
    require_base(base, inputs, "cannot be assisted", assistant_model=other)
    model = random_model(base)
    if assistant == "other prefix":
        helper: Any = random_model(base, p=2)
    elif assistant == "other base, prefix":
        helper = random_model(other, p=3)
    else:
        helper = {"other base": other, "base": base, "itself": model}[assistant]
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=helper), by_hand(model, inputs))
    assert torch.equal(base.generate(**inputs, **GREEDY), by_hand(base, inputs))


@pytest.mark.ways("early exit")
@every_kind
def test_a_base_that_leaves_early_assists_itself(family: str) -> None:
    base = KINDS[family].build()
    inputs = inputs_of(base, rows=1)
    require_base(base, inputs, "does not leave early", assistant_early_exit=1)
    model = random_model(KINDS[family].build())  # a base that has failed may be left with fewer layers
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_early_exit=1), by_hand(model, inputs))


def test_an_assistant_does_not_change_the_distribution() -> None:
    """Of two sampled tokens, each from the three likeliest."""
    base, other = FAMILIES["llama"].build(), FAMILIES["llama"].build(seed=3)
    model, text = random_model(base), tokens(1, 6)
    expected: dict[tuple[int, int], float] = {}
    first = full_logits(model, {}, text)[0, -1].topk(3)
    for token, p in zip(first.indices, first.values.softmax(0), strict=True):
        second = full_logits(model, {}, torch.cat([text, token.view(1, 1)], dim=1))[0, -1].topk(3)
        for after, q in zip(second.indices, second.values.softmax(0), strict=True):
            expected[int(token), int(after)] = float(p * q)
    runs = 300
    torch.manual_seed(0)
    options = dict(do_sample=True, top_k=3, max_new_tokens=2, assistant_model=random_model(other))
    found = Counter(tuple(model.generate(text, **options)[0, 6:].tolist()) for _ in range(runs))
    assert set(found) <= set(expected)
    distance = sum((found[pair] - runs * p) ** 2 / (runs * p) for pair, p in expected.items())
    assert distance < 26.1  # one in a thousand with 8 degrees of freedom


@pytest.mark.ways("scores and attentions")
@every_kind
def test_everything_that_generate_returns_is_that_of_a_full_pass(family: str) -> None:
    base = KINDS[family].build()
    model, inputs, p = random_model(base), inputs_of(base), 4
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    result = model.generate(**inputs, **{**GREEDY, "do_sample": True, "top_k": None, "temperature": 0.5}, **options)
    full = full_logits(model, inputs, result.sequences[:, :-1])[:, -NEW:]
    assert_close(torch.stack(result.logits, dim=1), full)
    assert_close(torch.stack(result.scores, dim=1), full / 0.5)
    chosen = result.sequences[:, -NEW:, None]
    likelihoods = (full / 0.5).log_softmax(-1).gather(2, chosen)[:, :, 0]
    scores = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
    torch.testing.assert_close(scores, likelihoods, rtol=0, atol=1e-4)
    result = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_attentions=True)
    attentions = result.decoder_attentions if base.config.is_encoder_decoder else result.attentions
    start = start_of(base, inputs).shape[1]
    for step, layers in enumerate(attentions):
        for layer in layers:
            if layer is not None and not KINDS[family].sliding:
                assert layer.shape[-1] == p + start + step
                torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer.sum(-1)), rtol=0, atol=1e-4)
    if base.config.is_encoder_decoder:
        length = inputs["input_ids"].shape[1]
        assert {layer.shape[-1] for layer in result.encoder_attentions} == {p + length}
        assert {layer.shape[-1] for step in result.cross_attentions for layer in step} == {p + length}
        return
    history = torch.cat([result.sequences, tokens(2, 3, seed=6)], dim=1)
    mask = torch.ones_like(history)  # also where the model has written the token for padding
    continued = model.generate(history, **GREEDY, attention_mask=mask, past_key_values=result.past_key_values)
    assert torch.equal(continued, by_hand(model, dict(input_ids=history)))


@pytest.mark.ways("scores and attentions")
@every_causal_kind
def test_attentions_and_states_are_those_of_the_base_after_the_same_tokens(family: str) -> None:
    if KINDS[family].recurrent:
        pytest.skip("its recurrent layers would read the prefix's tokens as text")
    base = KINDS[family].build()
    prefix, text, new = tokens(1, 2, seed=2)[0], tokens(2, 3), 3  # within the window
    options = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_attentions=True)
    model = model_with_tokens(base, prefix)
    actual = model.generate(text, **options, output_hidden_states=True)
    expected = base.generate(with_text(prefix, text), **options, output_hidden_states=True)
    for step in range(new):
        for mine, theirs in zip(actual.attentions[step], expected.attentions[step], strict=True):
            torch.testing.assert_close(mine, theirs[:, :, -mine.shape[2] :], rtol=0, atol=2e-5)
        for mine, theirs in zip(actual.hidden_states[step], expected.hidden_states[step], strict=True):
            torch.testing.assert_close(mine, theirs[:, -mine.shape[1] :], rtol=0, atol=1e-4)


@pytest.mark.ways("continuous batching")
@every_kind
def test_batches_of_requests_give_what_each_gives_alone(family: str) -> None:
    base = KINDS[family].build()
    is_causal = not base.config.is_encoder_decoder
    texts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 12, 21, 9)]
    size = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # before transformers 5.18
    options = dict(
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**{size: 8, "num_blocks": 64, "max_batch_tokens": 32}),
    )
    alone = [by_hand(base, dict(input_ids=torch.tensor([text])))[0].tolist() for text in texts] if is_causal else []
    try:
        results = base.generate_batch(texts, **options)
        serves = [text + result.generated_tokens for text, result in zip(texts, results.values(), strict=True)] == alone
    except FAULTS:
        serves = False
    model = random_model(KINDS[family].build())  # a base that has failed keeps the attention of pages
    if not serves:
        with pytest.raises(PrefixInputError, match="cannot serve"):
            model.generate_batch(texts, **options)
        pytest.skip("the base itself serves no batches of requests; with a prefix that is said before they run")
    results = model.generate_batch(texts, **options)
    for text, result in zip(texts, results.values(), strict=True):
        assert text + result.generated_tokens == by_hand(model, dict(input_ids=torch.tensor([text])))[0].tolist()


class Watcher(LogitsProcessor):
    """A logits processor and a stopping criterion that note what they see."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids)
        return scores


class WatchingCriterion(StoppingCriteria):
    """Stops at a length, and notes what it sees."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids)
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.ways("processors and stopping")
@every_kind
def test_processors_and_criteria_see_real_tokens_alone(family: str) -> None:
    base = KINDS[family].build()
    model, inputs = random_model(base), inputs_of(base)
    expected, start = by_hand(model, inputs), start_of(base, inputs).shape[1]
    watcher, criterion = Watcher(), WatchingCriterion(start + 4)
    result = model.generate(**inputs, **GREEDY, logits_processor=[watcher], stopping_criteria=[criterion])
    assert torch.equal(result, expected[:, : start + 4])
    for step, (processed, stopped) in enumerate(zip(watcher.seen, criterion.seen, strict=True)):
        assert torch.equal(processed, expected[:, : start + step])
        assert torch.equal(stopped, expected[:, : start + step + 1])


@pytest.mark.ways("processors and stopping")
@every_kind
def test_lengths_count_real_tokens_alone(family: str) -> None:
    base = KINDS[family].build()
    model, inputs = random_model(base), inputs_of(base, rows=1)
    start = start_of(base, inputs).shape[1]
    options = dict(do_sample=False)
    assert model.generate(**inputs, **options, max_length=start + 3).shape[1] == start + 3
    assert model.generate(**inputs, **options, max_new_tokens=3).shape[1] == start + 3
    end = int(by_hand(model, inputs, 1)[0, -1])  # the likeliest first token ends the text
    assert model.generate(**inputs, **options, max_new_tokens=6, eos_token_id=end).shape[1] == start + 1
    for minimum in (dict(min_length=start + 4), dict(min_new_tokens=4)):
        result = model.generate(**inputs, **options, max_new_tokens=6, eos_token_id=end, **minimum)[0, start:]
        hand = by_hand(model, inputs, 6, [MinLengthLogitsProcessor(start + 4, end, device="cpu")])[0, start:]
        stop = [place for place, token in enumerate(hand.tolist()) if token == end]
        assert torch.equal(result, hand[: stop[0] + 1] if stop else hand)
        assert end not in result[:4]
    began = time.monotonic()
    assert model.generate(**inputs, **options, max_new_tokens=200, max_time=1e-4).shape[1] == start + 1
    assert time.monotonic() - began < 5


@pytest.mark.ways("processors and stopping")
@every_kind
def test_processors_give_what_they_give_on_full_passes(family: str) -> None:
    base = KINDS[family].build()
    model, inputs = random_model(base), inputs_of(base)
    start, plain = start_of(base, inputs).shape[1], by_hand(model, inputs)
    first, second = int(plain[0, start]), int(plain[1, start + 1])
    bias = [[[first], -9.0], [[7], 9.0]]
    mark = dict(greenlist_ratio=0.3, bias=2.5)
    watermark = WatermarkLogitsProcessor(vocab_size=200, device="cpu", **mark)
    cases: list[tuple[dict[str, Any], list[LogitsProcessor]]] = [
        (dict(bad_words_ids=[[first], [second]]), [NoBadWordsLogitsProcessor([[first], [second]])]),
        (dict(sequence_bias=bias), [SequenceBiasLogitsProcessor(bias)]),
        (dict(suppress_tokens=[first, second]), [SuppressTokensLogitsProcessor([first, second])]),
        (dict(begin_suppress_tokens=[first]), [SuppressTokensAtBeginLogitsProcessor([first], start)]),
        (dict(forced_eos_token_id=9), [ForcedEOSTokenLogitsProcessor(start + NEW, 9)]),
        (dict(watermarking_config=WatermarkingConfig(**mark)), [watermark]),
    ]
    for option, processors in cases:
        hand = by_hand(model, inputs, processors=LogitsProcessorList(processors))
        assert torch.equal(model.generate(**inputs, **GREEDY, **option), hand), option
        assert not torch.equal(hand, plain), option


@pytest.mark.ways("processors and stopping")
@every_kind
def test_a_stop_string_ends_the_text(family: str) -> None:
    base = KINDS[family].build()
    model, inputs, tokenizer = random_model(base), inputs_of(base, rows=1), word_tokenizer()
    start, plain = start_of(base, inputs).shape[1], by_hand(model, inputs)
    word = tokenizer.decode(plain[0, start + 3])
    stop = plain[0, start:].tolist().index(int(plain[0, start + 3])) + 1
    result = model.generate(**inputs, **GREEDY, stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(result, plain[:, : start + stop])


def word_tokenizer(size: int = 200) -> Any:
    """One word of five characters for each token, and a template for chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"<{number:03}>": number for number in range(size)}
    words["abcdef"] = words.pop("<004>")  # what transformers tries tokenizers on
    core = Tokenizer(models.WordLevel(words, unk_token="<003>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<000>", unk_token="<003>")
    tokenizer.chat_template = (
        "{% for m in messages %}<010> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<011>{% endif %}"
    )
    return tokenizer


@pytest.mark.ways("guidance")
@every_kind
def test_guidance_compares_two_texts_behind_the_prefix(family: str) -> None:
    """The unconditional text, too, is read with the prefix: guidance is about the prompt."""
    base = KINDS[family].build()
    if base.config.is_encoder_decoder:
        pytest.skip("the base itself takes the decoder's tokens for its source")
    model, inputs, scale = random_model(base), inputs_of(base), 1.7
    negative = tokens(2, 4, seed=9)
    for other in (None, negative):
        conditional = unconditional = inputs["input_ids"]
        unconditional = unconditional[:, -1:] if other is None else other
        for _ in range(NEW):
            with_prompt, without = (
                full_logits(model, {}, ids)[:, -1].log_softmax(-1) for ids in (conditional, unconditional)
            )
            best = (without + scale * (with_prompt - without)).argmax(-1, keepdim=True)
            conditional, unconditional = (torch.cat([ids, best], dim=1) for ids in (conditional, unconditional))
        options = {} if other is None else dict(negative_prompt_ids=other)
        result = model.generate(**inputs, **GREEDY, guidance_scale=scale, **options)
        assert torch.equal(result, conditional)
        assert not torch.equal(result, model.generate(**inputs, **GREEDY))


@pytest.mark.ways("chat")
@every_causal_kind
def test_a_chat_pipeline_is_template_and_generate(family: str) -> None:
    from transformers import pipeline

    model, tokenizer = random_model(KINDS[family].build()), word_tokenizer()
    messages = [{"role": "user", "content": "<020> <030> <040>"}, {"role": "assistant", "content": "<050>"}]
    ids = torch.tensor([[10, 20, 30, 40, 10, 50, 11]])
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    messages.append({"role": "user", "content": "<060>"})
    ids = torch.tensor([[10, 20, 30, 40, 10, 50, 10, 60, 11]])
    answer = pipe(messages, max_new_tokens=NEW, do_sample=False)[0]["generated_text"][-1]
    expected = by_hand(model, dict(input_ids=ids))[0, ids.shape[1] :]
    assert answer == {"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)}


class Logits(torch.nn.Module):
    """What is exported: a model's logits, from ids and mask (and a source)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        target = {} if decoder_input_ids is None else dict(decoder_input_ids=decoder_input_ids)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **target).logits


@pytest.mark.ways("export")
@every_kind
def test_an_exported_program_has_the_prefix_inside(family: str) -> None:
    """For other inputs than the example's, and after the model has got another prefix."""
    if KINDS[family].recurrent:
        pytest.skip("the base itself is unrolled chunk by chunk, which takes minutes")
    model = random_model(KINDS[family].build("eager" if family == "mpt" else "sdpa"))

    def inputs(rows: int, length: int, pad: int) -> dict[str, torch.Tensor]:
        ids = tokens(rows, length, seed=length)
        mask = torch.ones_like(ids)
        if not model.config.is_encoder_decoder:
            mask[0, :pad] = 0
            return dict(input_ids=ids, attention_mask=mask)
        mask[0, -pad:] = 0
        return dict(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens(rows, length - 2, seed=3))

    example, other = inputs(2, 9, 3), inputs(3, 17, 4)
    auto = torch.export.Dim.AUTO
    shapes = {name: {0: auto, 1: auto} for name in example}
    shapes = shapes if len(shapes) == 3 else {**shapes, "decoder_input_ids": None}
    arguments = {"decoder_input_ids": None, **example}
    program = torch.export.export(Logits(model), (), arguments, dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        expected = model(**other, use_cache=False).logits
        with model.disable_prefix():
            without = model(**other, use_cache=False).logits
        model.add_prefix("other", PrefixConfig(num_virtual_tokens=2, init="zeros"))
        actual = program(**{"decoder_input_ids": None, **other})
    seen = other["attention_mask"].bool() if not model.config.is_encoder_decoder else slice(None)
    assert_close(actual[seen], expected[seen])
    assert float((actual - without)[seen].abs().max()) > 1e-2
