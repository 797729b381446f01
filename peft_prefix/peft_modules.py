"""What PEFT calls the task of a base model, and which of its modules are trained and saved with an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .backbone import backbone_of
from .errors import IncompatibleBaseError, PrefixConfigError, name_of
from .modules_to_save import MODULES, ModuleWeights, kept_places, resolved_modules
from .processes import is_sharded

EMBEDDINGS = "prompt_embeddings"
"""Name of PEFT's matrix of keys and values."""
BASE = "base_model."
"""What PEFT puts before the names of the base's weights."""


class TaskType:
    """PEFT's names of tasks."""

    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


ADDED = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Modules that PEFT adds to `modules_to_save` for a task."""
_HEADS = {
    TaskType.SEQ_CLS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TaskType.TOKEN_CLS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    TaskType.QUESTION_ANS: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
"""Classes of models by task, as `AutoModelFor...` knows them."""


def task_type(base: PreTrainedModel) -> str | None:
    """PEFT's name for what a base model does; `None` where PEFT has no prefixes for it."""
    is_pair = bool(base.config.is_encoder_decoder)
    if base.can_generate() or base.get_output_embeddings() is not None:
        return TaskType.SEQ_2_SEQ_LM if is_pair else TaskType.CAUSAL_LM
    if is_pair:
        return None
    classes = {one.__name__ for one in type(base).__mro__}
    for task, mapping in _HEADS.items():
        if classes & set(mapping.values()):
            return task
    return TaskType.FEATURE_EXTRACTION if backbone_of(base) is base else None


def modules_of(base: PreTrainedModel, ends: Iterable[str]) -> tuple[str, ...]:
    """Names of the modules that PEFT trains and saves where `modules_to_save` is this.

    Args:
        base: The base model.
        ends: Names, each for all modules whose full name ends so, in the middle of a word or not; it may be none.

    Returns:
        The names in the base's order; what lies inside of such a module is not named again.
    """
    wanted = tuple(ends)
    found: list[str] = []
    for name, _ in base.named_modules(remove_duplicate=False):
        if name.endswith(wanted) and name and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found)


def state_of(base: PreTrainedModel, modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of some modules of the base, by their names in it."""
    parts = (base.get_submodule(name).state_dict(prefix=f"{name}.") for name in modules)
    return {place: tensor for part in parts for place, tensor in part.items()}


def weights_for(
    path: Path, shapes: Mapping[str, tuple[int, ...]], ends: Iterable[str], base: PreTrainedModel
) -> ModuleWeights:
    """Room for the weights that a file of PEFT brings along, once it is known that they are those of the base.

    Args:
        path: What to call the file in errors.
        shapes: Shapes of its tensors by name.
        ends: `modules_to_save` of its configuration.
        base: The base model.

    Raises:
        IncompatibleBaseError: The base has other modules, or they cannot be trained with a prefix.
    """
    names = modules_of(base, ends)
    expected = {BASE + place: tuple(one.shape) for place, one in state_of(base, names).items()}
    found = {name: shape for name, shape in shapes.items() if name != EMBEDDINGS}
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise IncompatibleBaseError(
                f"{path} brings {name[:200]!r} along, which is in no module of {name_of(base)} that modules_to_save of "
                "its configuration names. Load the base with the class that the adapter was trained with. If it is an "
                "embedding that PEFT saved because the vocabulary was resized, put it into the base, and save the "
                "adapter again with save_embedding_layers=False."
            )
        if found.get(name) != expected[name]:
            raise IncompatibleBaseError(
                f"{path} was trained with another head than {name_of(base)} has: {name} has shape {found.get(name)} in "
                f"the file, {expected[name]} is needed. Load the base as it was loaded for training: with the same "
                "class and, for a classifier, the same num_labels=..."
            )
    try:
        resolved_modules(base, names)
        return ModuleWeights(base, names)
    except PrefixConfigError as error:
        raise IncompatibleBaseError(f"{path} cannot be loaded onto {name_of(base)}: {error}") from error


def weights_to_write(
    names: tuple[str, ...], tensors: Mapping[str, torch.Tensor], base: PreTrainedModel, task: str
) -> dict[str, torch.Tensor]:
    """The weights of modules that PEFT expects in a file, by PEFT's names.

    PEFT looks for the head of a classifier in any case, and takes a name for all modules that end so; where the prefix
    has no weights of its own, the base's go in, and nothing changes.

    Args:
        names: Full names of the modules that the prefix has weights for.
        tensors: What the prefix's file would contain.
        base: The base model.
        task: PEFT's name for its task.

    Raises:
        PrefixConfigError: Weights of the base that are needed are quantized, elsewhere or not in memory.
    """
    places, _ = kept_places(base, names)
    found = {}
    for place, own in state_of(base, modules_of(base, (*names, *ADDED.get(task, ())))).items():
        weight = tensors[f"{MODULES}.{places[place]}"] if place in places else own
        if weight.is_meta or is_sharded(weight) or not weight.is_floating_point():
            raise PrefixConfigError(
                f"PEFT wants {place} in the file, and it is quantized, spread over processes or not in memory. Load "
                "the base with this module in memory and unquantized."
            )
        found[BASE + place] = weight.detach()
    return found
