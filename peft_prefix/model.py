"""`PrefixModel`: a frozen base model and the prefixes that can be put before it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .composition import Composed, average, concatenation, shared_weights, start_from
from .config import Init, PrefixConfig
from .demonstrations import Demonstrations, DemonstrationText, demonstration_text
from .errors import PrefixConfigError
from .initializers import InitInputs, initial_tensors
from .loading import DEFAULT_PREFIX, LoadingModel
from .modules_to_save import ModuleWeights, resolved_modules
from .parameterization import PrefixTensors
from .processes import readable


class PrefixModel(LoadingModel):
    """A frozen transformers model with trainable prefixes. Made by `get_prefix_model` or `from_pretrained`.

    It takes the arguments of the base model, gives the outputs of the base model, and to the rest of transformers (the
    `Trainer`, pipelines, `generate`) it is a model of the base's architecture. All lengths, masks and positions are
    those of real tokens; the prefix is added inside. Only the prefixes' parameters require gradients, and only they
    are in `state_dict()`. They include each prefix's own weights for the modules in `PrefixConfig.modules_to_save`.
    Adapters of PEFT in the base are the exception: those that are trained go on being trained, and are there as well.
    `train()` and `eval()` reach the base, too: its own dropout acts in training, as in fine-tuning.

    Attributes:
        base: The base model. Called directly, it runs without any prefix (not from inside `generate`, whose passes it
            would take part in; use `disable_prefix` there).
        geometry: Where the base keeps keys and values, and in which shapes.
        prefixes: The named prefixes.
    """

    def add_prefix(
        self,
        name: str,
        config: PrefixConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        initial_prefix: str | None = None,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """Make a new prefix, filled by its initializer, and make it the active one.

        Args:
            name: A name that is not taken.
            config: What it looks like.
            tokenizer: Reads `config.init_text`, and demonstrations that are texts.
            input_ids: The initial text as token ids, `(tokens,)` or `(1, tokens)`, instead of `init_text`.
            past_key_values: For `init="cache"`: a cache of one row and `num_virtual_tokens` tokens.
            initial_prefix: For `init="prefix"`: the name of a prefix of the same length and sites, trained or frozen.
                The new one is a copy of its keys and values, and of its weights for those modules in
                `modules_to_save` that both have; what becomes of either later does not touch the other.
            demonstrations: For `init="demonstrations"`: solved examples, as rows of training data: with `prompt` and
                `target` as texts, or with `input_ids` and `labels` as `PromptTargetCollator.encode` makes them.

        Raises:
            PrefixConfigError: The name is taken or not usable, or the initializer lacks something.
        """
        self.prefixes.check_new(name)
        config = self._completed(config)
        self._require_room(config.num_virtual_tokens)
        source = start_from(self.prefixes, config, initial_prefix)
        weights = ModuleWeights(self.base, config.modules_to_save or ())
        prefix = None if source is None else self.prefixes.saved(source)
        text = demonstration_text(self.base, config, tokenizer, demonstrations)
        tensors = self._initial(config, tokenizer, input_ids, past_key_values, prefix, text)
        if source is not None:
            weights.load({**weights.saved(), **shared_weights(source, tensors, weights.places)})
        self._install(name, config, tensors, weights)
        if text is not None:
            self.prefixes.entry(name).remember(text.known)
        self.prefixes.active = name
        self._fingerprint(self.prefixes.entry(name))

    def concatenate_prefixes(self, names: Iterable[str], new_name: str, *, is_trainable: bool = True) -> None:
        """Make a new prefix of several others, one after another, and make it the active one. Experimental.

        Its length is the sum of theirs. Keys keep the positions that they were trained with, `0..p-1` in each part, and
        the text starts behind all parts: each part is further away from the text than it was in training, by the length
        of all the others together. How well tasks add up that way is for you to measure; it is also a start for further
        training.

        The parts stay as they are. Dropout of either kind is theirs where they agree, otherwise none; the first token
        is frozen where it is in all of them.

        Args:
            names: Two prefixes or more, with the same sites and `sliding_window` and without `modules_to_save`.
            new_name: A name that is not taken.
            is_trainable: Whether to train the new one; otherwise it is frozen.

        Raises:
            PrefixConfigError: A name cannot be, the prefixes do not go together, or the new one is too long.
            PrefixInputError: A prefix holds NaN or infinity.
        """
        self.prefixes.check_new(new_name)
        self._add_composed(new_name, concatenation(self.prefixes, names), is_trainable)

    def average_prefixes(
        self,
        names: Iterable[str],
        new_name: str,
        *,
        weights: Iterable[float] | None = None,
        is_trainable: bool = True,
    ) -> None:
        """Make a new prefix that is the weighted mean of several others, and make it the active one.

        Keys and values are averaged in float32, number by number, and so are weights for `modules_to_save`. The others
        stay as they are. Dropout of either kind is theirs where they agree, otherwise none; the first token is frozen
        where it is in all of them.

        Args:
            names: Two prefixes or more, with the same length, sites, `sliding_window` and `modules_to_save`.
            new_name: A name that is not taken.
            weights: One finite number for each prefix, divided by their sum: `[3, 1]` is `[0.75, 0.25]`. They may be
                negative, as in `[2, -1]`, but not add up to zero. Equal ones if left out.
            is_trainable: Whether to train the new one; otherwise it is frozen.

        Raises:
            PrefixConfigError: A name or a weight cannot be, or the prefixes do not go together.
            PrefixInputError: A prefix holds NaN or infinity.
        """
        self.prefixes.check_new(new_name)
        self._add_composed(new_name, average(self.prefixes, names, weights), is_trainable)

    def set_prefix(self, name: str | None) -> None:
        """Use another prefix from now on; training goes to it alone, unless it was loaded frozen.

        Args:
            name: Its name; `None` for no active prefix, so that every call must name its prefixes (`prefix_names`).

        Raises:
            PrefixConfigError: There is no prefix of that name.
        """
        if name is not None:
            self.prefixes.entry(name)
        self.prefixes.active = name

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix and free its memory. What runs with it at the moment goes on.

        Raises:
            PrefixConfigError: There is no prefix of that name, or it is the active one.
        """
        self.prefixes.remove(name)
        self._fingerprints.pop(name, None)

    @property
    def active_prefix(self) -> str | None:
        """Name of the prefix that acts where none is named."""
        return self.prefixes.active

    def initialize_prefix(
        self,
        *,
        text: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """Fill the active prefix anew, from a text, token ids, a cache or demonstrations.

        `modules_to_save` stay as they are.

        Args:
            text: A text; needs `tokenizer`. It is cut or repeated to the prefix's length. Together with
                `demonstrations` it is the instruction before them.
            tokenizer: Reads `text`, and demonstrations that are texts.
            input_ids: A text as token ids, `(tokens,)` or `(1, tokens)`.
            past_key_values: A cache of one row and `num_virtual_tokens` tokens that the base model filled.
            demonstrations: Solved examples, as in `add_prefix`.

        Raises:
            PrefixConfigError: Not exactly one of `text`, `input_ids`, `past_key_values` and `demonstrations` is given
                (`text` may be an instruction), or something is missing to read them.
        """
        text_alone = text if demonstrations is None else None
        if sum(source is not None for source in (text_alone, input_ids, past_key_values, demonstrations)) != 1:
            raise PrefixConfigError(
                "Give exactly one of text=... (with tokenizer=...), input_ids=..., past_key_values=..., "
                "demonstrations=..."
            )
        entry = self.prefixes.entry()
        init: Init = "text" if past_key_values is None else "cache"
        config = entry.config.replace(init="demonstrations" if demonstrations is not None else init, init_text=text)
        read = demonstration_text(self.base, config, tokenizer, demonstrations)
        tensors = self._initial(config, tokenizer, input_ids, past_key_values, demonstrations=read)
        self._learn_to_hide(config)
        entry.module.start_from(tensors)
        entry.config = config
        entry.remember(() if read is None else read.known)
        entry.fillings += 1

    def _add_composed(self, name: str, composed: Composed, is_trainable: bool) -> None:
        """Install a prefix that was made of others."""
        config = self._completed(composed.config)
        self._require_room(config.num_virtual_tokens)
        weights = ModuleWeights(self.base, config.modules_to_save or ())
        weights.load(composed.tensors)
        self._install(name, config, composed.tensors, weights, is_trainable)
        self.prefixes.active = name
        self._fingerprint(self.prefixes.entry(name))

    def _initial(
        self,
        config: PrefixConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        input_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        prefix: PrefixTensors | None = None,
        demonstrations: DemonstrationText | None = None,
    ) -> PrefixTensors:
        """What a prefix of this configuration starts from."""
        geometry = self.geometry.only(config.sites or ())
        structure = self._injection.structure
        with readable(self.base):
            inputs = InitInputs(
                base=self.base,
                structure=structure,
                geometry=geometry,
                config=config,
                tokenizer=tokenizer,
                input_ids=input_ids,
                past_key_values=past_key_values,
                prefix=prefix,
                demonstrations=demonstrations,
            )
            return initial_tensors(inputs)

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
    demonstrations: Demonstrations | None = None,
) -> PrefixModel:
    """Freeze a model and put a trainable prefix before it.

    Args:
        base: Any causal or encoder-decoder model of transformers. A head that is no language model's (a classifier,
            for example) is trained with the prefix. Adapters of PEFT in it act beside the prefix and stay as they are,
            trained or frozen; a `PeftModel` is taken as well.
        config: What the prefix looks like and how it starts; `PrefixConfig()` if left out.
        tokenizer: Reads `config.init_text`, and demonstrations that are texts.
        input_ids: The initial text as token ids, `(tokens,)` or `(1, tokens)`, instead of `init_text`.
        past_key_values: For `init="cache"`: a cache of one row and `num_virtual_tokens` tokens.
        demonstrations: For `init="demonstrations"`: solved examples, as in `PrefixModel.add_prefix`.

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
        demonstrations=demonstrations,
    )
    return model
