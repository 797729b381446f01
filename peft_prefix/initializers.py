"""What fills a prefix before training: activations of real tokens, a cache, another prefix, zeros or random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .backbone import backbone_of
from .config import Init, PrefixConfig
from .demonstrations import DemonstrationText
from .errors import PrefixConfigError, PrefixInputError, PrefixWarning
from .example_inputs import example_inputs, ordinary_tokens, source_inputs, start_token
from .geometry import Geometry
from .ownership import require_owner
from .parameterization import PrefixTensors
from .placement import home, weight_of
from .recording import States, record, recording, states_of
from .structure import Structure, evaluation_mode


@dataclass(frozen=True)
class InitInputs:
    """Everything an initializer may draw from; each checks for what it needs.

    Args:
        base: The base model.
        structure: What it consists of.
        geometry: Shapes of the sites that the prefix has.
        config: What the prefix looks like.
        tokenizer: Reads `config.init_text`.
        input_ids: A text as token ids.
        past_key_values: A cache that the base filled.
        prefix: Keys and values of another prefix of the same shapes.
        demonstrations: The text of some demonstrations.
    """

    base: PreTrainedModel
    structure: Structure
    geometry: Geometry
    config: PrefixConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    input_ids: torch.Tensor | None = None
    past_key_values: Cache | None = None
    prefix: PrefixTensors | None = None
    demonstrations: DemonstrationText | None = None


def initial_tensors(inputs: InitInputs) -> PrefixTensors:
    """Keys `(H, p, Dk)` and values `(H, p, Dv)` by name, as `config.init` says.

    Raises:
        PrefixConfigError: Something that the initializer needs is missing or does not fit.
    """
    given = {"input_ids": inputs.input_ids, "past_key_values": inputs.past_key_values}
    for name, value in given.items():
        if value is not None and name not in _READS.get(inputs.config.init, ()):
            raise PrefixConfigError(
                f"{name} is given, but init={inputs.config.init!r} does not read it: use "
                f'init="{"text" if name == "input_ids" else "cache"}".'
            )
    return INITIALIZERS[inputs.config.init](inputs)


def tensors_from_states(states: States, geometry: Geometry, num_virtual_tokens: int) -> PrefixTensors:
    """Recorded keys and values of one row as a prefix.

    Args:
        states: Keys and values by site and layer, of exactly `num_virtual_tokens` tokens.
        geometry: Shapes of the sites that the prefix has.
        num_virtual_tokens: Length `p` of the prefix.

    Returns:
        Copies of the keys `(H, p, Dk)` and values `(H, p, Dv)` by name.

    Raises:
        PrefixInputError: There are other layers, another length or more than one row.
    """
    tensors: PrefixTensors = {}
    for site, index, shape in geometry.layers():
        layers = states.get(site, [])
        layer = layers[index] if index < len(layers) else None
        for place, (role, width) in enumerate((("key", shape.key_width), ("value", shape.value_width))):
            expected = (1, shape.kv_heads, num_virtual_tokens, width)
            if layer is None or tuple(layer[place].shape) != expected:
                found = "nothing" if layer is None else f"{role}s of shape {tuple(layer[place].shape)}"
                raise PrefixInputError(
                    f"Layer {index} of the cache holds {found} where {expected} is needed at the site {site!r} (one "
                    "row, num_virtual_tokens tokens). Run the base model on exactly that many tokens, with a cache "
                    "that keeps them all, e.g. DynamicCache()."
                )
            tensors[f"{site}.layers.{index}.{role}"] = layer[place][0].detach().clone()
    return tensors


def activations(
    base: PreTrainedModel,
    structure: Structure,
    geometry: Geometry,
    input_ids: torch.Tensor,
    decoder_ids: torch.Tensor | None = None,
) -> PrefixTensors:
    """The keys and values that the base computes for some tokens, at every site.

    An encoder-decoder model reads them on both sides, the decoder behind its start token, unless it is given others.
    Where the source is no text, as many of its positions are taken, evenly spread.

    Args:
        base: The base model.
        structure: What it consists of.
        geometry: Shapes of the sites that are wanted.
        input_ids: Token ids of shape `(p,)`.
        decoder_ids: What the decoder of an encoder-decoder model reads instead, its start token included, `(p,)`.

    Returns:
        Keys `(H, p, Dk)` and values `(H, p, Dv)` by name.
    """
    ids = input_ids[None].to(home(base))
    arguments = example_inputs(base, ids)
    if structure.encoder is not None:
        if decoder_ids is None:
            decoder_ids = torch.cat([start_token(base).to(ids), ids[0, :-1]])
        arguments["decoder_input_ids"] = decoder_ids[None].to(home(base))
    return _one_row(record(base, structure, arguments), geometry, len(input_ids))


def _one_row(states: States, geometry: Geometry, p: int) -> PrefixTensors:
    """The first row of what was recorded, with `p` positions for every site."""

    def fitting(tensor: torch.Tensor) -> torch.Tensor:
        length = tensor.shape[2]
        return tensor[:1] if length == p else tensor[:1, :, torch.arange(p, device=tensor.device) * length // p]

    fitted: States = {
        site: [None if layer is None else (fitting(layer[0]), fitting(layer[1])) for layer in layers]
        for site, layers in states.items()
    }
    return tensors_from_states(fitted, geometry, p)


def _vocabulary(inputs: InitInputs) -> PrefixTensors:
    """Activations of words that the base model itself writes: a random first one, the others sampled from it.

    Text that the model finds likely leaves its behaviour nearly as it is, which random words do not (figures in
    docs/results.md), and it takes nothing but the base. An encoder reads random words, and the decoder writes about
    them. A model without a language-model head writes with its word embeddings if its config ties the two; otherwise
    the words are random.
    """
    base, p = inputs.base, inputs.config.num_virtual_tokens
    generator = torch.Generator().manual_seed(inputs.config.init_seed)
    ordinary = ordinary_tokens(base)
    if not base.can_generate() and (inputs.structure.encoder is not None or not base.config.tie_word_embeddings):
        words = torch.multinomial(ordinary, p, replacement=True, generator=generator)
        return activations(base, inputs.structure, inputs.geometry, words)
    with evaluation_mode(base), torch.no_grad(), recording(inputs.structure) as run:
        if inputs.structure.encoder is None:
            ids, word = "input_ids", torch.multinomial(ordinary, 1, generator=generator)
            source: dict[str, Any] = {}
        else:
            ids, word = "decoder_input_ids", start_token(base)
            words = torch.multinomial(ordinary, p, replacement=True, generator=generator)
            read = source_inputs(base, words[None].to(home(base)))
            source = {"encoder_outputs": inputs.structure.encoder(**read)}
        for _ in range(p):
            tokens = {ids: word[None].to(home(base))}
            output = backbone_of(base)(**source, **tokens, past_key_values=run.cache)
            logits = _next_word(base, output)[: len(ordinary)].float().cpu()
            word = torch.multinomial((logits + ordinary.log()).softmax(dim=-1), 1, generator=generator)
    return _one_row(run.states, inputs.geometry, p)


def _next_word(base: PreTrainedModel, output: Any) -> torch.Tensor:
    """Logits of the next word, `(vocabulary,)`, as well as the model can tell them."""
    if "logits" in output:
        logits: torch.Tensor = output.logits[0, -1]
        return logits
    last: torch.Tensor = output.last_hidden_state[0, -1]
    embeddings = weight_of(base, cast("torch.Tensor", base.get_input_embeddings().weight))
    if last.shape[0] == embeddings.shape[1]:
        return torch.mv(embeddings.to(last.device), last.to(embeddings.dtype))
    return last.new_zeros(len(embeddings))


def _text(inputs: InitInputs) -> PrefixTensors:
    """Activations of a given text, cut or repeated to fill the prefix."""
    p = inputs.config.num_virtual_tokens
    ids = _text_ids(inputs)
    if ids.numel() > p:
        warnings.warn(
            f"The initial text has {ids.numel()} tokens; the first {p} are used. Set num_virtual_tokens="
            f"{ids.numel()} to use them all.",
            PrefixWarning,
            stacklevel=2,
        )
    repeated = ids.repeat(-(-p // ids.numel()))[:p]
    return activations(inputs.base, inputs.structure, inputs.geometry, repeated)


def _demonstrations(inputs: InitInputs) -> PrefixTensors:
    """Activations of demonstrations, behind an instruction if there is one."""
    text = inputs.demonstrations
    assert text is not None
    return activations(inputs.base, inputs.structure, inputs.geometry, text.ids, text.decoder_ids)


def _cache(inputs: InitInputs) -> PrefixTensors:
    """A given key/value cache of the base model."""
    cache = inputs.past_key_values
    if cache is None:
        raise PrefixConfigError(
            'init="cache" needs the cache: pass past_key_values=... with num_virtual_tokens tokens.'
        )
    if "encoder" in inputs.geometry.sites:
        raise PrefixConfigError(
            'init="cache" cannot fill the encoder\'s prefix, since caches hold nothing of encoders: use '
            'init="text", or sites=("decoder", "cross").'
        )
    require_owner(cache, None)
    return tensors_from_states(states_of(cache), inputs.geometry, inputs.config.num_virtual_tokens)


def _prefix(inputs: InitInputs) -> PrefixTensors:
    """Another prefix, which `composition.start_from` has found to fit."""
    assert inputs.prefix is not None
    return inputs.prefix


def _zeros(inputs: InitInputs) -> PrefixTensors:
    """All zeros: every virtual token gets attention and gives nothing."""
    shapes = inputs.geometry.tensor_shapes(inputs.config.num_virtual_tokens)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _normal(inputs: InitInputs) -> PrefixTensors:
    """Independent normal numbers with standard deviation `init_std`."""
    shapes = inputs.geometry.tensor_shapes(inputs.config.num_virtual_tokens)
    generator = torch.Generator().manual_seed(inputs.config.init_seed)
    return {name: inputs.config.init_std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


INITIALIZERS: dict[Init, Callable[[InitInputs], PrefixTensors]] = {
    "vocabulary": _vocabulary,
    "text": _text,
    "demonstrations": _demonstrations,
    "cache": _cache,
    "prefix": _prefix,
    "zeros": _zeros,
    "normal": _normal,
}

_READS: dict[Init, tuple[str, ...]] = {"text": ("input_ids",), "cache": ("past_key_values",)}


def _text_ids(inputs: InitInputs) -> torch.Tensor:
    """The text's token ids, shape `(tokens,)`."""
    text, ids = inputs.config.init_text, inputs.input_ids
    if (text is None) == (ids is None):
        raise PrefixConfigError(
            'init="text" needs the text once: init_text="..." in the config together with a tokenizer, or input_ids=...'
        )
    if text is not None:
        if inputs.tokenizer is None:
            raise PrefixConfigError(
                'init="text" needs a tokenizer to read init_text: pass tokenizer=AutoTokenizer.from_pretrained(...).'
            )
        ids = torch.tensor(inputs.tokenizer(text)["input_ids"])
    assert ids is not None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point():
        raise PrefixInputError(
            f"The initial text must be one row of at least one token id, not {ids.dtype} of shape {tuple(ids.shape)}."
        )
    return ids
