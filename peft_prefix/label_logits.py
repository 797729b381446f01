"""A training loss needs logits only where there are labels, and the vocabulary projection is a large part of its cost.

Between the base's backbone and its head the states of unlabelled positions are left out: the head gets those of the
labelled ones as one long row, and the loss gets their labels. Loss and gradients are the same. Whether a base allows
that (its logits are its head's output as it is, and its loss compares them with labels, and nothing else) is tried on a
few tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import PrefixInputError
from .example_inputs import ordinary_ids, source_inputs
from .logits_on_demand import LogitsOnDemand
from .passes import Entered, Intervention, intervening, outside_of_calls
from .placement import home
from .prompt_target import IGNORED

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
        self._tried_with: tuple[Any, ...] | None = None
        self._allowed = False

    @property
    def allowed(self) -> bool:
        """Whether the base gives the same loss, found by trying it, and again when head or loss are exchanged."""
        now = (self.base.get_output_embeddings(), getattr(self.base, "loss_function", None), self.base.forward)
        if now != self._tried_with:
            self._allowed, self._tried_with = self._tried(), now
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
        ids = ordinary_ids(self.base, 18).view(3, 6)
        mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
        mask[0, -2:] = 0
        for row, start, end in ((0, 3, 4), (1, 2, 6), (2, 4, 6)):  # a mean over rows is another one than over tokens
            labels[row, start:end] = ids[row, start:end]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.base.config.is_encoder_decoder:
            inputs = source_inputs(self.base, ids)
        with _training_mode(self.base), torch.no_grad(), outside_of_calls():
            try:
                return all(
                    self._same({**inputs, "labels": labels, **more})
                    for more in ({}, {"num_items_in_batch": torch.tensor(7, device=ids.device)})
                )
            except (ValueError, RuntimeError, IndexError, TypeError, AttributeError):
                return False  # what the base cannot do on a few tokens it does in its usual way on many

    def _same(self, arguments: dict[str, Any]) -> bool:
        one = self.pass_with(arguments)
        expected, usual = self._run(arguments)
        with intervening([one.intervention]):
            output, caught = self._run(one.arguments)
        if caught > usual:
            return False  # it has its own opinion of such arguments
        output = one.finished(output)
        rounding = max(1e-5, 2 * torch.finfo(self.base.dtype).eps)
        close = torch.isclose(output.loss.float(), expected.loss.float(), rtol=rounding)
        return bool(close) and torch.allclose(output.logits[:], expected.logits, rtol=rounding, atol=1e-3)

    def _run(self, arguments: dict[str, Any]) -> tuple[Any, int]:
        """Output and number of warnings, with the same dropout each time."""
        device = home(self.base)
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng([device] * (device.type == "cuda")):
            warnings.simplefilter("always")
            torch.manual_seed(0)
            return self.base(**arguments), len(caught)


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
        output["logits"] = LogitsOnDemand(self.head, self.states, self.index, output["logits"])
        return output

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        (states,) = (*args, *kwargs.values())
        if states.shape[:2] != self.labels.shape or self.states is not None:
            raise PrefixInputError(
                f"The head gets states of shape {tuple(states.shape)} for labels of shape {tuple(self.labels.shape)}. "
                "Set model.label_only_logits = False."
            )
        self.states = states
        (name, *_) = [*kwargs, *inspect.signature(self.head.forward).parameters]
        return {name: states.flatten(0, 1)[self.index][None]}, None


def labelled_logits(logits: torch.Tensor | LogitsOnDemand, labels: torch.Tensor, shift: int) -> torch.Tensor:
    """The logits that labels are compared with, row after row, `(positions, vocabulary)`.

    Args:
        logits: Those of a base's output, all of them or only the ones at these labels.
        labels: Labels `(batch, length)`, -100 for none.
        shift: How many places a label stands behind the logits that it is compared with.
    """
    if isinstance(logits, LogitsOnDemand):  # there is one place more, see `LabelledPass`
        return logits.known[0, :-1] if shift else logits.known[0, 1:]
    return logits[:, : labels.shape[1] - shift][labels[:, shift:] != IGNORED]


@contextmanager
def _training_mode(base: nn.Module) -> Iterator[None]:
    """Let a base run as in training, except for layers that keep statistics."""
    modes = [(module, module.training) for module in base.modules()]
    for module, _ in modes:
        module.training = getattr(module, "running_mean", None) is None
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _with_decoder_inputs(base: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what the base would make of the labels, which it does not get to see as they are.

    Raises:
        AttributeError: The base does that where it cannot be asked for.
    """
    given = any(arguments.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if given or not base.config.is_encoder_decoder:
        return dict(arguments)
    return {**arguments, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=arguments["labels"])}
