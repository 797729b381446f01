"""One run: a method, trained and scored on one data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paper.settings import DatasetSettings, MethodSettings


@dataclass(frozen=True)
class DataChoice:
    """Which part of a data set is trained and tested on.

    Args:
        dataset: Name of the data set.
        train_size: Number of training pairs of an input and a text, with development data of 30 % of that size; `None`
            takes all.
        subset: Which random subset of that size.
        protocol: A name of `paper.data.subsets.PROTOCOLS`: train on some groups, test on others.
        dev_inputs: At most so many development inputs; `None` takes all.
        test_inputs: At most so many inputs of the test set, or of each of its seen and unseen parts, drawn once for
            all runs; `None` takes all.
    """

    dataset: str
    train_size: int | None = None
    subset: int = 0
    protocol: str | None = None
    dev_inputs: int | None = None
    test_inputs: int | None = None


@dataclass(frozen=True)
class Run:
    """A method, trained and scored on one data set.

    Args:
        model: The base: a folder or an id on the Hub.
        method: Name of the method in the settings.
        settings: The method, and how it is trained.
        data: What it is trained and tested on.
        task: What all methods share on the data set.
        seed: Of the method and of the order of the training data.
    """

    model: str
    method: str
    settings: MethodSettings
    data: DataChoice
    task: DatasetSettings
    seed: int = 0

    @property
    def trained(self) -> dict[str, Any]:
        """Everything that decides which weights come out."""
        return _as_read(self._trained())

    @property
    def texts(self) -> dict[str, Any]:
        """Everything that decides which texts the weights give."""
        return _as_read(self._texts())

    @property
    def asked(self) -> dict[str, Any]:
        """Everything that results of the run are known by, but for the model and the data's groups."""
        trained = self.trained
        return {
            "method": self.method,
            "setting": trained["setting"],
            "task": {**trained["task"], **self.texts, "dev_inputs": self.data.dev_inputs},
            "train_size": self.data.train_size,
            "subset": self.data.subset,
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """Names what is trained: equal for runs that differ only in the texts that they generate."""
        return _digest(self._trained())

    @property
    def texts_key(self) -> str:
        """Names how and for which inputs texts are generated."""
        return _digest(self._texts())

    @property
    def folder(self) -> str:
        """Path of the run inside the folder of all runs."""
        size = "all" if self.data.train_size is None else f"{self.data.train_size}-subset{self.data.subset}"
        return f"{self.data.dataset}/{self.method}-{size}-seed{self.seed}-{self.key}"

    def _trained(self) -> dict[str, Any]:
        data, task = self.data, self.task
        shared: dict[str, Any] = {"separator": task.separator, "target_start": task.target_start}
        shared |= {"max_source_tokens": task.max_source_tokens, "instruction": task.instruction}
        chosen = {"dataset": data.dataset, "train_size": data.train_size, "subset": data.subset}
        chosen |= {"protocol": data.protocol, "dev_inputs": data.dev_inputs}
        return {
            "model": self.model,
            "setting": self.settings.described(),
            "data": chosen,
            "task": shared,
            "seed": self.seed,
        }

    def _texts(self) -> dict[str, Any]:
        generation = {"max_new_tokens": self.task.max_new_tokens, **self.task.decoding}
        return {"generation": generation, "test_inputs": self.data.test_inputs}


def _as_read(content: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(content)))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
