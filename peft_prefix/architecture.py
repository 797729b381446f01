"""Making a wrapper look like its base model's architecture to the rest of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

from transformers import PreTrainedModel

from .prefix_names import COLUMN

Wrapper = TypeVar("Wrapper", bound=PreTrainedModel)

_ABOUT_SUBMODULES = (
    "base_model_prefix",
    "_tied_weights_keys",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_auto_class",
)
"""Settings of a model's class that name its own submodules, which the wrapper does not have."""


_ASKED_OF_THE_BASE = (
    "prepare_decoder_input_ids_from_labels",
    "compute_transition_scores",
    "_supports_logits_to_keep",
    "_prepare_model_inputs",
)
"""Methods that collators, users of scores, and `generate` of an assisted model look for: only the model knows the
answer, and a prefix does not change it."""


@cache
def specialized(wrapper: type[Wrapper], base_class: type[PreTrainedModel]) -> type[Wrapper]:
    """A subclass of `wrapper` that carries what transformers reads from the class of a model.

    The `Trainer` finds label names in the class's forward signature, pipelines know architectures by their class's
    name, attention backends are class attributes. All of that is the base's.

    Args:
        wrapper: A class of models that hold a base model and run it.
        base_class: The base model's class.

    Returns:
        The same subclass for the same arguments.
    """

    def forward(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        return wrapper.forward(self, *args, **kwargs)

    forward.__doc__ = wrapper.forward.__doc__
    forward.__signature__ = _with_names(inspect.signature(base_class.forward))  # type: ignore[attr-defined]
    settings = {
        name: getattr(base_class, name)
        for name, default in vars(PreTrainedModel).items()
        if name not in _ABOUT_SUBMODULES and not name.startswith("__") and _is_setting(default)
    }
    namespace = {
        **settings,
        "_wrapper": wrapper,
        "__module__": base_class.__module__,  # transformers looks some abilities up in the module's source
        "__qualname__": f"{wrapper.__qualname__}[{base_class.__name__}]",
        "__doc__": wrapper.__doc__,
        "forward": forward,
        "can_generate": classmethod(lambda _: base_class.can_generate()),
    }
    for name in _ASKED_OF_THE_BASE:
        if hasattr(base_class, name):
            namespace[name] = _delegated(name)
    return cast("type[Wrapper]", type(base_class.__name__, (wrapper,), namespace))


def _with_names(signature: inspect.Signature) -> inspect.Signature:
    """A forward's signature with the argument that names prefixes, so that the `Trainer` keeps a column of its name."""
    parameters = list(signature.parameters.values())
    has_more = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    own = inspect.Parameter(COLUMN, inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*parameters[: len(parameters) - has_more], own, *parameters[-1:][:has_more]])


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.base, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = "As the base's."
    return method


def _is_setting(value: object) -> bool:
    return not callable(value) and not isinstance(value, (property, classmethod, staticmethod))
