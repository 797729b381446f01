"""Logits that nobody may ask for, computed when somebody does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import PrefixInputError
from .passes import outside_of_calls


class LogitsOnDemand:
    """Stands for logits `(batch, length, vocabulary)` and is computed when it is used like a tensor.

    Args:
        head: The vocabulary projection.
        states: What it would have got, `(batch, length, hidden)`.
        index: Which of them it got, as places in the flattened batch.
        known: The logits there, `(1, places, vocabulary)`.
    """

    def __init__(self, head: nn.Module, states: torch.Tensor, index: torch.Tensor, known: torch.Tensor) -> None:
        self._made_of = (head, states, index, known)
        self._device = states.device
        self.shape = torch.Size((*states.shape[:2], known.shape[-1]))
        self.dtype = known.dtype
        kind = states.device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._with_gradients = torch.is_grad_enabled()
        self._source: LogitsOnDemand | None = None
        self._logits: torch.Tensor | None = None

    @property
    def known(self) -> torch.Tensor:
        """The logits that were computed, `(1, places, vocabulary)`, with gradients."""
        return self._made_of[3]

    @property
    def device(self) -> torch.device:
        """Where the logits will be."""
        return self._device

    @property
    def ndim(self) -> int:
        """Three."""
        return len(self.shape)

    def dim(self) -> int:
        """Three."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> LogitsOnDemand:
        """The same in float32, and still not computed (accelerate asks all outputs for that)."""
        other = copy.copy(self)
        other._source, other.dtype, other._logits = self, torch.float32, None
        return other

    def tensor(self) -> torch.Tensor:
        """The logits, with gradients as the base's would have.

        Raises:
            PrefixInputError: The base does something with its head's output, which cannot be repeated here.
        """
        if self._logits is None and self._source is not None:
            self._logits = self._source.tensor().to(self.dtype)
        if self._logits is None:
            head, states, index, known = self._made_of
            kind = states.device.type
            with (
                outside_of_calls(),
                torch.inference_mode(mode=False),
                torch.set_grad_enabled(self._with_gradients),
                torch.autocast(kind, self._autocast, enabled=self._autocast is not None),
            ):
                logits = head(states)
                again = logits.detach().flatten(0, 1)[index].to(known.dtype)
            if not torch.allclose(again, known.detach()[0], rtol=1e-2, atol=1e-2):
                raise PrefixInputError(
                    "The model changes its head's output before it returns it, which began after training did. Set "
                    "model.label_only_logits = False to have its logits."
                )
            self._logits = logits
        return self._logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Functions of torch get the tensor."""
        args, kwargs = tree_map_only(cls, cls.tensor, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Everything else that a tensor has."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __repr__(self) -> str:
        return f"LogitsOnDemand{tuple(self.shape)}"

    def __copy__(self) -> LogitsOnDemand:
        other = object.__new__(LogitsOnDemand)
        vars(other).update(vars(self))
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the tensor."""
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.tensor(), memo)

    __hash__ = object.__hash__


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: LogitsOnDemand, *others: Any) -> Any:
        others = tuple(other.tensor() if isinstance(other, LogitsOnDemand) else other for other in others)
        return getattr(self.tensor(), name)(*others)

    operator.__name__ = name
    return operator


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHERS = ("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "setitem", "len", "iter")
_CONVERSIONS = ("bool", "float", "int", "contains", "array")
for _name in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), *_OTHERS, *_CONVERSIONS):
    setattr(LogitsOnDemand, f"__{_name}__", _operator(f"__{_name}__"))  # Python looks for these on the class
