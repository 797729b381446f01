"""`PrefixConfig`: everything that defines a prefix before it is trained."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import PrefixConfigError

Init = Literal["vocabulary", "text", "demonstrations", "cache", "prefix", "zeros", "normal"]
Reparameterization = Literal["none", "mlp"]
Site = Literal["encoder", "decoder", "cross"]
Sliding = Literal["pinned", "plain"]

_MOST_MODULES = 1000


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """What a prefix looks like, how it starts and how it is trained.

    Args:
        num_virtual_tokens: Length `p` of the prefix, at least 1.
        init: The initializer, i.e. what fills the prefix before training. `"vocabulary"` takes the keys and values
            that the base model computes for words that it writes itself; `"text"` those of `init_text` (or of
            `input_ids`); `"demonstrations"` those of solved examples of the task, behind `init_text` if there is one;
            `"cache"` a key/value cache that is given; `"prefix"` another prefix of the same model; `"zeros"` and
            `"normal"` need nothing. Activations of real words start far better than random numbers (Li & Liang 2021,
            section 7.4).
        init_text: The text for `init="text"`. It is cut to `num_virtual_tokens` tokens, or repeated to fill them. For
            `init="demonstrations"` an instruction that stands before them, whole.
        init_std: Standard deviation of `init="normal"`.
        init_seed: Seed of the random initializers; the global random state is neither read nor changed.
        reparameterization: `"none"` trains keys and values directly; `"mlp"` trains the paper's two-layer network
            that produces them (Li & Liang 2021, section 4.3). Both save the same plain keys and values.
        mlp_hidden_size: Width of the reparameterization's hidden layer and of its input embedding.
        dropout: Probability of dropping single numbers of the prefix while training.
        token_dropout: Probability of hiding a whole virtual token from a row while training, for each row and each
            virtual token by itself, at all sites and layers alike. Positions stay as they are.
        freeze_first_token: Whether virtual token 0, to which many models give the attention that nothing else wants,
            keeps the initializer's keys and values: it is not trained, and `token_dropout` leaves it visible.
        leave_one_out: For `init="demonstrations"`: whether a row that is one of the demonstrations is kept from seeing
            that one's virtual tokens while training, so that it cannot copy itself (Lu et al. 2025).
        sites: Where the prefix acts: `"encoder"` self-attention, `"decoder"` self-attention and `"cross"`-attention
            from decoder to encoder. All that the base has, if left out; a causal language model has `"decoder"` only.
        sliding_window: What happens to the prefix in decoder layers with a sliding window. `"pinned"` keeps it visible
            to every token, however far away, which is what prefix-tuning means; `"plain"` lets virtual tokens leave
            the window as real ones do, for prefixes that were trained so.
        modules_to_save: Modules of the base that are trained and saved with the prefix, by their full names or the ends
            of them (`"score"`). `None` finds the head of a model that is no language model; `()` trains the prefix
            alone.
        base_model_name_or_path: Name of the base model; filled in from the base when left out.
        base_model_revision: Revision of the base model on the Hub; filled in from the base when it is known.

    Raises:
        PrefixConfigError: A field is unknown or its value cannot be.

    Example:
        >>> PrefixConfig(num_virtual_tokens=20).init
        'vocabulary'
    """

    num_virtual_tokens: int = 20
    init: Init = "vocabulary"
    init_text: str | None = None
    init_std: float = 0.02
    init_seed: int = 0
    reparameterization: Reparameterization = "none"
    mlp_hidden_size: int = 512
    dropout: float = 0.0
    token_dropout: float = 0.0
    freeze_first_token: bool = False
    leave_one_out: bool = True
    sites: tuple[Site, ...] | None = None
    sliding_window: Sliding = "pinned"
    modules_to_save: tuple[str, ...] | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __new__(cls, *args: object, **kwargs: object) -> PrefixConfig:
        """Reject unknown fields by name before the dataclass does it without a hint."""
        if args:
            raise PrefixConfigError(
                "PrefixConfig takes keyword arguments only, e.g. PrefixConfig(num_virtual_tokens=20)."
            )
        _reject_unknown_fields(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _require_int("num_virtual_tokens", self.num_virtual_tokens, minimum=1)
        _require_int("mlp_hidden_size", self.mlp_hidden_size, minimum=1)
        _require_int("init_seed", self.init_seed, minimum=0, below=2**63)
        _require_choice("init", self.init, get_args(Init))
        _require_choice("reparameterization", self.reparameterization, get_args(Reparameterization))
        _require_number("dropout", self.dropout, minimum=0.0, below=1.0)
        _require_number("token_dropout", self.token_dropout, minimum=0.0, below=1.0)
        for name in ("freeze_first_token", "leave_one_out"):
            if not isinstance(getattr(self, name), bool):
                raise PrefixConfigError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        if self.freeze_first_token and self.num_virtual_tokens == 1:
            raise PrefixConfigError(
                "freeze_first_token leaves nothing to train of a prefix with one virtual token: use at least 2."
            )
        _require_number("init_std", self.init_std, minimum=0.0, below=math.inf)
        _require_choice("sliding_window", self.sliding_window, get_args(Sliding))
        if self.sites is not None:
            object.__setattr__(self, "sites", _validated_sites(self.sites))
        object.__setattr__(self, "modules_to_save", _validated_modules(self.modules_to_save))
        for name in ("init_text", "base_model_name_or_path", "base_model_revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise PrefixConfigError(f"{name} must be a string or None, not {value!r}.")
        if self.init_text is not None and self.init not in ("text", "demonstrations"):
            raise PrefixConfigError(
                f'init_text is given but init={self.init!r} does not read it: use init="text" or drop init_text.'
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PrefixConfig:
        """The inverse of `to_dict`.

        Raises:
            PrefixConfigError: A field is unknown or its value cannot be.
        """
        return cls(**dict(fields))

    def replace(self, **changes: Any) -> PrefixConfig:
        """A copy with some fields changed and everything validated again."""
        return dataclasses.replace(self, **changes)


def _reject_unknown_fields(kwargs: Mapping[str, object]) -> None:
    known = [field.name for field in dataclasses.fields(PrefixConfig)]
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
            raise PrefixConfigError(f"PrefixConfig has no field {name!r}: {hint}")


def _require_int(name: str, value: object, *, minimum: int, below: int = 2**31) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < below:
        shown = repr(value) if not isinstance(value, int) or abs(value) < below else f"one of {below} or more"
        raise PrefixConfigError(f"{name} must be an integer of at least {minimum}, not {shown}.")


def _require_number(name: str, value: object, *, minimum: float, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value < below:
        raise PrefixConfigError(f"{name} must be a number from {minimum} to below {below}, not {value!r}.")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PrefixConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def _validated_sites(sites: object) -> tuple[Site, ...]:
    known: tuple[Site, ...] = get_args(Site)
    if isinstance(sites, str) or not isinstance(sites, Iterable):
        raise PrefixConfigError(f"sites must be a list of site names, e.g. {list(known)}, not {sites!r}.")
    chosen = tuple(sites)
    if not chosen or any(site not in known for site in chosen) or len(set(chosen)) != len(chosen):
        raise PrefixConfigError(f"sites must name each of {list(known)} at most once and one at least, not {sites!r}.")
    return chosen


def _validated_modules(modules: object) -> tuple[str, ...] | None:
    if modules is None:
        return None
    chosen = None if isinstance(modules, str) or not isinstance(modules, Iterable) else tuple(modules)
    if chosen is None or not all(isinstance(name, str) and name.isprintable() and name for name in chosen):
        raise PrefixConfigError(
            f'modules_to_save must be a list of module names, e.g. ["score"], not {modules!r:.200}.'
        )
    if len(chosen) > _MOST_MODULES or len(set(chosen)) != len(chosen):
        raise PrefixConfigError(f"modules_to_save must have at most {_MOST_MODULES} names, each of them once.")
    return chosen
