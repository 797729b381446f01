"""Gathers what a model card says about prefixes, and reads and writes README.md."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel

from .atomic import write_files
from .bank import BankEntry
from .card_content import is_hub_id
from .card_sections import sections
from .checkpoint import TENSOR_FILE, read_description
from .errors import PrefixFileError
from .front_matter import FrontMatter
from .model_card import CardFacts, card_text, loss_curve_png, merge_model_index
from .plain_file import folder_here
from .tensor_file import opened

CARD = "README.md"
PICTURE = "loss_curve.png"
_MADE_HERE = (
    *("base_model", "base_model_relation", "library_name", "tags", "pipeline_tag"),
    *("datasets", "metrics", "model-index"),
)
"""Metadata that are written for the user."""


def entry_facts(
    entry: BankEntry, base: PreTrainedModel, directory: Path, folder: str = "", repo_id: str | None = None
) -> CardFacts:
    """What is known of a prefix and of its file.

    Args:
        entry: The prefix.
        base: Its base model.
        directory: What is or will be a repository.
        folder: Where in it the file is, if it has been saved.
        repo_id: The repository on the Hub.

    Raises:
        PrefixFileError: The file is damaged.
        PrefixConfigError: A repository or a folder on the Hub could not have these names.
    """
    config, file = entry.config, directory / folder / TENSOR_FILE
    if config.base_model_name_or_path is not None and folder_here(config.base_model_name_or_path) is not None:
        config = config.replace(base_model_name_or_path=None)  # a folder here that is named like a repository
    saved: dict[str, Any] = {}
    if file.is_file():
        with opened(file) as content:
            description = read_description(content)
            saved = {
                "dtype": description.dtype,
                "sha256": description.sha256,
                "file_size": file.stat().st_size,
                "numbers": sum(map(math.prod, content.shapes.values())),
            }
    return CardFacts(
        config=config,
        repo_id=repo_id,
        folder=folder,
        sites=tuple(entry.module.geometry.sites),
        training=entry.training,
        pipeline_tag=pipeline_tag(base),
        **saved,
    )


def pipeline_tag(base: PreTrainedModel) -> str | None:
    """The task of a model as the Hub names it, where it is certain: causal models that read and write text alone."""
    is_text = [tuple([kind] if isinstance(kind, str) else kind) == ("text",) for kind in _modalities(base)]
    is_causal = base.can_generate() and not base.config.is_encoder_decoder
    return "text-generation" if is_causal and all(is_text) else None


def _modalities(base: PreTrainedModel) -> list[str | Iterable[str]]:
    return [base.input_modalities, getattr(base, "output_modalities", "text")]


def write_card(directory: Path, facts: Iterable[CardFacts], existing: str | None, *, draw: bool = True) -> None:
    """Write README.md, and beside each prefix a picture of its losses where matplotlib is installed.

    Args:
        directory: The repository's folder.
        facts: What is known of each prefix; those that are not named keep what the card says about them.
        existing: The card that it replaces.
        draw: Whether to draw.

    Raises:
        PrefixFileError: The metadata of the existing card cannot be read. Nothing has been written.
    """
    text, pictures = existing, {}
    for one in facts:
        picture = loss_curve_png(one.training) if draw and one.training is not None else None
        place = f"{one.folder}/{PICTURE}" if one.folder else PICTURE
        if picture is not None:
            pictures[place] = picture
        text = card_text(text, one if picture is None else dataclasses.replace(one, picture=place))
    if text is not None:
        for place, picture in pictures.items():
            write_files((directory / place).parent, {PICTURE: picture})
        write_files(directory, {CARD: text.encode()})


def local_card(directory: Path) -> str | None:
    """The text of README.md in a folder, if there is one.

    Raises:
        PrefixFileError: It cannot be read, or is no text.
    """
    file = directory / CARD
    try:
        return _decoded(file.read_bytes(), str(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PrefixFileError(
            f"{file} cannot be read ({error}), so it is left as it is. Make it readable, or move it."
        ) from error


def card_on_hub(
    repo_id: str, token: str | bool | None = None, revision: str | None = None, *, file: str = CARD
) -> str | None:
    """The text of a README.md (or of another file) on the Hub, if there is one; never an old one from the cache.

    Raises:
        PrefixFileError: Nobody knows whether there is one, because the Hub cannot be asked.
    """
    with tempfile.TemporaryDirectory() as cache:
        try:
            found = hf_hub_download(repo_id, file, token=token, revision=revision, cache_dir=cache)
            content = Path(found).read_bytes()
        except GatedRepoError as error:
            raise _unknown(repo_id, file, error) from error
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        except Exception as error:
            raise _unknown(repo_id, file, error) from error
    return _decoded(content, f"{file} of {repo_id}")


def own_words(text: str) -> tuple[str, str]:
    """What somebody has written in a card: the text outside of the sections, and the metadata that are not made here.

    A title alone is not counted: every card has one.

    Raises:
        PrefixFileError: The metadata cannot be read.
    """
    card = FrontMatter(text)
    body = card.body
    for section in reversed(list(sections(body))):
        body = f"{body[: section.start]}\n{body[section.end :]}"
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    if len(lines) == 1 and lines[0].startswith("# "):
        lines = []
    return "\n".join(lines), repr(sorted(card.others(_MADE_HERE)))


def with_tags(text: str, tags: Iterable[str]) -> str:
    """A card with more tags.

    Raises:
        PrefixFileError: Its metadata cannot be read.
    """
    card = FrontMatter(text)
    card.add("tags", list(tags))
    return str(card)


def taking_over(existing: str | None, generated: str, asked: Mapping[str, Any]) -> str:
    """A card with what a trainer's own card knows besides: languages, license, tags and results.

    Args:
        existing: The card.
        generated: What the trainer wrote.
        asked: What the user asked the trainer to write, by the names of its arguments.

    Raises:
        PrefixFileError: The metadata cannot be read.
    """
    card, made = FrontMatter(existing), FrontMatter(generated)
    for key in ("language", "license"):
        if made.get(key) is not None and (asked.get(key) is not None or card.get(key) is None):
            card.set(key, made.get(key))
    card.add("tags", made.texts("tags"))
    card.add("metrics", made.texts("metrics"))
    if asked.get("dataset_tags") is not None or asked.get("dataset_name") is not None:  # or it is the builder's name
        card.add("datasets", made.texts("datasets"))
    if is_hub_id(asked.get("finetuned_from")):
        card.add("base_model", [asked["finetuned_from"]])
    entries = card.get("model-index")
    for entry in made.get("model-index") or []:
        entries = merge_model_index(entries, entry["name"], entry["results"])
    if entries:
        card.set("model-index", entries)
    if not card.body.strip() and asked.get("model_name"):
        card.body = f"# {asked['model_name']}\n"
    return str(card)


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrefixFileError(
            f"{name} is not UTF-8 ({error}). Save it as UTF-8, or move it elsewhere; nothing has been changed."
        ) from error


def _unknown(repo_id: str, file: str, error: Exception) -> PrefixFileError:
    return PrefixFileError(
        f"The Hub did not say whether {repo_id} has a {file} ({type(error).__name__}: {error}), and an upload might "
        "replace somebody's text. Check the connection and the token and upload again; everything is saved here."
    )
