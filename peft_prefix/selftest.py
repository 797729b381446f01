"""The library's central promise, tried on the user's own model: a prefix of real tokens acts like those tokens.

Models differ in how they count positions and build masks, and new ones appear every month. A few forward passes on a
handful of tokens show, before any training, whether this model reads a prefix as it should, at every site.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .backbone import backbone_of
from .cache import KeyValue
from .call import PrefixCall, RowPrefix
from .errors import PrefixWarning, UnsupportedModelError
from .example_inputs import ordinary_ids, source_inputs
from .geometry import Geometry
from .injection import Injection
from .ownership import Owner
from .passes import intervening
from .placement import can_run
from .recording import record, recording
from .structure import evaluation_mode, give_cache

_P = 2
"""Virtual tokens of the tried prefix."""
_LENGTHS = (1, 3, 0)
"""Virtual tokens of rows that are tried together."""
_PADDING = 8
"""Padding tokens on the left that must not matter."""


def check_base(base: PreTrainedModel, injection: Injection, geometry: Geometry) -> Geometry:
    """Compare the base with two tokens as a prefix against the base with the same tokens as text.

    Sets `injection.decoder.counts_left_padding` if padding on the left moves the positions of this model, so that such
    a batch can be refused when it comes, and `injection.encoder.is_relative` if the encoder counts positions.

    Returns:
        The geometry, without the encoder (and after a warning) where that does not take a prefix.

    Raises:
        UnsupportedModelError: The results differ.
    """
    if not can_run(base):
        return geometry  # there is nothing to compute with
    trial = _Trial(base, injection)
    with evaluation_mode(base), torch.no_grad():
        if injection.structure.encoder is None:
            trial.causality()
        trial.decoder()
        if injection.structure.encoder is None:
            return geometry
        trial.cross()
        if "encoder" in geometry.sites and trial.encoder():
            return geometry
    warnings.warn(
        f"The encoder of {type(base).__name__} does not take a prefix (its attention is written in a way of its own): "
        "the prefix acts in the decoder and in cross-attention only.",
        PrefixWarning,
        stacklevel=5,
    )
    return geometry.only(["decoder", "cross"])


def rows_are_independent(base: PreTrainedModel, injection: Injection, geometry: Geometry) -> bool:
    """Whether a row of this base gives the same beside rows with longer prefixes, or with none, as it gives alone."""
    if not can_run(base):
        return True  # there is nothing to compute with
    with evaluation_mode(base), torch.no_grad():
        try:
            return _Trial(base, injection).mixture(geometry)
        except (ValueError, RuntimeError):
            return False  # it takes no such masks


def mask_moves_tokens(base: PreTrainedModel, injection: Injection) -> bool:
    """Whether a token that the 2D mask hides in the middle of a text lets those before it come nearer.

    So it is where a decoder counts the mask's ones for its biases by distance, whatever positions it is given.
    """
    decoder = injection.decoder
    makes_masks = decoder.has_windows or decoder.needs_slots or any(decoder.recurrent)  # then they are not 2D
    if injection.structure.encoder is not None or makes_masks or not can_run(base):
        return False
    with evaluation_mode(base), torch.no_grad():
        return _Trial(base, injection).moves_with_mask()


class _Trial:
    """Runs of one base on five tokens, each with and without a prefix."""

    def __init__(self, base: PreTrainedModel, injection: Injection) -> None:
        self.base = backbone_of(base)
        self.injection = injection
        self.structure = injection.structure
        self.ids = ordinary_ids(base, 5)[None]
        self.is_text = base.main_input_name == "input_ids"

    def causality(self) -> None:
        """Models that see both sides have no earlier tokens to keep, even if they take a cache."""
        changed = self.ids.clone()
        changed[:, -1] = changed[:, 0]
        before, after = (self._hidden({"input_ids": ids})[:, :-1] for ids in (self.ids, changed))
        if not _equal(before, after, 1e-5):
            raise UnsupportedModelError(
                f"{type(self.base).__name__} keeps no keys and values of earlier tokens: its tokens attend to both "
                "sides. Prefix-tuning needs a causal or an encoder-decoder model (for BERT-like ones, is_decoder=True)."
            )

    def decoder(self) -> None:
        """The first two tokens as the decoder's prefix, with and without padding on the left."""
        side = "" if self.structure.encoder is None else "decoder_"
        source = {} if not side else source_inputs(self.base, self.ids[:, :3])
        text = self.ids[:, _P:]
        states = record(self.base, self.structure, {**source, f"{side}input_ids": self.ids[:, :_P]})["decoder"]
        if any(self.injection.decoder.recurrent):
            # A prefix is no text for recurrent layers. What the base does with a cache that says so is the measure.
            expected = self._after_cache(states, text)
        else:
            expected = self._hidden({**source, f"{side}input_ids": self.ids})[:, _P:]
        arguments = {**source, f"{side}input_ids": text, f"{side}attention_mask": torch.ones_like(text)}
        try:
            actual = self._hidden(arguments, decoder=states)
        except AssertionError:  # it takes a cache for single tokens only
            self.injection.decoder.needs_slots = True
            actual = self._hidden(arguments, decoder=states)
        self._require(_equal(actual, expected), "decoder")

        # A prefix of random numbers has more effect than real tokens, so that a wrong distance to it shows.
        loud = [None if layer is None else (_noise(layer[0]), _noise(layer[1])) for layer in states]
        alone = self._hidden(arguments, decoder=loud)
        padded = torch.cat([text[:, :1].expand(-1, _PADDING), text], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :_PADDING] = 0
        arguments = {**source, f"{side}input_ids": padded, f"{side}attention_mask": mask}
        after_padding = self._hidden(arguments, decoder=loud)[:, _PADDING:]
        self.injection.decoder.counts_left_padding = not _equal(after_padding, alone, 1e-3)

    def cross(self) -> None:
        """The first two positions of an encoding as the prefix, the others as the encoding."""
        assert self.structure.encoder is not None
        source = source_inputs(self.base, self.ids)
        encoded = self.structure.encoder(**source)
        target = {"decoder_input_ids": self.ids[:, :3]}
        expected = self._hidden({"encoder_outputs": encoded, **target})
        states = record(self.base, self.structure, {"encoder_outputs": encoded, **target})["cross"]
        rest = type(encoded)(**{**encoded, "last_hidden_state": encoded[0][:, _P:]})
        actual = self._hidden({"encoder_outputs": rest, **target}, cross=_cut(states, slice(0, _P)))
        self._require(_equal(actual, expected), "cross")

    def moves_with_mask(self) -> bool:
        """Two tokens with a hidden one between them, and with a hidden one before them."""
        one, other, last = self.ids[:, :3].unbind(dim=1)
        given: dict[str, Any] = {}
        if self.injection.decoder.takes_positions:
            given["position_ids"] = torch.arange(3, device=self.ids.device)[None]

        def last_state(tokens: list[torch.Tensor], seen: list[int]) -> torch.Tensor:
            mask = torch.tensor([seen], device=self.ids.device)
            states = self.structure.decoder(input_ids=torch.stack(tokens, dim=1), attention_mask=mask, **given)[0]
            result: torch.Tensor = states[:, -1]
            return result

        between, before = last_state([one, other, last], [1, 0, 1]), last_state([other, one, last], [0, 1, 1])
        return _equal(between, before, 1e-6)

    def mixture(self, geometry: Geometry) -> bool:
        """Rows of the same text with prefixes of different lengths, together and alone."""
        rows, p = len(_LENGTHS), max(_LENGTHS)
        generator = torch.Generator().manual_seed(0)

        def noise(heads: int, width: int) -> torch.Tensor:
            return torch.randn(rows, heads, p, width, generator=generator).to(self.ids.device, self.base.dtype)

        states = {
            site: [
                None if one is None else (noise(one.kv_heads, one.key_width), noise(one.kv_heads, one.value_width))
                for one in layers
            ]
            for site, layers in geometry.sites.items()
        }
        return all(self._same_alone(self.ids[:, :length].expand(rows, -1), states) for length in (5, 1))

    def _same_alone(self, ids: torch.Tensor, states: dict[str, list[KeyValue | None]]) -> bool:
        p, owner = max(_LENGTHS), Owner("the self-test")
        side = "" if self.structure.encoder is None else "decoder_"
        inputs = {**(source_inputs(self.base, ids) if side else {}), f"{side}input_ids": ids}
        prefixes = [RowPrefix(length, tuple(states), owner) for length in _LENGTHS]
        together = self._hidden(inputs, PrefixCall(states=lambda _: states, prefixes=prefixes))
        for row, length in enumerate(_LENGTHS):
            own = {site: _cut(layers, slice(p - length, None), slice(row, row + 1)) for site, layers in states.items()}
            alone = self._hidden(
                {name: value[row : row + 1] for name, value in inputs.items()}, self._call(**own) if length else None
            )
            if not _equal(together[row : row + 1], alone, 1e-3):
                return False
        return True

    def encoder(self) -> bool:
        """Two of an encoder's tokens as its prefix, the others as text.

        Encoders see both sides, so the last tokens serve where keys know their positions themselves, and the first
        ones where attention counts distances.
        """
        if not self.is_text:
            return True  # its inputs have one length, so none can be left out
        encoder = self.structure.encoder
        assert encoder is not None
        with recording(self.structure) as run:
            expected = encoder(input_ids=self.ids)[0]
        states = run.states["encoder"]
        for relative, own, rest in ((False, slice(-_P, None), slice(0, -_P)), (True, slice(0, _P), slice(_P, None))):
            call = self._call(encoder=_cut(states, own))
            with self.injection.encoding(call):
                actual = encoder(input_ids=self.ids[:, rest])[0]
            if _equal(actual, expected[:, rest]):
                self.injection.encoder.is_relative = relative
                return self._ignores_padding(encoder, call, self.ids[:, rest], actual)
        return False

    def _ignores_padding(self, encoder: Any, call: PrefixCall, text: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether padding on the right changes nothing, so that the mask has the prefix's columns."""
        padded = torch.cat([text, text[:, :_P]], dim=1)
        mask = torch.ones_like(padded)
        mask[:, text.shape[1] :] = 0
        with self.injection.encoding(call):
            actual = encoder(input_ids=padded, attention_mask=mask)[0]
        return _equal(actual[:, : text.shape[1]], expected)

    def _after_cache(self, states: Sequence[KeyValue | None], text: torch.Tensor) -> torch.Tensor:
        """The base behind a cache whose attention layers are filled and whose recurrent layers are not."""
        cache = DynamicCache(config=self.structure.text_config)
        for index, layer in enumerate(states):
            if layer is not None:
                cache.update(*layer, index)
        mask = text.new_ones(1, _P + text.shape[1])
        arguments = {"input_ids": text, "attention_mask": mask}
        if self.injection.decoder.takes_positions:
            arguments["position_ids"] = torch.arange(_P, mask.shape[1], device=text.device)[None]
        with intervening([give_cache(self.structure.decoder, cache)]):
            return self._hidden(arguments)

    def _hidden(
        self, arguments: dict[str, Any], call: PrefixCall | None = None, **states: Sequence[KeyValue | None]
    ) -> torch.Tensor:
        """The decoder's last hidden states, whatever head comes behind it."""
        found: list[torch.Tensor] = []
        with ExitStack() as stack:
            call = self._call(**states) if states else call
            if call is not None:
                call.padding_mask = arguments.get("attention_mask")
                stack.enter_context(self.injection.injected(call, arguments))
            else:
                first = self.structure.decoder.register_forward_pre_hook(self._note_first_position, with_kwargs=True)
                stack.callback(first.remove)
            # Registered last, so that it sees what the decoder's caller sees.
            hook = self.structure.decoder.register_forward_hook(lambda module, args, output: found.append(output[0]))
            stack.callback(hook.remove)
            self.base(**arguments)
        return found[-1]

    def _note_first_position(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Some models begin to count at 1; without a prefix and a cache the first token shows it."""
        positions = self.injection.decoder.named(args, kwargs).get("position_ids")
        is_first = self.injection.decoder.named(args, kwargs).get("past_key_values") is None
        if is_first and isinstance(positions, torch.Tensor) and positions.dim() == 2:
            self.injection.decoder.first_position = int(positions[0, 0])

    def _call(self, **states: Sequence[KeyValue | None]) -> PrefixCall:
        length = next(layer[0].shape[2] for layers in states.values() for layer in layers if layer is not None)
        return PrefixCall(lambda rows: states, [RowPrefix(length, tuple(states), Owner("the self-test"))])

    def _require(self, equal: bool, site: str) -> None:
        if not equal:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} does not read a prefix of real tokens (site {site!r}) as it reads the "
                "same tokens as text, so its results with any prefix would be wrong. It probably counts positions or "
                "builds masks in a way of its own."
            )


def _noise(states: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(states.shape, generator=generator).to(states)
    return noise * states.float().std().clamp(min=0.1).to(states)


def _cut(states: Sequence[KeyValue | None], part: slice, rows: slice = slice(None)) -> list[KeyValue | None]:
    return [None if layer is None else (layer[0][rows, :, part], layer[1][rows, :, part]) for layer in states]


def _equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-2) -> bool:
    """Whether hidden states agree up to rounding; a wrong position or mask changes them by about their own spread.

    Args:
        actual: Hidden states.
        expected: What they should be.
        tolerance: In parts of their spread, in float32; fifty times as much in lower precision.
    """
    if expected.dtype != torch.float32:
        tolerance *= 50
    spread = (expected.float() - expected.float().mean()).norm()
    return bool((actual.float() - expected.float()).norm() <= tolerance * spread)
