"""`PrefixModel`: a frozen base model and the prefixes that can be put before it."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from . import checkpoint
from .architecture import specialized
from .bank import PrefixBank
from .call import PrefixCall
from .config import PrefixConfig
from .continuous_batching import RequestModel
from .errors import (
    IncompatibleBaseError,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixWarning,
    some_of,
)
from .examination import examined
from .example_inputs import loss_counts_items
from .headless import Headless
from .hub import locate_prefix
from .initializers import InitInputs, initial_tensors
from .label_logits import LabelLogits
from .modules_to_save import ModuleWeights, base_weights, require_called, resolved_modules
from .ownership import Owner, claim, require_encoding
from .packing import without_repeats
from .parameterization import PrefixTensors
from .passes import Intervention, outside_of_calls
from .placement import home, layer_devices
from .processes import complete, is_sharded, readable, require_no_wrapped_layers, whole
from .stopping import PositionsUsedUp

DEFAULT_PREFIX = "default"
_PREFIXES = "prefixes."
"""What the names of all prefixes' parameters begin with."""


class PrefixModel(PreTrainedModel):
    """A frozen transformers model with trainable prefixes. Made by `get_prefix_model` or `from_pretrained`.

    It takes the arguments of the base model, gives the outputs of the base model, and to the rest of transformers (the
    `Trainer`, pipelines, `generate`) it is a model of the base's architecture. All lengths, masks and positions are
    those of real tokens; the prefix is added inside. Only the prefixes' parameters require gradients, and only they
    are in `state_dict()`. They include each prefix's own weights for the modules in `PrefixConfig.modules_to_save`.
    `train()` and `eval()` reach the base, too: its own dropout acts in training, as in fine-tuning.

    Attributes:
        base: The base model. Called directly, it runs without any prefix (not from inside `generate`, whose passes it
            would take part in; use `disable_prefix` there).
        geometry: Where the base keeps keys and values, and in which shapes.
        prefixes: The named prefixes.
    """

    base_model_prefix = "base"
    base: PreTrainedModel

    def __new__(cls, base: PreTrainedModel | None = None) -> PrefixModel:
        """Specialize the class, so that `transformers` reads the base's architecture from it."""
        if base is None:  # a copy is being made, and its class is special already
            return super().__new__(cls)
        _require_base(base)
        architecture: type[PrefixModel] = specialized(cls, type(base))  # type: ignore[arg-type]  # classes are hashable
        return super().__new__(architecture)

    def __init__(self, base: PreTrainedModel) -> None:
        """Freeze the base and find its geometry.

        Args:
            base: Any causal or encoder-decoder model of transformers, whatever its head.

        Raises:
            UnsupportedModelError: The model has no keys and values that a prefix could join.
        """
        complete(base)
        with readable(base):
            geometry, injection = examined(base)
        super().__init__(base.config)
        self.base = base.requires_grad_(False)
        self.geometry = geometry
        self.prefixes = PrefixBank(geometry)
        self._fillings = 0
        self._owners: dict[str, Owner] = {}
        self._injection = injection
        self._disabled = False
        self._label_logits = LabelLogits(base)
        self._label_only_logits = True
        self._request_model: RequestModel | None = None
        self._fingerprints: dict[str, str | None] = {}
        self._is_awaiting_shards = False
        self.train(base.training)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the base's class, since this one is made while the program runs."""
        return _unspecialized, (type(self.base),), self.__dict__

    def train(self, mode: bool = True) -> PrefixModel:
        """Switch the modes of prefixes and base; running statistics of the base stay as they are."""
        super().train(mode)
        for module in self.base.modules() if mode else ():
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        return self

    # ------------------------------------------------------------------ prefixes

    def add_prefix(
        self,
        name: str,
        config: PrefixConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> None:
        """Make a new prefix, filled by its initializer, and make it the active one.

        Args:
            name: A name that is not taken.
            config: What it looks like.
            tokenizer: Reads `config.init_text`.
            input_ids: The initial text as token ids, `(tokens,)` or `(1, tokens)`, instead of `init_text`.
            past_key_values: For `init="cache"`: a cache of one row and `num_virtual_tokens` tokens.

        Raises:
            PrefixConfigError: The name is taken or not usable, or the initializer lacks something.
        """
        self.prefixes.check_new(name)
        config = self._completed(config)
        limit = self._injection.decoder.position_limit
        if limit is not None and config.num_virtual_tokens >= limit:
            raise PrefixConfigError(
                f"{config.num_virtual_tokens} virtual tokens leave no room for text: the base model has {limit} "
                "positions."
            )
        weights = ModuleWeights(self.base, config.modules_to_save or ())
        tensors = self._initial(config, tokenizer, input_ids, past_key_values)
        self._install(name, config, tensors, weights)
        self.prefixes.active = name
        self._fingerprint(name)

    def set_prefix(self, name: str) -> None:
        """Use another prefix from now on; training goes to it alone, unless it was loaded frozen.

        Raises:
            PrefixConfigError: There is no prefix of that name.
        """
        self.prefixes.check_known(name)
        self.prefixes.active = name

    @property
    def active_prefix(self) -> str | None:
        """Name of the prefix in use."""
        return self.prefixes.active

    def initialize_prefix(
        self,
        *,
        text: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> None:
        """Fill the active prefix anew, from a text, from token ids or from a cache; `modules_to_save` stay as they are.

        Args:
            text: A text; needs `tokenizer`. It is cut or repeated to the prefix's length.
            tokenizer: Reads `text`.
            input_ids: A text as token ids, `(tokens,)` or `(1, tokens)`.
            past_key_values: A cache of one row and `num_virtual_tokens` tokens that the base model filled.

        Raises:
            PrefixConfigError: Not exactly one of `text`, `input_ids` and `past_key_values` is given.
        """
        if sum(source is not None for source in (text, input_ids, past_key_values)) != 1:
            raise PrefixConfigError(
                "Give exactly one of text=... (with tokenizer=...), input_ids=..., past_key_values=..."
            )
        name, config, parameterization = self.prefixes.in_use()
        config = config.replace(init="cache" if past_key_values is not None else "text", init_text=text)
        tensors = self._initial(config, tokenizer, input_ids, past_key_values)
        parameterization.start_from(tensors)
        self.prefixes.configs[name] = config
        self._fillings += 1

    def prefix_state_dict(self) -> PrefixTensors:
        """What a file of the active prefix contains, detached and named as there.

        Plain keys `(H, p, Dk)` and values `(H, p, Dv)`, and with `modules_to_save` the weights of those modules, whose
        names begin with `modules_to_save.`. Where FSDP2 or DeepSpeed spreads the prefix over several processes, all of
        them must call this.
        """
        return self.prefixes.saved()

    @contextmanager
    def disable_prefix(self) -> Iterator[None]:
        """Inside this context the model is exactly its base."""
        before, self._disabled = self._disabled, True
        try:
            with outside_of_calls(), base_weights():
                yield
        finally:
            self._disabled = before

    # ------------------------------------------------------------------ running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with the active prefix.

        Args:
            *args: The base model's arguments.
            **kwargs: The base model's arguments, all in terms of real tokens: `attention_mask` `(batch, seen + new)`
                has no columns for the prefix, `position_ids` start at 0, `past_key_values` holds real tokens only.

        Returns:
            The base model's output. `loss` and `logits` (`(batch, new, vocabulary)` of a language model) are about real
            tokens; its `past_key_values` can be passed back in for the next tokens.

        Raises:
            PrefixInputError: An argument does not fit or is not understood.
            PrefixNotConsumedError: The base did not read the prefix, or has not called a module in `modules_to_save`.
        """
        arguments = self._injection.understood(args, kwargs)
        if self._disabled:
            _require_no_prefix(arguments)
            return self.base(**arguments)
        arguments = without_repeats(arguments)
        if self.training and self._label_only_logits and self._takes_labels_only(arguments):
            labelled = self._label_logits.pass_with(arguments)
            with self._acting(labelled.arguments, more=[labelled.intervention]):
                return labelled.finished(self.base(**labelled.arguments))
        with self._acting(arguments):
            return self.base(**arguments)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the active prefix; arguments and results are those of the base's `generate`.

        The prefix counts neither as prompt nor as generated text: `max_new_tokens`, `max_length`, stopping criteria
        and returned sequences are about real tokens.
        """
        self._require_head()
        if _wants_pages(*args, **kwargs):
            raise PrefixInputError('Not cache_implementation="paged" but generate_batch runs requests in pages.')
        if self._disabled:
            _require_no_prefix(kwargs)
            return self._base_generate(*args, **kwargs)
        with self._acting(kwargs, padding_mask=False):
            return self._base_generate(*args, **self._stopping_in_time(kwargs))

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder of an encoder-decoder base, with the active prefix.

        Returns:
            A function that takes the encoder's arguments and returns its output, which can be passed to `forward` and
            `generate` as `encoder_outputs`. For other bases, what the base returns.
        """
        encoder: Any = cast("Any", self.base).get_encoder(*args, **kwargs)
        known: Any = self._injection.structure.encoder
        if known is None or encoder is not known:
            return encoder

        def encode(*args: Any, **kwargs: Any) -> Any:
            if self._disabled:
                return encoder(*args, **kwargs)
            with self._injection.encoding(self._call({})):
                return encoder(*args, **kwargs)

        return encode

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a part of the base that runs alone has no prefix, and nothing would say so."""
        raise PrefixInputError(
            "A decoder on its own would run without the prefix. Call the model (output_hidden_states=True gives the "
            "decoder's states), or model.base.get_decoder() for the decoder without a prefix."
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """A manager of continuous batching, as the base's, for requests with the prefix that is active now.

        It stays with this prefix: once another one is active, or this one is trained on or disabled, it takes no more
        requests.

        Raises:
            PrefixInputError: The base cannot serve requests with a prefix.
        """
        return self._requests().init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; see `init_continuous_batching`."""
        return self._requests().continuous_batching_context_manager(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Generate for many requests by continuous batching; arguments and results are those of the base's method."""
        return self._requests().generate_batch(*args, **kwargs)

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Give back what `persistent_manager=True` has kept."""
        for model in (self._request_model, self.base):
            if model is not None:
                cast("Any", model).destroy_cached_continuous_batching_manager()

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' adapters are PEFT's."""
        raise PrefixInputError("Prefixes are no PEFT adapters: use load_prefix, add_prefix and set_prefix.")

    add_adapter = set_adapter = load_adapter

    def _require_head(self) -> None:
        if not self.can_generate():
            raise PrefixInputError(
                f"{type(self.base).__name__} has no language model's head and cannot generate. Load the base with "
                "AutoModelForCausalLM or AutoModelForSeq2SeqLM."
            )

    def _base_generate(self, *args: Any, **kwargs: Any) -> Any:
        return cast("Any", self.base).generate(*args, **kwargs)

    def _requests(self) -> Any:
        """What serves batches of requests: the base, with the active prefix if it is not disabled."""
        self._require_head()
        if self._disabled:
            return self.base
        call, known = self._call({}), self._request_model
        if known is not None and known.owner == call.owner:
            return known
        if known is not None and known._cached_continuous_batching_manager is not None:
            raise PrefixInputError(
                f"A manager that was kept (persistent_manager=True) generates with prefix {known.owner.label}, but "
                f"active is prefix {call.owner.label}. Call model.destroy_cached_continuous_batching_manager() first."
            )
        self.eval()
        self._request_model = RequestModel(
            self.base, self._injection, self._call({}), self.prefixes.weights(), self._acting_owner
        )
        return self._request_model

    def _acting_owner(self) -> Owner | None:
        """Identity of the prefix that acts at the moment."""
        return None if self._disabled else self._call({}).owner

    def _stopping_in_time(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` that end it when the base's positions are used up."""
        limit, (_, config, _) = self._injection.decoder.position_limit, self.prefixes.in_use()
        if limit is None or "decoder" not in (config.sites or ()):
            return arguments
        is_causal = self._injection.structure.encoder is None
        criterion = PositionsUsedUp(limit, config.num_virtual_tokens, arguments if is_causal else {})
        return {**arguments, "stopping_criteria": [*(arguments.get("stopping_criteria") or []), criterion]}

    @property
    def label_only_logits(self) -> bool:
        """Whether the loss in training computes logits only where there are labels; `True` where the base allows it.

        Loss and gradients are the same; time and memory of the vocabulary projection shrink with the share of labels.
        The output's `logits` are computed when they are used. Set it to `False` to have them as a tensor.

        Raises:
            PrefixInputError: It is set to `True` for a base that does not allow it.
        """
        return self._label_only_logits and self._label_logits.allowed

    @label_only_logits.setter
    def label_only_logits(self, value: bool) -> None:
        if value and not self._label_logits.allowed:
            raise PrefixInputError(
                f"{type(self.base).__name__} does something of its own between its head and its loss (such as scaling "
                "logits, or making decoder inputs from labels), so it needs all of them. Leave label_only_logits as it "
                "is."
            )
        self._label_only_logits = value

    def _takes_labels_only(self, arguments: Mapping[str, Any]) -> bool:
        # A head of the prefix's own works only inside of a pass.
        return not self.prefixes.weights().module_names and self._label_logits.applies_to(arguments)

    @contextmanager
    def _acting(
        self, arguments: Mapping[str, Any], padding_mask: bool = True, more: Sequence[Intervention] = ()
    ) -> Iterator[None]:
        """While this is open, the base runs with the active prefix and its modules."""
        if not torch.compiler.is_compiling():
            require_no_wrapped_layers(self.base)
        call = self._call(arguments if padding_mask else {})
        with self.prefixes.weights().in_place(self.base), self._injection.injected(call, arguments, more):
            yield
            require_called()

    def _call(self, arguments: Mapping[str, Any]) -> PrefixCall:
        """The active prefix, for one call of the base."""
        name, config, module = self.prefixes.in_use()
        # With positions of the user's own, padding is the user's business.
        counts = self._injection.structure.encoder is None and arguments.get("position_ids") is None
        mask = arguments.get("attention_mask") if counts else None
        return PrefixCall(
            states=self.prefixes.states(),
            length=config.num_virtual_tokens,
            sites=config.sites or (),
            owner=self._owner(name, module),
            sliding=config.sliding_window,
            padding_mask=mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None,
        )

    def _owner(self, name: str, module: nn.Module) -> Owner:
        """The prefix as it is now: caches from before a training step are as foreign as those of another prefix."""
        if not torch.compiler.is_compiling():  # versions are not seen there
            version = sum(0 if p.is_inference() else p._version for p in module.parameters())
            label = f"{name!r} of model {id(self):x}.{self._fillings}.{version}"
            if name not in self._owners or self._owners[name].label != label:
                self._owners[name] = Owner(label)
        return self._owners[name]

    def _initial(
        self,
        config: PrefixConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        input_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> PrefixTensors:
        """What a prefix of this configuration starts from."""
        geometry = self.geometry.only(config.sites or ())
        structure = self._injection.structure
        with readable(self.base):
            return initial_tensors(
                InitInputs(self.base, structure, geometry, config, tokenizer, input_ids, past_key_values)
            )

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        repo_id: str | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str | None = None,
        save_function: Callable[..., Any] | None = None,
    ) -> None:
        """Save the active prefix: `prefix.safetensors` and `prefix_config.json`.

        In a training checkpoint (a folder named `checkpoint-<step>`, as the `Trainer` makes them) the training state is
        saved as well, as `model.safetensors`: the parameters that are trained, i.e. the prefix or its MLP.

        Where FSDP2 or DeepSpeed spreads the prefix over several processes, all of them must call this, unless
        `state_dict` is given.

        Args:
            save_directory: Folder for the files; made if it is missing.
            is_main_process: With several processes, whether this one writes.
            state_dict: The training state, if the caller has gathered it already (`accelerator.get_state_dict(model)`).
            push_to_hub: Upload the folder to `repo_id` afterwards.
            dtype: Floating-point dtype of `prefix.safetensors`.
            repo_id: Repository on the Hub; by default named like the folder.
            token: Access token for the Hub.
            max_shard_size: Ignored: a prefix is one small file. (`push_to_hub` of transformers passes it.)
            save_function: Ignored: a prefix is always safetensors. (`accelerator.save` is passed in many scripts.)

        Raises:
            PrefixFileError: The prefix contains NaN or infinity, or the folder cannot be written. What was there stays.
            PrefixInputError: The prefix is spread over several processes, and `state_dict` lacks it.
        """
        if not is_main_process and state_dict is not None:
            return
        state = self._gathered(state_dict)
        if not is_main_process:
            return
        directory = Path(save_directory)
        name, config, _ = self.prefixes.in_use()
        checkpoint.write_prefix(
            directory,
            self.prefixes.saved({key.removeprefix(_PREFIXES): tensor for key, tensor in state.items()}),
            config,
            self.geometry.only(config.sites or ()),
            self._fingerprint(name),
            dtype,
        )
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", directory.name):
            checkpoint.write_training_state(directory / SAFE_WEIGHTS_NAME, state)
        if push_to_hub:
            self.push_to_hub(repo_id or directory.name, token=token)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base: PreTrainedModel,
        prefix_name_or_path: str | Path,
        *,
        name: str = DEFAULT_PREFIX,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PrefixModel:
        """A base model with a saved prefix.

        Args:
            base: The model that the prefix was trained on.
            prefix_name_or_path: A folder that `save_pretrained` wrote, or a repository id on the Hub.
            name: Name of the prefix in the model.
            is_trainable: Whether to train it further; otherwise it is frozen and the model is in evaluation mode.
            revision: Branch, tag or commit on the Hub.
            subfolder: Folder inside `prefix_name_or_path`.
            token: Access token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Never contact the Hub.

        Returns:
            The model, with the prefix active.

        Raises:
            PrefixFileError: The file is missing, damaged, no prefix, or contains NaN.
            IncompatibleBaseError: The base has other layers, heads or widths.
        """
        model = cls(base)
        model.load_prefix(
            prefix_name_or_path,
            name,
            is_trainable=is_trainable,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not is_trainable:
            model.eval()
        return model

    def load_prefix(
        self,
        prefix_name_or_path: str | Path,
        name: str = DEFAULT_PREFIX,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load another prefix beside those that are there.

        It is used after `set_prefix(name)`, or at once if it is the first.

        Args: as `from_pretrained`.

        Raises:
            PrefixConfigError: The name is taken.
            PrefixFileError: The file is missing, damaged, no prefix, or contains NaN.
            IncompatibleBaseError: The base has other layers, heads or widths.
        """
        self.prefixes.check_new(name)
        file = locate_prefix(
            prefix_name_or_path,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        description = checkpoint.read_description(file)
        # A file says what it holds; one without this entry holds keys and values alone.
        config = description.config.replace(modules_to_save=description.config.modules_to_save or ())
        weights = self._weights_for(config, file)
        geometry = self.geometry.only(config.sites or self.geometry.sites)
        tensors = checkpoint.read_tensors(file, description, geometry, _name_of(self.base), weights.saved())
        weights.load(tensors)
        own = checkpoint.weights_fingerprint(self.base, without=weights.module_names)
        if not checkpoint.same_weights(description.weights_fingerprint, own):
            trained_on = description.config.base_model_name_or_path or "an unnamed model"
            warnings.warn(
                f"The prefix {file} was trained on {trained_on}, but {_name_of(self.base)} has the same shape with "
                "other weights. It will probably work badly; load it onto the model that it was trained on.",
                PrefixWarning,
                stacklevel=2,
            )
        self._install(name, config, tensors, weights, is_trainable)
        self.prefixes.active = self.prefixes.active or name
        self._fingerprints[name] = own

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The training state: parameters and buffers of the prefixes, nothing of the base."""
        state: dict[str, Any] = {} if destination is None else destination
        self.prefixes.state_dict(destination=state, prefix=f"{prefix}{_PREFIXES}", keep_vars=keep_vars)
        if self._is_awaiting_shards:  # accelerate understands nothing else, and nothing else has been sharded
            return {key: tensor for key, tensor in state.items() if is_sharded(tensor)}
        if destination is not None:
            return state
        # Parameters first: accelerate before 1.11 finds the sharded ones by their place.
        parameters = {f"{prefix}{_PREFIXES}{name}" for name, _ in self.prefixes.named_parameters()}
        return dict(sorted(state.items(), key=lambda item: item[0] not in parameters))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what `state_dict` gave.

        Raises:
            PrefixFileError: It belongs to other prefixes or another reparameterization. Also with `strict=False`, since
                a half restored prefix would train on in silence.
        """
        own_state, is_complete = self.state_dict(), not self._is_awaiting_shards
        self._is_awaiting_shards = False
        if strict or assign:  # torch adds the parameters of the base, as they are, where it loads into shards
            base = dict(self.base.named_parameters(prefix="base", remove_duplicate=False))
            state_dict = {key: tensor for key, tensor in state_dict.items() if base.get(key) is not tensor}
        expected, found = (
            {key: None if key.endswith("_extra_state") else tuple(tensor.shape) for key, tensor in state.items()}
            for state in (own_state, state_dict)
        )
        if expected != found:
            different = sorted(
                key for key in expected.keys() | found.keys() if expected.get(key, 0) != found.get(key, 0)
            )
            raise PrefixFileError(
                f"The training state does not fit this model's prefixes: {some_of(different)}. Resume with "
                "the PrefixConfig that the training was started with."
            )
        own = {key.removeprefix(_PREFIXES): tensor for key, tensor in state_dict.items()}
        self._fillings += 1
        return self.prefixes.load_state_dict(own, strict=is_complete, assign=assign)

    def to(self, *args: Any, **kwargs: Any) -> PrefixModel:  # type: ignore[override]
        """Move prefixes and base, as any module.

        With `cpu_ram_efficient_loading` of FSDP2, accelerate moves a model to no device at all ("meta"), shards it and
        fills it again from its `state_dict()`, which does not hold the base. Every process has the base already
        (see `processes.py`), so it is sharded as it is.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _is_meta(*args, **kwargs):
            self._is_awaiting_shards = True
            return self
        return super().to(*args, **kwargs)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ what transformers asks of a model

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
    def base_model(self) -> Any:
        """The base without its head, as transformers calls it, with the active prefix.

        Called with the arguments of the base's own `base_model`, it returns that one's output. The base itself is
        `base`.
        """
        part = cast("PreTrainedModel", self.base.base_model)

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = self._injection.understood_by(part, args, kwargs)
            if self._disabled:
                _require_no_prefix(arguments)
                return part(**arguments)
            arguments = without_repeats(arguments)
            with self._acting(arguments):
                return part(**arguments)

        return Headless(part, run)

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

    # ------------------------------------------------------------------ inside

    def _encoded_for_generation(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What `generate` asks of an assistant: its inputs with the encoder's outputs, made with its own prefix."""
        method = getattr(self.base, name)
        if self._disabled:
            return method(*args, **kwargs)
        with self._injection.encoding(self._call({})):
            return method(*args, **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoded_for_generation("_maybe_prepare_encoder_kwargs_for_generation", *args, **kwargs)

    def _prepare_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # its name before transformers 5.20 or so
        return self._encoded_for_generation("_prepare_encoder_decoder_kwargs_for_generation", *args, **kwargs)

    def _gathered(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole training state, of a given one or of this model's own.

        Raises:
            PrefixInputError: The given one lacks what this process alone cannot know.
        """
        own = self.state_dict(keep_vars=True)
        if state is None:
            return whole(own)
        if any(is_sharded(tensor) and key not in state for key, tensor in own.items()):
            raise PrefixInputError(
                "The given state_dict lacks the prefix, which is spread over several processes. Give all of "
                "accelerator.get_state_dict(model), or none and call save_pretrained in every process."
            )
        return {key: state.get(key, tensor).detach() for key, tensor in own.items()}

    def _install(
        self, name: str, config: PrefixConfig, tensors: PrefixTensors, weights: ModuleWeights, trainable: bool = True
    ) -> None:
        devices = layer_devices(self.base, self._injection.structure)
        self.prefixes.install(name, config, tensors, devices, home(self.base), weights, trainable)
        self._owner(name, self.prefixes[name])

    def _fingerprint(self, name: str) -> str | None:
        """What identifies the base's weights; what was known of them, once they are spread over processes."""
        without = self.prefixes.configs[name].modules_to_save or ()
        self._fingerprints[name] = checkpoint.weights_fingerprint(self.base, without) or self._fingerprints.get(name)
        return self._fingerprints[name]

    def _weights_for(self, config: PrefixConfig, file: Path) -> ModuleWeights:
        names = config.modules_to_save or ()
        missing = set(names) - {name for name, _ in self.base.named_modules()}
        if missing:
            raise IncompatibleBaseError(
                f"{file} was trained together with {some_of(sorted(missing))}, which {_name_of(self.base)} does not "
                "have. Load the base with the class that it was trained with, e.g. AutoModelForSequenceClassification."
            )
        return ModuleWeights(self.base, names)

    def _completed(self, config: PrefixConfig) -> PrefixConfig:
        """The configuration with what is known about the base.

        Raises:
            PrefixConfigError: The base lacks a site, or cannot do what is asked.
        """
        sites = tuple(self.geometry.sites)
        missing = [site for site in config.sites or () if site not in sites]
        if missing:
            raise PrefixConfigError(
                f"{type(self.base).__name__} has no site {', '.join(map(repr, missing))} that a prefix could join; it "
                f"has {', '.join(map(repr, sites))}."
            )
        if config.sliding_window == "plain" and self._injection.local_windows.modules:
            raise PrefixConfigError(
                f'{type(self.base).__name__} keeps its windows in buffers, where sliding_window="plain" would count '
                'padding as text. Use "pinned".'
            )
        return config.replace(
            modules_to_save=resolved_modules(self.base, config.modules_to_save),
            sites=tuple(site for site in sites if config.sites is None or site in config.sites),
            base_model_name_or_path=config.base_model_name_or_path or self.base.config.name_or_path or None,
            base_model_revision=config.base_model_revision or getattr(self.base.config, "_commit_hash", None),
        )


def get_prefix_model(
    base: PreTrainedModel,
    config: PrefixConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
) -> PrefixModel:
    """Freeze a model and put a trainable prefix before it.

    Args:
        base: Any causal or encoder-decoder model of transformers. A head that is no language model's (a classifier,
            for example) is trained with the prefix.
        config: What the prefix looks like and how it starts; `PrefixConfig()` if left out.
        tokenizer: Reads `config.init_text` for `init="text"`.
        input_ids: The initial text as token ids, `(tokens,)` or `(1, tokens)`, instead of `init_text`.
        past_key_values: For `init="cache"`: a cache of one row and `num_virtual_tokens` tokens.

    Returns:
        The model, with one active prefix named `default`.

    Raises:
        UnsupportedModelError: The model has no keys and values that a prefix could join.
        PrefixConfigError: The configuration cannot be, or the initializer lacks something.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = dict(n_layer=2, n_head=2, n_embd=8, n_positions=64, vocab_size=100)
        >>> base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=5))
        >>> model.print_trainable_parameters()
        trainable params: 160 || all params: 3,232 || trainable%: 4.9505
    """
    if config is not None and not isinstance(config, PrefixConfig):
        raise PrefixConfigError(f"config must be a PrefixConfig, not {type(config).__name__}.")
    model = PrefixModel(base)
    model.add_prefix(
        DEFAULT_PREFIX,
        config or PrefixConfig(),
        tokenizer=tokenizer,
        input_ids=input_ids,
        past_key_values=past_key_values,
    )
    return model


def _unspecialized(base_class: type[PreTrainedModel]) -> PrefixModel:
    """An empty model of the class for this base; its content follows."""
    architecture: type[PrefixModel] = specialized(PrefixModel, base_class)  # type: ignore[arg-type]  # as above
    return architecture.__new__(architecture)


def _require_base(base: object) -> None:
    if isinstance(base, PrefixModel):
        raise PrefixInputError("This model has prefixes already; use add_prefix or load_prefix for another one.")
    if not isinstance(base, PreTrainedModel):
        raise PrefixInputError(
            f"The base must be a transformers model, not {type(base).__name__}. Load it first, e.g. with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


def _wants_pages(
    inputs: object = None, generation_config: Any = None, *_: Any, cache_implementation: str | None = None, **__: Any
) -> bool:
    """Whether these arguments of `generate` ask for a thread of its own, where no prefix would act."""
    return "paged" in (cache_implementation, getattr(generation_config, "cache_implementation", None))


def _is_meta(device: Any = None, *args: Any, **kwargs: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "meta"


def _require_no_prefix(arguments: Mapping[str, Any]) -> None:
    past, encoded = arguments.get("past_key_values"), arguments.get("encoder_outputs")
    if isinstance(past, Cache):
        claim(past, None)
    if encoded is not None:
        require_encoding(encoded, None)


def _name_of(base: PreTrainedModel) -> str:
    return base.config.name_or_path or f"this {type(base).__name__}"
