"""How a prefix gets into one call of the base model, at every site.

The base's own `forward` or `generate` runs unchanged; for its duration the passes of four kinds of modules inside it go
through interventions: the text decoder (`decoder.py`), the encoder and its attention layers, and the attention layers
between the two. Everything around them, heads, image towers, losses, generation, deals with real tokens only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from .arguments import by_name, new_tokens_of
from .attention import supply
from .cache import PrefixedLayer
from .call import PrefixCall
from .checkpointing import Checkpoints, is_checkpointed, is_reentrant
from .decoder import DecoderInjection
from .encoder import EncoderInjection
from .errors import PrefixInputError, PrefixNotConsumedError
from .hidden_tokens import HidingMasks
from .local_windows import LocalWindows
from .masks import WideMasks
from .ownership import require_encoding
from .packing import REPEATS
from .passes import Entered, Intervention, intervening, keep_gates
from .row_positions import position_modules, positions_by_row
from .structure import Structure

_ABOUT_REAL_TOKENS_ONLY = {"position_ids", *REPEATS}
"""Keywords that some models take silently and that would be wrong, or without effect, with a prefix."""


class Injection:
    """What has to be known about one base model to run it with a prefix.

    Args:
        base: The base model.
        structure: What it consists of.
    """

    def __init__(self, base: PreTrainedModel, structure: Structure) -> None:
        self.base = base
        self.structure = structure
        signature = inspect.signature(base.forward)
        self.names = tuple(signature.parameters)
        self.accepted = _accepted(signature)
        self.decoder = DecoderInjection(base, structure)
        self.local_windows = LocalWindows(base)
        self.encoder = EncoderInjection(structure)
        self.may_be_checkpointed = [one for one in base.modules() if hasattr(one, "gradient_checkpointing")]
        self.stacks = [one for one in base.modules() if isinstance(one, nn.ModuleList)]
        keep_gates([*structure.modules, *position_modules(structure.decoder)])

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call of the base by name.

        Raises:
            PrefixInputError: An argument is given twice, or too many by position.
        """
        named = by_name(self.names, args, kwargs)
        if len(named) != len(args) + len(kwargs):
            raise PrefixInputError("An argument was given twice, by position and by name, or too many by position.")
        return named

    def understood(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """As `named`, after checking that the base understands each argument.

        Raises:
            PrefixInputError: Also for a keyword that the base would ignore.
        """
        named = self.named(args, kwargs)
        _require_known(named, self.accepted)
        return named

    def understood_by(self, part: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a part of the base."""
        signature = inspect.signature(part.forward)
        named = by_name(signature.parameters, args, kwargs)
        _require_known(named, _accepted(signature))
        return named

    @contextmanager
    def injected(
        self, call: PrefixCall, arguments: Mapping[str, Any], more: Sequence[Intervention] = ()
    ) -> Iterator[None]:
        """While this is open, the base runs with a prefix in this context.

        Args:
            call: The prefix.
            arguments: The call's arguments by name, in terms of real tokens.
            more: Other interventions in the same call.

        Raises:
            PrefixNotConsumedError: The base has not read the prefix in the end.
            PrefixInputError: Given encoder outputs were made without the prefix.
        """
        if self.structure.encoder is not None and arguments.get("encoder_outputs") is not None:
            encoded = arguments["encoder_outputs"]
            require_encoding(encoded, call.owner(encoded[0].shape[0]) if "encoder" in call.sites else None)
            call.read.add("encoder")
        call.checkpointed = self.base.training and is_checkpointed(self.may_be_checkpointed)
        if call.checkpointed and is_reentrant(self.base) and self._shares_caches():
            raise PrefixInputError(
                f"Layers of {type(self.base).__name__} read the keys and values of other layers, and reentrant "
                "gradient checkpointing loses the gradients on that way. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        interventions = self._interventions(call)
        with intervening([*interventions, *more]), self._checkpoints(call, interventions):
            yield
        missing = [site for site in call.sites if site not in call.read]
        if missing:
            raise PrefixNotConsumedError(
                f"The base model ran without reading the prefix at {', '.join(missing)}, so its output ignores it. "
                f"Something inside {type(self.base).__name__} calls its parts in a way of its own; remove hooks and "
                "wrappers, or report the model."
            )

    @contextmanager
    def encoding(self, call: PrefixCall) -> Iterator[None]:
        """While this is open, the encoder alone runs with its prefix in this context."""
        with intervening(self.encoder.interventions(call)):
            yield

    def _shares_caches(self) -> bool:
        """Whether some self-attention layers of the decoder asked for no cache of their own."""
        asking = {one.module for one in self.structure.self_attention}
        known = asking | {one.module for one in self.structure.cross_attention}
        kinds = tuple({type(module) for module in asking})
        return any(isinstance(module, kinds) and module not in known for module in self.structure.decoder.modules())

    def _checkpoints(self, call: PrefixCall, interventions: list[Intervention]) -> AbstractContextManager[None]:
        """What makes checkpointed layers read the prefix in both of their runs."""
        if not call.checkpointed:
            return nullcontext()
        attention = {
            "encoder": self.structure.encoder_attention,
            "decoder": self.structure.self_attention,
            "cross": self.structure.cross_attention,
        }
        slots = {one.module: (site, one.index) for site in call.sites for one in attention[site]}
        if "encoder" in call.sites:
            slots |= {one.module: ("encoder", index) for index, one in enumerate(self.structure.written_out)}
        outer = {self.structure.decoder, self.structure.encoder}
        inner = [one for one in interventions if one.module not in outer]
        return Checkpoints(inner, slots, call, lambda: self._opened(call)).acting(self.base)

    def _interventions(self, call: PrefixCall) -> list[Intervention]:
        interventions = self.encoder.interventions(call)
        if call.sites != ("encoder",):
            interventions.append(self._decoder_intervention(call))
        if call.varies("decoder") and not self.decoder.takes_positions:
            interventions += positions_by_row(self.decoder.decoder, call)
        if "decoder" in call.sites and (call.checkpointed or call.hides("decoder")):
            masks, hiding = WideMasks(self.decoder.text_config._attn_implementation), HidingMasks()
            for attention in self.structure.self_attention:
                given = call.cache_for(attention.takes_pair, "decoder") if call.checkpointed else None
                mask = None
                if self.decoder.counts_mask and call.hidden is not None:
                    mask = _mask_that_hides(call, hiding, attention.index)
                elif call.hides("decoder"):
                    mask = _mask_of_one_token(call, masks, attention.index)
                interventions.append(supply(attention, given, mask))
        if "cross" in call.sites:
            known = WideMasks(self.decoder.text_config._attn_implementation)

            def mask_of_source(given: Any, states: torch.Tensor) -> Any:
                columns = call.columns("cross", states.shape[0], states.device)
                return known.widened(given, columns, call.source_length, states)

            for attention in self.structure.cross_attention:
                given = call.cache_for(attention.takes_pair, "cross") if call.checkpointed else None
                interventions.append(supply(attention, given, mask_of_source))
        return interventions

    def _opened(self, call: PrefixCall) -> AbstractContextManager[None]:
        return self.local_windows.opened(call.length("decoder"))

    def _decoder_intervention(self, call: PrefixCall) -> Intervention:
        injection = self.decoder

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
            arguments = injection.named(args, kwargs)
            if self.structure.encoder is not None:
                call.source_length = arguments["encoder_hidden_states"].shape[1]
            call.begin_pass(new_tokens_of(arguments).shape[0])
            entered = injection.enter(arguments, call)
            call.cache = entered["past_key_values"]
            return entered, self._opened(call) if self.local_windows.modules else None

        def leave(output: Any, arguments: dict[str, Any]) -> Any:
            output = injection.leave(output, arguments)
            call.read |= {"decoder", "cross"}
            return output

        return Intervention(injection.decoder, enter, leave)


def _mask_of_one_token(call: PrefixCall, masks: WideMasks, index: int) -> Callable[[Any, torch.Tensor], Any]:
    """Masks of a layer whose decoder makes none for a single token (LED's), where rows hide parts of a prefix."""

    def mask(given: Any, states: torch.Tensor) -> Any:
        if given is not None or states.shape[1] > 1:
            return given
        columns = call.columns("decoder", states.shape[0], states.device)
        return masks.widened(None, columns, _layer_of(call, index).get_mask_sizes(1)[0] - columns.length, states)

    return mask


def _mask_that_hides(call: PrefixCall, masks: HidingMasks, index: int) -> Callable[[Any, torch.Tensor], Any]:
    """Masks of a layer whose decoder counts its tokens in the mask that it gets, so that nothing is hidden there."""

    def mask(given: Any, states: torch.Tensor) -> Any:
        columns, layer = call.columns("decoder", states.shape[0], states.device), _layer_of(call, index)
        return masks.hidden(given, columns, layer.get_mask_sizes(states.shape[1])[0], layer.order, states)

    return mask


def _layer_of(call: PrefixCall, index: int) -> PrefixedLayer:
    """What a layer of the decoder reads in self-attention."""
    cache = call.cache
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    assert own is not None
    layer = own.layers[index]
    assert isinstance(layer, PrefixedLayer)
    return layer


def _accepted(signature: inspect.Signature) -> set[str]:
    """Names of the arguments that a forward function reads."""
    parameters = signature.parameters
    accepted = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(accepted) < len(parameters):
        # What a `**kwargs` of transformers stands for; anything else would vanish in it.
        accepted |= {"return_dict", "use_cache", *TransformersKwargs.__annotations__} - _ABOUT_REAL_TOKENS_ONLY
        if "position_ids" in accepted:
            accepted |= set(REPEATS)
    return accepted


def _require_known(named: Mapping[str, Any], accepted: set[str]) -> None:
    unknown = sorted(name for name in named if name not in accepted)
    if unknown:
        raise PrefixInputError(
            f"The base model does not understand {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}."
        )
