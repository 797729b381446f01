"""Finding out everything about a base model before it is used, and leaving it as it was."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import PrefixError, UnsupportedModelError
from .example_inputs import example_inputs
from .geometry import Geometry
from .injection import Injection
from .passes import remove_gates
from .placement import home
from .recording import geometry_of, record
from .selftest import check_base
from .structure import find_structure

_Parts = list[tuple[nn.Module, dict[str, nn.Module | None], dict[str, Any]]]
"""Every module with its submodules and its plain settings."""


def examined(base: PreTrainedModel) -> tuple[Geometry, Injection]:
    """The base's geometry and a way into it, after trying both on a few tokens.

    Args:
        base: Any transformers model.

    Raises:
        UnsupportedModelError: A prefix cannot be put into it, or would act wrongly.
    """
    before = _parts(base)
    try:
        with _full_precision(home(base)):
            structure = find_structure(base)
            geometry = geometry_of(type(base).__name__, record(base, structure, example_inputs(base)))
            injection = Injection(base, structure)
            geometry = check_base(base, injection, geometry)
        _require_unchanged(base, before)
    except PrefixError:
        remove_gates(base)
        raise
    except Exception as error:
        remove_gates(base)
        raise UnsupportedModelError(
            f"{type(base).__name__} could not be run with a prefix on a few tokens, so it cannot be used with one: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        ) from error
    return geometry, injection


def _full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Without the user's autocast, whose rounding would look like a base that reads a prefix wrongly."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _parts(base: PreTrainedModel) -> _Parts:
    return [
        (module, dict(module._modules), {k: v for k, v in vars(module).items() if isinstance(v, (str, int, bool))})
        for module in base.modules()
    ]


def _require_unchanged(base: PreTrainedModel, before: _Parts) -> None:
    """Put back what a base has exchanged in itself, and refuse it.

    Raises:
        UnsupportedModelError: It has other modules than before.
    """
    changed = [module for module, parts, _ in before if module._modules != parts]
    if not changed:
        return
    for module, parts, settings in before:
        module._modules = parts
        vars(module).update(settings)
    raise UnsupportedModelError(
        f"{type(base).__name__} exchanges parts of itself for short inputs (in {type(changed[0]).__name__}), which a "
        "prefix cannot follow. Load it in the form that it has for short inputs, e.g. with "
        "attention_type='original_full' in its config."
    )
