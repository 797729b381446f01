"""Prefix-tuning (Li & Liang 2021) for any causal or encoder-decoder model of transformers."""

from . import trainer_integration as trainer_integration
from . import trainer_optimizer as trainer_optimizer
from .bank_trainer import PrefixBankTrainer
from .collator import PromptTargetCollator
from .config import PrefixConfig
from .errors import (
    IncompatibleBaseError,
    PrefixConfigError,
    PrefixError,
    PrefixFileError,
    PrefixInputError,
    PrefixNotConsumedError,
    PrefixWarning,
    UnsupportedModelError,
)
from .geometry import Geometry, LayerGeometry
from .hub import list_prefixes
from .model import PrefixModel, get_prefix_model
from .prefix_names import PrefixNamesCollator
from .resume import last_checkpoint
from .version import __version__

__all__ = [
    "Geometry",
    "IncompatibleBaseError",
    "LayerGeometry",
    "PrefixBankTrainer",
    "PrefixConfig",
    "PrefixConfigError",
    "PrefixError",
    "PrefixFileError",
    "PrefixInputError",
    "PrefixModel",
    "PrefixNamesCollator",
    "PrefixNotConsumedError",
    "PrefixWarning",
    "PromptTargetCollator",
    "UnsupportedModelError",
    "__version__",
    "get_prefix_model",
    "last_checkpoint",
    "list_prefixes",
]
