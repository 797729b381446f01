"""What fills a prefix before training: activations of real tokens, a given cache, zeros or random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .config import Init, PrefixConfig
from .errors import PrefixConfigError, PrefixInputError, PrefixWarning
from .geometry import Geometry, activations, evaluation_mode, ordinary_tokens, recording_cache
from .injection import require_owner
from .parameterization import PrefixTensors


@dataclass(frozen=True)
class InitInputs:
    """Everything an initializer may draw from (`base`: what the prefix joins); each checks for what it needs."""

    base: PreTrainedModel
    geometry: Geometry
    config: PrefixConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    input_ids: torch.Tensor | None = None
    past_key_values: Cache | None = None


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


def tensors_from_cache(cache: Cache, geometry: Geometry, num_virtual_tokens: int) -> PrefixTensors:
    """The keys and values of a cache as a prefix.

    Args:
        cache: A cache of one row that holds exactly `num_virtual_tokens` tokens, read from position 0 without a prefix.
        geometry: The base model's shapes.
        num_virtual_tokens: Length `p` of the prefix.

    Returns:
        Copies of the keys `(H, p, Dk)` and values `(H, p, Dv)` by name.

    Raises:
        PrefixInputError: The cache has other layers, another length or more than one row.
    """
    require_owner(cache, None)
    tensors: PrefixTensors = {}
    for site, index, shape in geometry.layers():
        for role, width in (("key", shape.key_width), ("value", shape.value_width)):
            states = getattr(cache.layers[index], f"{role}s", None) if index < len(cache.layers) else None
            expected = (1, shape.kv_heads, num_virtual_tokens, width)
            if states is None or tuple(states.shape) != expected:
                found = "nothing" if states is None else f"{role}s of shape {tuple(states.shape)}"
                raise PrefixInputError(
                    f"Layer {index} of the cache holds {found} where {expected} is needed (one row, "
                    "num_virtual_tokens tokens). Run the base model on exactly that many tokens, with a cache that "
                    "keeps them all, e.g. DynamicCache()."
                )
            tensors[f"{site}.layers.{index}.{role}"] = states[0].detach().clone()
    return tensors


def _vocabulary(inputs: InitInputs) -> PrefixTensors:
    """Activations of words that the base model itself writes: a random first one, the others sampled from it.

    Text that the model finds likely leaves its behaviour nearly as it is, which random words do not (figures in
    docs/results.md), and it takes nothing but the base. A backbone without a language model's head writes with its word
    embeddings if its config ties the two; otherwise the words are random.
    """
    base, p = inputs.base, inputs.config.num_virtual_tokens
    generator = torch.Generator().manual_seed(inputs.config.init_seed)
    ordinary = ordinary_tokens(base)
    word = torch.multinomial(ordinary, 1, generator=generator)
    cache = recording_cache(base)
    with evaluation_mode(base), torch.no_grad():
        for _ in range(p):
            output = base(input_ids=word[None].to(base.device), past_key_values=cache, use_cache=True)
            logits = _next_word(base, output)[: len(ordinary)].float().cpu()
            word = torch.multinomial((logits + ordinary.log()).softmax(dim=-1), 1, generator=generator)
    return tensors_from_cache(cache, inputs.geometry, p)


def _next_word(base: PreTrainedModel, output: Any) -> torch.Tensor:
    """Logits of the next word, `(vocabulary,)`, as well as the model can tell them."""
    if "logits" in output:
        logits: torch.Tensor = output.logits[0, -1]
        return logits
    last: torch.Tensor = output.last_hidden_state[0, -1]
    embeddings = cast("torch.Tensor", base.get_input_embeddings().weight)
    if base.config.tie_word_embeddings and last.shape[0] == embeddings.shape[1]:
        return torch.mv(embeddings, last.to(embeddings))
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
    return tensors_from_cache(activations(inputs.base, repeated[None]), inputs.geometry, p)


def _cache(inputs: InitInputs) -> PrefixTensors:
    """A given key/value cache of the base model."""
    if inputs.past_key_values is None:
        raise PrefixConfigError(
            'init="cache" needs the cache: pass past_key_values=... with num_virtual_tokens tokens.'
        )
    return tensors_from_cache(inputs.past_key_values, inputs.geometry, inputs.config.num_virtual_tokens)


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
    "cache": _cache,
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
