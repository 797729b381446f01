"""Modules of the base with other weights in each row of a batch: every prefix brings its own classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .errors import PrefixInputError
from .modules_to_save import Forward, ModuleWeights, Weights


class RowWeights(Weights):
    """The weights of each row's prefix; a module runs once for the rows of each prefix.

    Args:
        weights: Those of each row, `None` for the base's own.
    """

    def __init__(self, weights: Sequence[ModuleWeights | None]) -> None:
        self.weights = weights
        self.module_names = tuple(
            dict.fromkeys(name for one in weights if one is not None for name in one.module_names)
        )

    def run(self, name: str, module: nn.Module, usual: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives, each row with its own weights.

        Raises:
            PrefixInputError: It does not compute row by row.
        """
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        copies, rest = divmod(given[0].shape[0] if given and given[0].dim() else 0, len(self.weights))
        if rest or not copies:
            raise self._refusal(name)
        total = copies * len(self.weights)
        rows: dict[ModuleWeights | None, list[int]] = {}
        for place in range(total):
            own = self.weights[place // copies]
            rows.setdefault(own if own is not None and name in own.module_names else None, []).append(place)
        parts = []
        for own, indices in rows.items():
            index = torch.tensor(indices, device=given[0].device)

            def part(value: Any, index: torch.Tensor = index) -> Any:
                is_batch = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == total
                return value[index.to(value.device)] if is_batch else value

            forward = usual if own is None else own.replica(name, module).forward
            parts.append(forward(*map(part, args), **{key: part(value) for key, value in kwargs.items()}))
            if not isinstance(parts[-1], torch.Tensor) or parts[-1].shape[:1] != (len(indices),):
                raise self._refusal(name)
        order = torch.tensor([index for indices in rows.values() for index in indices], device=parts[0].device)
        return torch.cat(parts)[order.argsort()]

    def _refusal(self, name: str) -> PrefixInputError:
        return PrefixInputError(
            f"The module {name!r}, for which prefixes of this batch have weights of their own, does not compute row by "
            "row. Run the rows of one prefix at a time."
        )
