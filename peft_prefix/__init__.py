"""Prefix-tuning (Li & Liang 2021) for any causal or encoder-decoder model of transformers."""

from . import trainer_integration as trainer_integration
from . import trainer_optimizer as trainer_optimizer
from .bank_trainer import PrefixBankTrainer
from .collator import PromptTargetCollator
from .config import PrefixConfig
from .context_teacher import ContextTeacher
from .distillation import PrefixDistillationTrainer
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
from .teacher_store import StoredTeacher
from .teacher_targets import TeacherTargets
from .version import __version__

__all__ = [
    "ContextTeacher",
    "Geometry",
    "IncompatibleBaseError",
    "LayerGeometry",
    "PrefixBankTrainer",
    "PrefixConfig",
    "PrefixConfigError",
    "PrefixDistillationTrainer",
    "PrefixError",
    "PrefixFileError",
    "PrefixInputError",
    "PrefixModel",
    "PrefixNamesCollator",
    "PrefixNotConsumedError",
    "PrefixWarning",
    "PromptTargetCollator",
    "StoredTeacher",
    "TeacherTargets",
    "UnsupportedModelError",
    "__version__",
    "get_prefix_model",
    "last_checkpoint",
    "list_prefixes",
]
