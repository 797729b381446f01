"""What the stock `Trainer` does for prefixes without the user's doing: the record, the card, and what is uploaded.

Importing this module adds a callback to those that every `Trainer` has, and something to do after
`Trainer.create_model_card`. Both do nothing where the model is no `PrefixModel`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as trainer_module
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from .atomic import write_files
from .bank import PrefixBank
from .card_facts import CARD, card_on_hub, entry_facts, local_card, own_words, taking_over, write_card
from .checkpoint import CONFIG_FILE, TENSOR_FILE
from .errors import PrefixConfigError, PrefixError, PrefixFileError, PrefixWarning
from .model_card import CardFacts
from .saving import SavingModel
from .training_facts import record_of

_Args = TrainingArguments
_IGNORED = ".gitignore"
_WRAPPED = "_writes_cards_of_prefixes"
_KEPT_CARD = "_README.md"
"""Where a card is kept that is not the one on the Hub; the Trainer does not upload what begins so."""
_words: dict[Path, tuple[str, str]] = {}
"""What somebody had written in a card when it was last written here, by folder."""
_NOTHING = own_words("")
_writing: WeakSet[Trainer] = WeakSet()
"""Trainers whose card is being written, maybe by a method that calls the one it overrides."""


class RecordingCallback(TrainerCallback):
    """Keeps the record of the prefixes that are trained, and has their files uploaded with each checkpoint."""

    def __init__(self) -> None:
        self._bank: PrefixBank | None = None
        self._trained: set[str] = set()
        self._recorded_logs = 0
        self._kept_step: int | None = None
        self._logs_of_training: int | None = None
        self._is_training = False

    def on_init_end(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the card of prefixes written by trainers with a card of their own, too, such as TRL's."""
        if prefixes_in(kwargs.get("model")) is not None:
            for kind in _trainers(Trainer):
                _wrap(kind)

    def on_train_begin(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin a record."""
        model = prefixes_in(kwargs.get("model"))
        self._bank = None if model is None else model.prefixes
        self._trained, self._recorded_logs, self._kept_step, self._logs_of_training = set(), 0, None, None
        self._is_training = True

    def on_pre_optimizer_step(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See which prefixes have a gradient: others could be trained, too, and are not in use."""
        for name, entry in list(self._bank.entries.items()) if self._bank is not None else ():
            if name not in self._trained and any(one.grad is not None for one in entry.module.parameters()):
                self._trained.add(name)

    def on_step_end(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record before a checkpoint: `on_save` comes when it has been written."""
        if control.should_save:
            self._record(args, state, **kwargs)

    def on_epoch_end(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As after a step."""
        if control.should_save:
            self._record(args, state, **kwargs)

    def on_log(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the loss that goes with a checkpoint.

        A later callback may ask for a checkpoint that nobody knows of here; for it, the record is never older than a
        fiftieth of the log. (Making it anew at each log would take time that grows with the log.)
        """
        if self._is_training and (control.should_save or len(state.log_history) > 1.02 * self._recorded_logs):
            self._record(args, state, **kwargs)

    def on_evaluate(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record an evaluation, also one after the training."""
        self._record(args, state, **kwargs)

    def on_train_end(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the whole training."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._kept_step = state.best_global_step
        self._is_training, self._logs_of_training = False, len(state.log_history)
        self._record(args, state, **kwargs)

    def on_push_begin(self, args: _Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the prefixes of a checkpoint where the `Trainer` uploads from.

        It copies files with names that it knows, among them `model.safetensors`, which is the state of the training
        here and belongs into checkpoints only. That one is left to lie; the Hub refuses it because `.gitignore` names
        it, at the top of the repository and not in `last-checkpoint`.
        """
        model = prefixes_in(kwargs.get("model"))
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # `Trainer.push_to_hub` comes after the training, and saves the prefixes and the card itself.
        if model is None or not self._is_training or not state.is_world_process_zero or not checkpoint.is_dir():
            return
        for name in ("", *list(model.prefixes.entries)):
            files = [checkpoint / name / file for file in (TENSOR_FILE, CONFIG_FILE)]
            content = {file.name: file.read_bytes() for file in files if file.is_file()}
            if content:
                write_files(folder / name, content)
        try:
            _ignore(folder, f"/{SAFE_WEIGHTS_NAME}", args)
            repo_id = _repository(args)
            existing = _existing(folder, card_on_hub(repo_id, args.hub_token, args.hub_revision), local_card(folder))
            write_card(folder, _facts(model, folder, repo_id), existing)
            _remember(folder)
        except (PrefixError, OSError) as error:
            _report(error, is_training=True)

    def _record(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        model = prefixes_in(kwargs.get("model"))
        if model is None or state.global_step == 0:
            return
        bank = model.prefixes
        if self._is_training:
            # DeepSpeed shows no gradients: then all that can be trained are.
            trained = self._trained or {name for name, entry in bank.entries.items() if entry.is_trained}
        else:  # an evaluation is about what is active
            trained = self._trained if bank.active is None else self._trained & {bank.active}
        if not trained:
            return
        self._recorded_logs = len(state.log_history)
        record = record_of(
            args,
            state,
            training_data=_data(kwargs.get("train_dataloader")),
            evaluation_data=_data(kwargs.get("eval_dataloader")),
            optimizer=kwargs.get("optimizer"),
            kept_step=self._kept_step,
            logs_of_training=self._logs_of_training,
        )
        for name in trained & bank.entries.keys():
            bank.entries[name].training = record


def prefixes_in(model: Any) -> SavingModel | None:
    """A model with prefixes, out of what accelerate, DDP, FSDP or the compiler have put around it."""
    if not isinstance(model, nn.Module):
        return None
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if isinstance(inner, SavingModel) else None


def _data(loader: Any) -> Any:
    return getattr(loader, "dataset", None)


def _facts(model: SavingModel, folder: Path, repo_id: str | None) -> list[CardFacts]:
    """What is known of the prefixes that the `Trainer` saves."""
    try:
        saved = model._to_be_saved(None)
    except PrefixConfigError:  # none is active, and none is trained
        return []
    return [entry_facts(entry, model.base, folder, place, repo_id) for place, entry in saved.items()]


def _repository(args: TrainingArguments) -> str:
    """The full name of the repository that a training uploads to.

    Raises:
        PrefixFileError: The Hub did not say who the user is.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    if "/" in name:
        return name
    try:
        return str(HfApi().get_full_repo_name(name, token=args.hub_token))
    except Exception as error:
        raise PrefixFileError(f"The Hub did not say whose repository {name} is ({error}). Check the token.") from error


def _ignore(folder: Path, pattern: str, args: TrainingArguments) -> None:
    """Let the Hub ignore a file, and whatever it ignores already."""
    file = folder / _IGNORED
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    else:
        try:
            text = card_on_hub(_repository(args), args.hub_token, args.hub_revision, file=_IGNORED) or ""
        except PrefixFileError:
            text = ""
    if pattern not in text.splitlines():
        gap = "" if not text or text.endswith("\n") else "\n"
        write_files(folder, {_IGNORED: f"{text}{gap}{pattern}\n".encode(errors="surrogateescape")})


def _trainers(kind: type[Trainer]) -> Iterator[type[Trainer]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _trainers(one)


def _wrap(kind: type[Trainer]) -> None:
    """Write the card of prefixes after the one that this class writes, if it has a method for that."""
    method: Callable[..., Any] | None = vars(kind).get("create_model_card")
    if method is None or hasattr(method, _WRAPPED):
        return

    @functools.wraps(method)
    def create_model_card(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        model = prefixes_in(self.model)
        if model is None or not self.is_world_process_zero() or self in _writing:
            return method(self, *args, **kwargs)
        folder = Path(str(self.args.output_dir))
        try:
            before = local_card(folder)
        except PrefixFileError as error:
            return _report(error, is_training=self.is_in_train)
        _writing.add(self)
        try:
            result = method(self, *args, **kwargs)
            asked = inspect.signature(method).bind(self, *args, **kwargs).arguments
            _replace_card(self, model, before, asked)
        except (PrefixError, OSError) as error:
            _restore(folder, before)
            return _report(error, is_training=self.is_in_train)
        except BaseException:
            _restore(folder, before)
            raise
        finally:
            _writing.discard(self)
        return result

    setattr(create_model_card, _WRAPPED, True)
    kind.create_model_card = create_model_card  # type: ignore[method-assign]


def _replace_card(trainer: Trainer, model: SavingModel, before: str | None, asked: dict[str, Any]) -> None:
    """Write the card of prefixes in the place of the trainer's, with what is on the Hub or was here before.

    Raises:
        PrefixFileError: The metadata of that card cannot be read, or the Hub cannot be asked for it.
    """
    folder, repo_id = Path(str(trainer.args.output_dir)), trainer.hub_model_id
    facts = _facts(model, folder, repo_id)
    if not facts:
        _restore(folder, before)
        return
    generated = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    on_hub = None if repo_id is None else card_on_hub(repo_id, trainer.args.hub_token, trainer.args.hub_revision)
    write_card(folder, facts, taking_over(_existing(folder, on_hub, before), generated, asked))
    _remember(folder)


def _existing(folder: Path, on_hub: str | None, here: str | None) -> str | None:
    """The card to go on from, of the one on the Hub and the one here: the one that somebody has written in.

    If that may be both, it is the Hub's, and the one here is kept beside it.
    """
    if on_hub is None or here is None:
        return here if on_hub is None else on_hub
    last = _words.get(folder.resolve())
    words_here, words_there = own_words(here), own_words(on_hub)
    if words_here in (words_there, last, _NOTHING):
        return on_hub
    if words_there == last:
        return here
    write_files(folder, {_KEPT_CARD: here.encode()})
    warnings.warn(
        f"What is written in {folder / CARD} is not what is written on the Hub. The Hub's text stays; this one is kept "
        f"in {folder / _KEPT_CARD}, for you to put together.",
        PrefixWarning,
        stacklevel=2,
    )
    return on_hub


def _remember(folder: Path) -> None:
    """Note what somebody has written in the card here, to see later whether it is still that."""
    card = local_card(folder)
    if card is not None:
        _words[folder.resolve()] = own_words(card)


def _restore(folder: Path, card: str | None) -> None:
    if card is None:
        (folder / CARD).unlink(missing_ok=True)
    else:
        write_files(folder, {CARD: card.encode()})


def _report(error: Exception, *, is_training: bool) -> None:
    """Raise an error about the card, or only warn of it: a training does not end for that."""
    if not is_training:
        raise error
    warnings.warn(f"{CARD} was not renewed. {error}", PrefixWarning, stacklevel=2)


def _register() -> None:
    """Let every `Trainer` have the callback, once. transformers offers no other way to add one for a kind of model.

    It stands behind the default callback that decides when to save, and so sees what was decided.
    """
    callbacks = cast("list[type[TrainerCallback]]", trainer_module.DEFAULT_CALLBACKS)
    if RecordingCallback not in callbacks:
        callbacks.append(RecordingCallback)
    _wrap(Trainer)


_register()
