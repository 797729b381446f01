"""Where a model's backbone ends and its head begins, told from how the model is put together.

A language model is taken as a whole. A model with another head (a classifier, for example) is a backbone, which reads
tokens and keeps keys and values, and a few modules behind it. The prefix joins the backbone alone: the head's own code,
which may look for padding in the ids or in the mask, never meets it.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.utils import find_labels

from .errors import PrefixConfigError, some_of


def backbone_of(base: PreTrainedModel) -> PreTrainedModel:
    """The part that a prefix joins: a language model itself, and what is before the head of any other model."""
    if _is_language_model(base):
        return base
    backbone = getattr(base, base.base_model_prefix, None)
    return backbone if isinstance(backbone, PreTrainedModel) else base


def head_modules(base: PreTrainedModel) -> tuple[str, ...]:
    """Names of the modules outside of the backbone that have parameters; none in a language model or a bare backbone.

    Raises:
        PrefixConfigError: There is a head, but no telling where it begins.
    """
    if _is_language_model(base):
        return ()
    backbone = backbone_of(base)
    direct = [name for name, _ in base.named_parameters(recurse=False)]
    if (backbone is base and find_labels(type(base))) or (backbone is not base and direct):
        parts = [name for name, _ in base.named_children()]
        raise PrefixConfigError(
            f"{type(base).__name__} has a head, but where it begins cannot be told from its parts "
            f"{some_of(parts + direct)}. Name the modules to be trained, PrefixConfig(modules_to_save=[...]), or "
            "none, modules_to_save=[]."
        )
    if backbone is base:
        return ()
    behind = {
        name: part for name, part in base.named_children() if all(inner is not backbone for inner in part.modules())
    }
    return tuple(name for name, part in behind.items() if next(part.parameters(), None) is not None)


def _is_language_model(base: PreTrainedModel) -> bool:
    return base.can_generate() or base.get_output_embeddings() is not None
