"""Loading the base model that a saved prefix names.

The name comes from a file, perhaps a stranger's, so it decides as little as possible: a model of transformers is
loaded, from safetensors files, and code of its repository runs only if the user says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from .card_content import is_hub_id
from .checkpoint import read_description
from .errors import PrefixConfigError, PrefixFileError, some_of
from .hub import SavedFiles
from .patience import HUB_ERRORS
from .peft_config import read_config
from .plain_file import folder_here
from .tensor_file import opened

_LOADING_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, ValueError, KeyError, TypeError, ImportError)
_CLASS_OF_PEFT_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_REFUSED = {"config", "output_loading_info", "state_dict", "gguf_file"}
"""Options that make something else of a base, or of what is returned."""
_OF_THE_CONFIG = ("token", "cache_dir", "local_files_only")
"""Options that are for the configuration, too."""


@dataclass(frozen=True)
class NamedBase:
    """A base model as a saved prefix names it.

    Args:
        name: Its name on the Hub or its folder, if it is known.
        revision: Its revision on the Hub, if it is known.
        class_name: Name of its class in transformers, or of one of transformers' Auto classes, if it is known.
        labels: Names of a classifier's labels in order.
        problem_type: What kind of labels they are.
        file: The file that says so.
        is_from_hub: Whether that file is of a repository on the Hub.
    """

    name: str | None
    revision: str | None
    class_name: str | None
    labels: tuple[str, ...] | None
    problem_type: str | None
    file: Path
    is_from_hub: bool


def named_base(files: SavedFiles) -> NamedBase:
    """The base model that a saved prefix names.

    Raises:
        PrefixFileError: Its file is missing or damaged.
    """
    if files.peft_config is not None:
        peft = read_config(files.peft_config)
        class_name = _CLASS_OF_PEFT_TASK.get(peft.task_type or "")
        where = (files.peft_config, files.is_from_hub)
        return NamedBase(peft.base_model_name_or_path, peft.revision, class_name, None, None, *where)
    with opened(files.tensors) as content:
        description = read_description(content)
    return NamedBase(
        description.config.base_model_name_or_path,
        description.config.base_model_revision,
        description.base_model_class,
        description.labels,
        description.problem_type,
        files.tensors,
        files.is_from_hub,
    )


def load_base(named: NamedBase, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Load a base model.

    Args:
        named: What the prefix says of it.
        trust_remote_code: Whether code from its repository may run.
        **options: What `from_pretrained` of transformers takes.

    Raises:
        PrefixFileError: The prefix names none, or it cannot be loaded.
        PrefixConfigError: An option would make something else of it.
    """
    name = _checked_name(named)
    refused = sorted(options.keys() & _REFUSED)
    if refused:
        raise PrefixConfigError(
            f"{some_of(refused)} cannot be given for a base model that a prefix names. Load the base yourself and give "
            "it first: PrefixModel.from_pretrained(base, ...)."
        )
    source = {"revision": named.revision} if named.revision is not None else {}
    try:
        shared = {option: options[option] for option in _OF_THE_CONFIG if option in options}
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **source, **shared)
        if named.labels is not None:
            config.id2label = dict(enumerate(named.labels))
            config.label2id = {label: index for index, label in enumerate(named.labels)}
        if named.problem_type is not None:
            config.problem_type = named.problem_type
        auto = auto_class(named, config)
        # Pickles are not opened on a stranger's word.
        options = {"use_safetensors": True, **options}
        model = auto.from_pretrained(name, config=config, trust_remote_code=trust_remote_code, **source, **options)
    except PrefixFileError:
        raise
    except _LOADING_ERRORS as error:
        raise PrefixFileError(
            f"The base model {name!r}, which {named.file} names, could not be loaded ({error}). Load it yourself and "
            "give it first: PrefixModel.from_pretrained(base, ...)."
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def _checked_name(named: NamedBase) -> str:
    """The name, which must be one of the Hub's if the prefix is from there.

    Raises:
        PrefixFileError: It is missing, or leads to a file of this machine.
    """
    if named.name is None:
        raise PrefixFileError(
            f"{named.file} names no base model. Load it yourself and give it first: "
            "PrefixModel.from_pretrained(base, ...)."
        )
    if named.is_from_hub and not is_hub_id(named.name):
        raise PrefixFileError(
            f"{named.file} is from the Hub and names a base model {named.name!r} that is not, probably a folder on the "
            "machine that it was trained on. Load the base yourself and give it first: "
            "PrefixModel.from_pretrained(base, ...)."
        )
    if named.is_from_hub and folder_here(named.name) is not None:
        raise PrefixFileError(
            f"{named.file} names the base model {named.name!r} of the Hub, and there is a folder of that name here, "
            "which transformers would load instead. Load the base that you mean and give it first: "
            "PrefixModel.from_pretrained(base, ...)."
        )
    return named.name


def auto_class(named: NamedBase, config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """The Auto class of transformers that loads the class that the prefix was trained with.

    Raises:
        PrefixFileError: There is none.
    """
    usual = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    wanted = named.class_name or usual
    candidates = [
        auto
        for auto_name in dir(transformers)
        if auto_name.startswith("AutoModel")
        and isinstance(auto := getattr(transformers, auto_name), type)
        and issubclass(auto, _BaseAutoModelClass)
    ]
    remote = getattr(config, "auto_map", None) or {}
    for auto in candidates:
        mapping: Any = auto._model_mapping
        found = mapping[type(config)] if mapping is not None and type(config) in mapping else ()
        known = found if isinstance(found, (list, tuple)) else (found,)
        own_code = str(remote.get(auto.__name__, "")).rpartition(".")[2]
        if wanted in (auto.__name__, own_code, *(model.__name__ for model in known)):
            return auto
    raise PrefixFileError(
        f"{named.file} was trained on a {wanted}, which transformers does not find for the base model {named.name!r}. "
        "Load it yourself and give it first: PrefixModel.from_pretrained(base, ...)."
    )
