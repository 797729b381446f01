"""Virtual token 0, where it keeps what the initializer gave it.

Many models let their tokens attend to the first one whenever nothing else is wanted. A form of a prefix whose first
token is frozen keeps that token's numbers in buffers, and what it computes or learns for the token is left aside. So no
gradient and no optimizer, with weight decay or momentum, moves it, and parameters keep their names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

FIRST = "first"
"""Name of the module that keeps the numbers, inside of a form."""


class FirstToken(nn.Module):
    """The numbers of virtual token 0.

    Args:
        sizes: Numbers of one virtual token in all layers of each site, `N` by site.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        for site, size in sizes.items():
            self.register_buffer(site, torch.zeros(1, size))

    def keep(self, site: str, rows: torch.Tensor) -> None:
        """Take over the first of the rows `(p, N)`."""
        self.get_buffer(site).copy_(rows[:1].detach())

    def put_into(self, site: str, rows: torch.Tensor) -> torch.Tensor:
        """The rows `(p, N)` with the first one as it is kept, without a gradient."""
        return torch.cat([self.get_buffer(site).to(rows), rows[1:]])
