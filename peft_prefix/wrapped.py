"""A model around a base model that looks and behaves like the base to the rest of transformers."""

from __future__ import annotations

import inspect
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import without_peft
from .architecture import specialized
from .errors import PrefixInputError
from .example_inputs import loss_counts_items
from .placement import home
from .processes import readable


class WrappedModel(PreTrainedModel):
    """What transformers, accelerate and PEFT's users ask of a model, answered for the base that is inside.

    Attributes:
        base: The base model.
    """

    base_model_prefix = "base"
    base: PreTrainedModel
    _wrapper: type[PreTrainedModel]  # transformers evaluates annotations before this class has a name
    _is_awaiting_shards = False

    def __new__(cls, base: PreTrainedModel | None = None) -> Self:
        """Specialize the class, so that `transformers` reads the base's architecture from it."""
        if base is None:  # a copy is being made, and its class is special already
            return super().__new__(cls)
        base = without_peft(base)
        _require_base(base)
        architecture: type[Self] = specialized(cls, type(base))  # type: ignore[arg-type]  # classes are hashable
        return super().__new__(architecture)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the base's class, since this one is made while the program runs."""
        return _unspecialized, (self._wrapper, type(self.base)), self.__dict__

    def train(self, mode: bool = True) -> Self:
        """Switch the modes of prefixes and base; running statistics of the base stay as they are."""
        super().train(mode)
        for module in self.base.modules() if mode else ():
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Move prefixes and base, as any module.

        With `cpu_ram_efficient_loading` of FSDP2, accelerate moves a model to no device at all ("meta"), shards it and
        fills it again from its `state_dict()`, which does not hold the base. Every process has the base already
        (see `processes.py`), so it is sharded as it is.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _is_meta(*args, **kwargs):
            self._is_awaiting_shards = True
            return self
        return super().to(*args, **kwargs)  # type: ignore[no-any-return]

    def get_base_model(self) -> PreTrainedModel:
        """The base model, as PEFT users call it."""
        return self.base

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in the format that PEFT users know."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    @property
    def generation_config(self) -> Any:
        """The base model's generation settings."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "base" in self._modules:  # the constructor of transformers makes one before the base is there
            self.base.generation_config = value

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss counts items in the whole batch when it is told to (asked by the `Trainer`).

        Many losses of encoder-decoder models take `num_items_in_batch` and ignore it, and then gradients that are
        accumulated over several batches would be too large. So it is tried.
        """
        declared = getattr(self.base, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        parameters = inspect.signature(self.base.forward).parameters.values()
        takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        with readable(self.base):
            return takes_more and loss_counts_items(self.base)

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs, also where its base is spread over devices or put aside (`device_map`)."""
        return home(self.base)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The base model's `device_map`, if it was loaded with one; the `Trainer` then leaves it where it is."""
        devices = cast("dict[str, Any]", self.base.hf_device_map)
        return {f"base.{name}".rstrip("."): device for name, device in devices.items()}

    def get_input_embeddings(self) -> nn.Module:
        """The base model's input embeddings."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base model's input embeddings."""
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base model's vocabulary projection."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the base model's vocabulary."""
        return self.base.resize_token_embeddings(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        """The base model's vocabulary projection."""
        embeddings: nn.Module | None = self.base.get_output_embeddings()
        return embeddings

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' adapters are PEFT's, and belong to the base."""
        raise PrefixInputError(
            "Prefixes are no PEFT adapters: use load_prefix, add_prefix and set_prefix. An adapter beside the prefix "
            "belongs to the base: call the same method of model.base."
        )

    add_adapter = set_adapter = delete_adapter = get_adapter_state_dict = load_adapter
    enable_adapters = disable_adapters = active_adapters = load_adapter


def _unspecialized(wrapper: type[WrappedModel], base_class: type[PreTrainedModel]) -> WrappedModel:
    """An empty model of the class for this base; its content follows."""
    architecture: type[WrappedModel] = specialized(wrapper, base_class)  # type: ignore[arg-type]  # as above
    return architecture.__new__(architecture)


def _require_base(base: object) -> None:
    if isinstance(base, WrappedModel):
        raise PrefixInputError("This model has prefixes already; use add_prefix or load_prefix for another one.")
    if not isinstance(base, PreTrainedModel):
        raise PrefixInputError(
            f"The base must be a transformers model, not {type(base).__name__}. Load it first, e.g. with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


def _is_meta(device: Any = None, *args: Any, **kwargs: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "meta"
