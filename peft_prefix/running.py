"""Running a base model with the active prefix: one forward pass, of the whole base or of a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import Cache, PreTrainedModel

from .adapters import freeze_base, without_peft
from .bank import PrefixBank
from .call import PrefixCall
from .config import PrefixConfig
from .errors import PrefixInputError, UnsupportedModelError
from .examination import examined
from .headless import Headless
from .hidden_tokens import HiddenTokens
from .label_logits import LabelLogits
from .modules_to_save import base_weights, require_called
from .ownership import claim, require_encoding
from .packing import without_repeats
from .passes import Intervention, outside_of_calls
from .processes import complete, readable, require_no_wrapped_layers
from .readers import PrefixNames, Readers, named_entries
from .selftest import mask_moves_tokens, rows_are_independent
from .wrapped import WrappedModel


class RunningModel(WrappedModel):
    """A base model whose forward passes read the active prefix.

    Attributes:
        geometry: Where the base keeps keys and values, and in which shapes.
        prefixes: The named prefixes.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Freeze the base and find its geometry.

        Args:
            base: Any causal or encoder-decoder model of transformers, whatever its head, or a `PeftModel` around one.
                Adapters of PEFT stay as they are, trained or frozen.

        Raises:
            UnsupportedModelError: The model has no keys and values that a prefix could join.
        """
        base = without_peft(base)
        complete(base)
        with readable(base):
            geometry, injection = examined(base)
        super().__init__(base.config)
        self.base = freeze_base(base)
        self.geometry = geometry
        self.prefixes = PrefixBank(geometry)
        self._mixes: bool | None = None
        self._injection = injection
        self._disabled = False
        self._label_logits = LabelLogits(base)
        self._label_only_logits = True
        self.train(base.training)

    def forward(self, *args: Any, prefix_names: PrefixNames | None = None, **kwargs: Any) -> Any:
        """Run the base with the active prefix, or with one for each row.

        Args:
            *args: The base model's arguments.
            prefix_names: The name of each row's prefix, `None` for rows that run without one. Their lengths and sites
                may differ. Where prefixes are trained, each gets the gradient of its own rows.
            **kwargs: The base model's arguments, all in terms of real tokens: `attention_mask` `(batch, seen + new)`
                has no columns for the prefix, `position_ids` start at 0, `past_key_values` holds real tokens only.

        Returns:
            The base model's output. `loss` and `logits` (`(batch, new, vocabulary)` of a language model) are about real
            tokens; its `past_key_values` can be passed back in for the next tokens.

        Raises:
            PrefixConfigError: There is no prefix of a name, or none is active and none is named.
            PrefixInputError: An argument does not fit or is not understood.
            PrefixNotConsumedError: The base did not read the prefix, or has not called a module in `modules_to_save`.
        """
        return self._run(self.base, self._injection.understood(args, kwargs), prefix_names)

    @contextmanager
    def disable_prefix(self) -> Iterator[None]:
        """Inside this context the model is exactly its base."""
        before, self._disabled = self._disabled, True
        try:
            with outside_of_calls(), base_weights():
                yield
        finally:
            self._disabled = before

    @property
    def base_model(self) -> Any:
        """The base without its head, as transformers calls it, with the active prefix.

        Called with the arguments of the base's own `base_model` (and `prefix_names`), it returns that one's output. The
        base itself is `base`.
        """
        part = cast("PreTrainedModel", self.base.base_model)

        def run(*args: Any, prefix_names: PrefixNames | None = None, **kwargs: Any) -> Any:
            return self._run(part, self._injection.understood_by(part, args, kwargs), prefix_names)

        return Headless(part, run)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder of an encoder-decoder base, with the active prefix.

        Returns:
            A function that takes the encoder's arguments (and `prefix_names`) and returns its output, which can be
            passed to `forward` and `generate` as `encoder_outputs`. For other bases, what the base returns.
        """
        encoder: Any = cast("Any", self.base).get_encoder(*args, **kwargs)
        known: Any = self._injection.structure.encoder
        if known is None or encoder is not known:
            return encoder

        def encode(*args: Any, prefix_names: PrefixNames | None = None, **kwargs: Any) -> Any:
            readers = self._readers(prefix_names, dict(zip(("inputs",), args, strict=False)) | kwargs)
            if readers is None:
                return encoder(*args, **kwargs)
            with self._injection.encoding(self._call(readers, {})):
                return encoder(*args, **kwargs)

        return encode

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a part of the base that runs alone has no prefix, and nothing would say so."""
        raise PrefixInputError(
            "A decoder on its own would run without the prefix. Call the model (output_hidden_states=True gives the "
            "decoder's states), or model.base.get_decoder() for the decoder without a prefix."
        )

    @property
    def label_only_logits(self) -> bool:
        """Whether the loss in training computes logits only where there are labels; `True` where the base allows it.

        Loss and gradients are the same; time and memory of the vocabulary projection shrink with the share of labels.
        The output's `logits` are computed when they are used. Set it to `False` to have them as a tensor.

        Raises:
            PrefixInputError: It is set to `True` for a base that does not allow it.
        """
        return self._label_only_logits and self._label_logits.allowed

    @label_only_logits.setter
    def label_only_logits(self, value: bool) -> None:
        if value and not self._label_logits.allowed:
            raise PrefixInputError(
                f"{type(self.base).__name__} does something of its own between its head and its loss (such as scaling "
                "logits, or making decoder inputs from labels), so it needs all of them. Leave label_only_logits as it "
                "is."
            )
        self._label_only_logits = value

    def _run(self, part: PreTrainedModel, arguments: dict[str, Any], names: PrefixNames | None) -> Any:
        """The base, or a part of it, with the prefixes of its rows."""
        readers = self._readers(names, arguments)
        if readers is None:
            require_no_prefix(arguments)
            with outside_of_calls(), base_weights():
                return part(**arguments)
        arguments = without_repeats(arguments)
        hidden = readers.hidden(arguments)
        if part is self.base and self.training and self._takes_labels_only(readers, arguments):
            labelled = self._label_logits.pass_with(arguments)
            with self._acting(readers, labelled.arguments, more=[labelled.intervention], hidden=hidden):
                return labelled.finished(part(**labelled.arguments))
        with self._acting(readers, arguments, hidden=hidden):
            return part(**arguments)

    def _takes_labels_only(self, readers: Readers, arguments: Mapping[str, Any]) -> bool:
        # A head of the prefix's own works only inside of a pass.
        return self._label_only_logits and not readers.weights.module_names and self._label_logits.applies_to(arguments)

    def _readers(
        self, names: PrefixNames | None, arguments: Mapping[str, Any], default_rows: int | None = None
    ) -> Readers | None:
        """Who reads which prefix in a call with these arguments; `None` if nobody reads one."""
        if names is None and self._disabled:
            return None
        entries = (
            [self.prefixes.entry()] if names is None else named_entries(self.prefixes, names, arguments, default_rows)
        )
        if self._disabled or all(entry is None for entry in entries):
            return None
        return Readers(self.prefixes, entries, by_row=names is not None)

    @contextmanager
    def _acting(
        self,
        readers: Readers,
        arguments: Mapping[str, Any],
        padding_mask: bool = True,
        more: Sequence[Intervention] = (),
        hidden: HiddenTokens | None = None,
    ) -> Iterator[None]:
        """While this is open, the base runs with its rows' prefixes and their modules."""
        if self.base.training and not torch.compiler.is_compiling():
            require_no_wrapped_layers(self._injection.stacks)
        call = self._call(readers, arguments if padding_mask else {})
        call.hidden = hidden
        with readers.weights.in_place(self.base), self._injection.injected(call, arguments, more):
            yield
            require_called()

    def _call(self, readers: Readers, arguments: Mapping[str, Any]) -> PrefixCall:
        """The rows' prefixes, for one call of the base."""
        if readers.vary:
            self._require_mixing()
        # With positions of the user's own, padding is the user's business.
        counts = self._injection.structure.encoder is None and arguments.get("position_ids") is None
        mask = arguments.get("attention_mask") if counts else None
        return PrefixCall(
            states=readers.states(self.base, self._injection.structure),
            prefixes=readers.prefixes,
            padding_mask=mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None,
        )

    def _learn_to_hide(self, config: PrefixConfig) -> None:
        """Find out how columns are hidden in this base, by trying it, if a prefix like this will need it."""
        wants = config.token_dropout > 0 or (config.init == "demonstrations" and config.leave_one_out)
        if wants and self._injection.decoder.counts_mask is None:
            with readable(self.base):
                self._injection.decoder.counts_mask = mask_moves_tokens(self.base, self._injection)

    def _require_mixing(self) -> None:
        """Check, by trying it once, that rows of this base can have prefixes of different lengths.

        Raises:
            UnsupportedModelError: They cannot.
        """
        if self._mixes is None:
            with readable(self.base):
                self._mixes = rows_are_independent(self.base, self._injection, self.geometry)
        if not self._mixes:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} counts positions in a way of its own, so rows with prefixes of different "
                "lengths cannot be in one batch. Give each row a prefix of the same length, or run them apart."
            )


def require_no_prefix(arguments: Mapping[str, Any]) -> None:
    """Check that what a disabled model is given was made without a prefix.

    Raises:
        PrefixInputError: A cache or an encoding was made with one.
    """
    past, encoded = arguments.get("past_key_values"), arguments.get("encoder_outputs")
    if isinstance(past, Cache):
        claim(past, None)
    if encoded is not None:
        require_encoding(encoded, None)
