"""What an engine is asked to train and to protect."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Plan:
    """What trains by projection, what is protected, and how.

    Attributes:
        targets: module name -> linear layer whose weight (out, in) trains by projection.
        projection: a projected group's settings in `ProjAdamW`: rank, update_proj_gap, scale, proj_type, svd, lr. With
            cores `svd` may also be "sketch".
        factors: parameter name -> LoRA factor whose first moment `first_moments` returns.
        spaces: name of a target or factor -> S, (out, c) or (in, c) as `side` says; without an entry it is unprotected.
        side: "output" or "input".
        way: how S acts, one of `ProjAdamW`'s `gp_first`, `gp_second` and `orthogonal`; "none" without spaces. With
            cores S is always removed from a factor's gradient.
    """

    targets: Mapping[str, nn.Linear]
    projection: Mapping[str, Any]
    factors: Mapping[str, nn.Parameter] = field(default_factory=dict)
    spaces: Mapping[str, Tensor] = field(default_factory=dict)
    side: str = "output"
    way: str = "gp_first"
