"""Running a base model with the active prefix: one forward pass, of the whole base or of a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .bank import PrefixBank
from .call import PrefixCall
from .errors import PrefixInputError
from .examination import examined
from .headless import Headless
from .label_logits import LabelLogits
from .modules_to_save import base_weights, require_called
from .ownership import Owner, claim, require_encoding
from .packing import without_repeats
from .passes import Intervention, outside_of_calls
from .processes import complete, readable, require_no_wrapped_layers
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
            base: Any causal or encoder-decoder model of transformers, whatever its head.

        Raises:
            UnsupportedModelError: The model has no keys and values that a prefix could join.
        """
        complete(base)
        with readable(base):
            geometry, injection = examined(base)
        super().__init__(base.config)
        self.base = base.requires_grad_(False)
        self.geometry = geometry
        self.prefixes = PrefixBank(geometry)
        self._fillings = 0
        self._owners: dict[str, Owner] = {}
        self._injection = injection
        self._disabled = False
        self._label_logits = LabelLogits(base)
        self._label_only_logits = True
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with the active prefix.

        Args:
            *args: The base model's arguments.
            **kwargs: The base model's arguments, all in terms of real tokens: `attention_mask` `(batch, seen + new)`
                has no columns for the prefix, `position_ids` start at 0, `past_key_values` holds real tokens only.

        Returns:
            The base model's output. `loss` and `logits` (`(batch, new, vocabulary)` of a language model) are about real
            tokens; its `past_key_values` can be passed back in for the next tokens.

        Raises:
            PrefixInputError: An argument does not fit or is not understood.
            PrefixNotConsumedError: The base did not read the prefix, or has not called a module in `modules_to_save`.
        """
        arguments = self._injection.understood(args, kwargs)
        if self._disabled:
            require_no_prefix(arguments)
            return self.base(**arguments)
        arguments = without_repeats(arguments)
        if self.training and self._label_only_logits and self._takes_labels_only(arguments):
            labelled = self._label_logits.pass_with(arguments)
            with self._acting(labelled.arguments, more=[labelled.intervention]):
                return labelled.finished(self.base(**labelled.arguments))
        with self._acting(arguments):
            return self.base(**arguments)

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

        Called with the arguments of the base's own `base_model`, it returns that one's output. The base itself is
        `base`.
        """
        part = cast("PreTrainedModel", self.base.base_model)

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = self._injection.understood_by(part, args, kwargs)
            if self._disabled:
                require_no_prefix(arguments)
                return part(**arguments)
            arguments = without_repeats(arguments)
            with self._acting(arguments):
                return part(**arguments)

        return Headless(part, run)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder of an encoder-decoder base, with the active prefix.

        Returns:
            A function that takes the encoder's arguments and returns its output, which can be passed to `forward` and
            `generate` as `encoder_outputs`. For other bases, what the base returns.
        """
        encoder: Any = cast("Any", self.base).get_encoder(*args, **kwargs)
        known: Any = self._injection.structure.encoder
        if known is None or encoder is not known:
            return encoder

        def encode(*args: Any, **kwargs: Any) -> Any:
            if self._disabled:
                return encoder(*args, **kwargs)
            with self._injection.encoding(self._call({})):
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

    def _takes_labels_only(self, arguments: Mapping[str, Any]) -> bool:
        # A head of the prefix's own works only inside of a pass.
        return not self.prefixes.weights().module_names and self._label_logits.applies_to(arguments)

    @contextmanager
    def _acting(
        self, arguments: Mapping[str, Any], padding_mask: bool = True, more: Sequence[Intervention] = ()
    ) -> Iterator[None]:
        """While this is open, the base runs with the active prefix and its modules."""
        if self.base.training and not torch.compiler.is_compiling():
            require_no_wrapped_layers(self._injection.stacks)
        call = self._call(arguments if padding_mask else {})
        with self.prefixes.weights().in_place(self.base), self._injection.injected(call, arguments, more):
            yield
            require_called()

    def _call(self, arguments: Mapping[str, Any]) -> PrefixCall:
        """The active prefix, for one call of the base."""
        name, config, module = self.prefixes.in_use()
        # With positions of the user's own, padding is the user's business.
        counts = self._injection.structure.encoder is None and arguments.get("position_ids") is None
        mask = arguments.get("attention_mask") if counts else None
        return PrefixCall(
            states=self.prefixes.states(),
            length=config.num_virtual_tokens,
            sites=config.sites or (),
            owner=self._owner(name, module),
            sliding=config.sliding_window,
            padding_mask=mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None,
        )

    def _owner(self, name: str, module: nn.Module) -> Owner:
        """The prefix as it is now: caches from before a training step are as foreign as those of another prefix."""
        if not torch.compiler.is_compiling():  # versions are not seen there
            version = sum(0 if p.is_inference() else p._version for p in module.parameters())
            label = f"{name!r} of model {id(self):x}.{self._fillings}.{version}"
            if name not in self._owners or self._owners[name].label != label:
                self._owners[name] = Owner(label)
        return self._owners[name]


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
