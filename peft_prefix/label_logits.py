"""A training loss needs logits only where there are labels, and the vocabulary projection is a large part of its cost.

Between the base's backbone and its head the states of unlabelled positions are left out: the head gets those of the
labelled ones as one long row, and the loss gets their labels. Loss and gradients are the same. Whether a base allows
that (its logits are its head's output as it is, and its loss compares them with labels, and nothing else) is tried on a
few tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from .errors import PrefixInputError
from .example_inputs import ordinary_ids, source_inputs
from .passes import Entered, Intervention, intervening, outside_of_calls
from .structure import evaluation_mode

IGNORED = -100
"""Label of positions that the loss leaves out."""
_NEUTRAL = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "num_items_in_batch", "use_cache"}
_NEUTRAL |= {"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_outputs", "return_dict"}
_NEUTRAL |= {"output_hidden_states", "output_attentions", "output_router_logits", "past_key_values"}
"""Arguments of a base that do not come between its head and its loss. With others, all logits are computed."""


class LabelLogits:
    """How to leave out the logits of unlabelled positions in one base model.

    Args:
        base: The base model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.shift = 0 if base.config.is_encoder_decoder else 1
        self._allowed: bool | None = None

    @property
    def allowed(self) -> bool:
        """Whether the base gives the same loss, found by trying it once."""
        if self._allowed is None:
            self._allowed = self._tried()
        return self._allowed

    def applies_to(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a training pass with these arguments can do without the other logits."""
        labels = arguments.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or arguments.get("return_dict") is False:
            return False
        if torch.compiler.is_compiling():  # the number of labels, known only when it runs, would break the graph
            return False
        given = {name for name, value in arguments.items() if value is not None}
        return given <= _NEUTRAL and self.allowed

    def pass_with(self, arguments: Mapping[str, Any]) -> LabelledPass:
        """One pass with these arguments."""
        return LabelledPass(self.base, self._head(), self.shift, arguments)

    def _head(self) -> nn.Module:
        head = self.base.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head

    def _tried(self) -> bool:
        """Whether loss and logits come out the same on a few tokens, padded and partly labelled."""
        if not isinstance(self.base.get_output_embeddings(), nn.Module):
            return False
        ids = ordinary_ids(self.base, 12).view(2, 6)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, -2:], labels[0, -2:], labels[1, :3] = 0, IGNORED, IGNORED
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.base.config.is_encoder_decoder:
            inputs = source_inputs(self.base, ids)
        with evaluation_mode(self.base), torch.no_grad(), outside_of_calls():
            try:
                return all(
                    self._same({**inputs, "labels": labels, **more})
                    for more in ({}, {"num_items_in_batch": torch.tensor(5, device=ids.device)})
                )
            except (ValueError, RuntimeError, IndexError, TypeError, AttributeError):
                return False  # what the base cannot do on a few tokens it does in its usual way on many

    def _same(self, arguments: dict[str, Any]) -> bool:
        with warnings.catch_warnings(record=True) as usual:
            warnings.simplefilter("always")
            expected, one = self.base(**arguments), self.pass_with(arguments)
        with warnings.catch_warnings(record=True) as caught, intervening([one.intervention]):
            warnings.simplefilter("always")
            output = one.finished(self.base(**one.arguments))
        if len(caught) > len(usual):
            return False  # it has its own opinion of such arguments
        close = torch.isclose(output.loss.float(), expected.loss.float(), rtol=1e-3)
        return bool(close) and torch.allclose(output.logits[:], expected.logits, rtol=1e-3, atol=1e-3)


class LabelledPass:
    """One pass of a base whose head gets the labelled positions alone.

    Args:
        base: The base model.
        head: Its vocabulary projection.
        shift: How many places a label stands behind the logits that it is compared with.
        arguments: The pass's arguments by name.
    """

    def __init__(self, base: PreTrainedModel, head: nn.Module, shift: int, arguments: Mapping[str, Any]) -> None:
        self.head = head
        self.labels: torch.Tensor = arguments["labels"]
        rows, places = (self.labels[:, shift:] != IGNORED).nonzero(as_tuple=True)
        targets, index = self.labels[rows, places + shift], rows * self.labels.shape[1] + places
        # One place more, without a label. The loss of a causal model shifts it out; and there is always a place.
        self.targets = torch.cat([targets.new_full((1,), IGNORED), targets])[None]
        extra = index.new_zeros(1)
        self.index = torch.cat([index, extra] if shift else [extra, index])
        self.states: torch.Tensor | None = None
        self.arguments = {**_with_decoder_inputs(base, arguments), "labels": self.targets}
        self.intervention = Intervention(head, self._enter)

    def finished(self, output: Any) -> Any:
        """The base's output; its `logits` are computed when somebody looks at them."""
        assert self.states is not None
        output["logits"] = LogitsOnDemand(self.head, self.states)
        return output

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        (states,) = (*args, *kwargs.values())
        if states.shape[:2] != self.labels.shape or self.states is not None:
            raise PrefixInputError(
                f"The head gets states of shape {tuple(states.shape)} for labels of shape {tuple(self.labels.shape)}. "
                "Set model.label_only_logits = False."
            )
        self.states = states
        return {"input": states.flatten(0, 1)[self.index][None]}, None


class LogitsOnDemand:
    """Stands for logits `(batch, length, vocabulary)` and is computed when it is used like a tensor.

    Args:
        head: The vocabulary projection.
        states: What it would have got, `(batch, length, hidden)`.
    """

    def __init__(self, head: nn.Module, states: torch.Tensor) -> None:
        self._head = head
        self._states = states
        kind = states.device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._logits: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The logits, with gradients as the base's would have."""
        if self._logits is None:
            kind = self._states.device.type
            with outside_of_calls(), torch.autocast(kind, self._autocast, enabled=self._autocast is not None):
                self._logits = cast("torch.Tensor", self._head(self._states))
        return self._logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Functions of torch get the tensor."""
        args, kwargs = tree_map_only(cls, cls.tensor, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Everything that a tensor has."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return f"LogitsOnDemand({tuple(self._states.shape[:2])})"


def _with_decoder_inputs(base: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what the base would make of the labels, which it does not get to see as they are.

    Raises:
        AttributeError: The base does that where it cannot be asked for.
    """
    given = any(arguments.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if given or not base.config.is_encoder_decoder:
        return dict(arguments)
    return {**arguments, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=arguments["labels"])}
