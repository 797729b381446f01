"""What a base model consists of, as far as a prefix is concerned: found by running it, not by names.

A tiny forward pass with a cache shows which module asks for keys and values, and what runs around it. So quantized,
patched, multimodal and two-part models are seen as they will be used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from .arguments import by_name
from .attention import AttentionModule, supply
from .backbone import backbone_of
from .cache import PrefixedLayer
from .cache_encoder_decoder import SuppliedCache
from .errors import UnsupportedModelError
from .example_inputs import example_inputs, ordinary_ids, source_inputs
from .passes import Entered, Intervention, intervening
from .written_out import Layout, layout_of


@dataclass(frozen=True)
class Structure:
    """Where prefixes enter a base model.

    Args:
        decoder: The text model that self-attention belongs to: the innermost one that takes the cache. In a model with
            a head or with images it is a part of the base.
        encoder: The encoder of an encoder-decoder model.
        encoder_attention: Its attention layers, in order; empty where they cannot be given keys and values.
        written_out: Its attention layers, where they are written out by hand.
        cross_attention: The decoder's attention layers to the encoder.
        self_attention: The decoder's attention layers to itself that ask for a cache.
    """

    decoder: PreTrainedModel
    encoder: nn.Module | None = None
    encoder_attention: tuple[AttentionModule, ...] = ()
    written_out: tuple[Layout, ...] = ()
    cross_attention: tuple[AttentionModule, ...] = ()
    self_attention: tuple[AttentionModule, ...] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """Every module whose forward passes a call with a prefix changes, except for those of written-out attention."""
        attention = (*self.encoder_attention, *self.self_attention, *self.cross_attention)
        return [self.decoder, *([] if self.encoder is None else [self.encoder]), *(one.module for one in attention)]

    @property
    def text_config(self) -> Any:
        """Config of the text decoder."""
        return self.decoder.config


class _WatchedCache(DynamicCache):
    """A cache that notes which modules were running when it was asked."""

    def __init__(self, running: _Running, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.running = running
        self.calls: list[list[nn.Module]] = []
        self.modules: dict[nn.Module, int] = {}
        """The modules that asked, and their layers."""
        self.pairs: set[nn.Module] = set()
        """Those of them that had been given both caches in one."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(list(self.running))
        if self.running:
            self.modules.setdefault(self.running[-1], layer_idx)
            if self.running[-1] in self.running.with_pair:
                self.pairs.add(self.running[-1])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attention(self, *, is_cross: bool = False) -> tuple[AttentionModule, ...]:
        """The modules that asked, as far as they are attention layers."""
        found = (AttentionModule.of(module, index, is_cross=is_cross) for module, index in self.modules.items())
        return tuple(replace(one, takes_pair=one.module in self.pairs) for one in found if one is not None)


def find_structure(base: PreTrainedModel) -> Structure:
    """Run the base on a few tokens and see where keys and values come from.

    Args:
        base: Any transformers model.

    Raises:
        UnsupportedModelError: The model has no keys and values that a prefix could join.
    """
    name = type(base).__name__
    encoder = base.get_encoder() if base.config.is_encoder_decoder else None
    with evaluation_mode(base), torch.no_grad(), _running_modules(base) as running:
        text_config = base.config.get_text_config(decoder=True)
        cache = _WatchedCache(running, **({} if encoder is not None else {"config": text_config}))
        cross = _WatchedCache(running)
        past: Cache = cache if encoder is None else EncoderDecoderCache(cache, cross)
        with intervening([give_cache(module, past) for module in _models_with_cache(base, encoder)]):
            backbone_of(base)(**example_inputs(base))
    models = [module for module in (cache.calls or [[]])[0] if isinstance(module, PreTrainedModel)]
    if not models:
        raise UnsupportedModelError(
            f"{name} keeps no keys and values: none of its parts put any into a key/value cache (`past_key_values`), "
            "which is how a prefix reaches attention. Prefix-tuning needs a causal or an encoder-decoder language "
            "model, for example from AutoModelForCausalLM (BERT-like models with `is_decoder=True`)."
        )
    layouts = [] if encoder is None else [layout_of(module) for module in encoder.modules()]
    written_out = tuple(layout for layout in layouts if layout is not None)
    return Structure(
        decoder=models[-1],
        encoder=encoder,
        encoder_attention=() if encoder is None or written_out else _taking_cache(base, encoder),
        written_out=written_out,
        cross_attention=cross.attention(is_cross=True),
        self_attention=cache.attention(),
    )


def store_in(cache: Cache, attention: AttentionModule) -> Intervention:
    """Let an attention module that its model gives no cache store its keys and values in this one, as its layer 0."""
    return supply(attention, lambda _: SuppliedCache(PrefixedLayer(None, cache, 0)), None)


def give_cache(model: nn.Module, cache: Cache) -> Intervention:
    """Let a model that takes a cache have this one, whatever runs around it."""
    parameters = inspect.signature(model.forward).parameters

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        arguments = by_name(parameters, args, {**kwargs, "past_key_values": cache})
        if "use_cache" in parameters:
            arguments["use_cache"] = True
        return arguments, None

    return Intervention(model, enter)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards give every submodule its own mode back."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


class _Running(list[nn.Module]):
    """The modules that are running, outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.with_pair: set[nn.Module] = set()
        """Modules that were given an encoder-decoder cache."""


@contextmanager
def _running_modules(base: nn.Module) -> Iterator[_Running]:
    """The modules of the base that are running, outermost first."""
    running = _Running()

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(module)
        if any(isinstance(value, EncoderDecoderCache) for value in (*args, *kwargs.values())):
            running.with_pair.add(module)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in base.modules()]
    handles += [module.register_forward_hook(end) for module in base.modules()]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _models_with_cache(base: PreTrainedModel, encoder: nn.Module | None) -> list[nn.Module]:
    """The base and the models inside it that take a cache, other than an encoder."""
    inside_encoder = set() if encoder is None else set(encoder.modules())
    return [
        module
        for module in base.modules()
        if isinstance(module, PreTrainedModel)
        and module not in inside_encoder
        and "past_key_values" in inspect.signature(module.forward).parameters
    ]


def _taking_cache(base: PreTrainedModel, encoder: nn.Module) -> tuple[AttentionModule, ...]:
    """The encoder's attention layers, if they share the decoder's class and so take a cache that nobody gives them."""
    candidates = [
        module
        for module in encoder.modules()
        if module is not encoder and "past_key_values" in inspect.signature(module.forward).parameters
    ]
    innermost = [module for module in candidates if not any(other in candidates for other in _inside(module))]
    attention = [found for i, module in enumerate(innermost) if (found := AttentionModule.of(module, i)) is not None]
    caches = [_WatchedCache(_Running()) for _ in attention]
    interventions = [store_in(cache, one) for one, cache in zip(attention, caches, strict=True)]
    source = source_inputs(base, ordinary_ids(base, 1)[None])
    with evaluation_mode(base), torch.no_grad(), intervening(interventions):
        encoder(**source)
    reading = [one for one, cache in zip(attention, caches, strict=True) if cache.calls]
    return tuple(replace(one, index=index) for index, one in enumerate(reading))


def _inside(module: nn.Module) -> list[nn.Module]:
    return [submodule for submodule in module.modules() if submodule is not module]
