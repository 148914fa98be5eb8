"""A frozen linear layer with a small trainable core, which ZeRO can shard; `zero_core` explains and drives it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from full_rank import ROUNDING_SCALE, set_weight
from Proj_torch.layer_gradient import LayerGradient
from Proj_torch.proj_projector import SIDES, Bases, Basis, back_factors, project, remove, remove_from_bases, times_thin


class CoreLinear(nn.Linear):
    """A frozen linear layer and a trainable core: y = (d W + L C R^T) x + b. W keeps the name `weight`.

    Args:
        linear: the layer whose weight and bias this one takes over.
        ranks: of the left and the right basis, None where that side is not projected.
        space: S, float32, or None.
        side: "output" for S (out, c), "input" for S (in, c).
        orthogonal: S acts as ProjAdamW's `orthogonal`, otherwise as its `gp_first`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        ranks: Sequence[int | None],
        space: Basis = None,
        side: str = "output",
        orthogonal: bool = False,
    ):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        self.shape = (linear.out_features, linear.in_features)
        self.ranks = tuple(ranks)
        self.core_shape = tuple(rank or size for rank, size in zip(self.ranks, self.shape, strict=True))
        self.core = nn.Parameter(torch.zeros(self.core_shape, device=linear.weight.device))
        self.space, self.side, self.orthogonal = space, side, orthogonal
        self.decay = 1.0  # d
        self.bases: Bases | None = None
        self.share: Tensor | float = 0.0  # of the last refresh's gradient, in its bases: ||L^T G R||^2 / ||G||^2
        self.refreshes = 0  # that found bases
        self.fell_back = False  # whether the last refresh found none, so that the next step refreshes again
        self.before: tuple | None = None  # bases, share and fell_back to restore after a skipped step
        # A 16-bit weight's rounding error as `set_weight` keeps it; None until a fold has one.
        self.register_buffer("rounding", getattr(linear, "rounding", None), persistent=False)
        self.gradient: LayerGradient | None = None  # collects a refresh step's gradient

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) for x (..., in)."""
        if self.decay == 1.0:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = F.linear(x, self.weight) * self.decay
            y = y if self.bias is None else y + self.bias
        x = x.to(y.dtype)  # under autocast y is the narrower one
        if self.gradient is not None and torch.is_grad_enabled():
            return _Tap.apply(y, x, self.core, self)  # the core is zero at a refresh
        return y if self.bases is None else y + _CoreTerm.apply(x, self.core, self)

    def from_update(self) -> Basis:
        """S if it is removed from the update: as `orthogonal`, or with the basis of a projected side."""
        return self.space if self.orthogonal or self.ranks[SIDES.index(self.side)] is not None else None

    def factors(self, S: Basis, dtype: torch.dtype) -> tuple[Basis, Basis, Basis]:
        """Left and right basis in `dtype` without S, and S in float32 if it has yet to be removed from the core; see
        `remove_from_bases`."""
        left, right, space = remove_from_bases(*self.bases, S, self.side)
        return *(None if X is None else X.to(dtype) for X in (left, right)), space

    def prepare_refresh(self) -> None:
        """Collect the next step's gradient; the core must be zero."""
        self.gradient, self.before = LayerGradient(self.shape), (self.bases, self.share, self.fell_back)
        self.fell_back = True  # until bases are found: a step may skip the layer (LayerDrop)

    def close_refresh(self, taken: bool) -> None:
        """End a step that refreshed: count the refresh, or undo it if the optimizer skipped the step."""
        if self.gradient is not None:
            if not taken:
                self.bases, self.share, self.fell_back = self.before
            elif not self.fell_back:
                self.refreshes += 1
            self.gradient = self.before = None

    @torch.no_grad()
    def fold(self, core: Tensor) -> None:
        """W <- d W + L C R^T (out, in), d <- 1. The weight must be complete (see `gathered`)."""
        if self.weight.dtype == torch.float32:
            self._add_update(self.weight.detach(), core)  # in place, without a copy of W's size
        else:
            set_weight(self, self.trained_weight(core))
        self.decay = 1.0

    def trained_weight(self, core: Tensor) -> Tensor:
        """d W + L C R^T (out, in) in float32, with the rounding error of a 16-bit W."""
        W = self.weight.detach().to(torch.float32, copy=True)
        if self.rounding is not None:
            W.add_(self.rounding.float(), alpha=1 / ROUNDING_SCALE)
        return self._add_update(W, core)

    def _add_update(self, W: Tensor, core: Tensor) -> Tensor:
        """W <- d W + L C R^T, in place."""
        if self.bases is None:
            return W.mul_(self.decay)
        factors = back_factors(core, *self.bases, self.from_update(), self.side)
        return W.addmm_(*factors, beta=self.decay) if len(factors) == 2 else W.mul_(self.decay).add_(*factors)


class _Tap(torch.autograd.Function):
    """The identity on y; its backward pass gives the layer the factors of the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, core: Tensor, layer: CoreLinear) -> Tensor:
        ctx.layer, ctx.core_dtype = layer, core.dtype
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        ctx.layer.gradient.add(grad_y, x)
        nothing = torch.zeros(ctx.layer.core_shape, dtype=ctx.core_dtype, device=x.device)
        return grad_y, None, nothing, None


class _CoreTerm(torch.autograd.Function):
    """L C R^T x, with the core gradient L^T G R, each with or without S (autograd would treat both alike)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, layer: CoreLinear) -> Tensor:
        left, right, space = layer.factors(layer.from_update(), x.dtype)
        z = times_thin(x, right)
        h = F.linear(z, remove(core, space, layer.side).to(x.dtype))
        # S is removed from the right basis for the gradient and for the update alike, so z serves both.
        ctx.layer = layer
        ctx.save_for_backward(z, core)
        return h if left is None else F.linear(h, left)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        z, core = ctx.saved_tensors
        layer, grad_x = ctx.layer, None
        if ctx.needs_input_grad[0]:
            left, right, space = layer.factors(layer.from_update(), grad_y.dtype)
            grad_x = times_thin(grad_y, left) @ remove(core, space, layer.side).to(grad_y.dtype)
            grad_x = grad_x if right is None else F.linear(grad_x, right)
        left, _, space = layer.factors(layer.space, grad_y.dtype)
        grad_core = times_thin(grad_y, left).flatten(0, -2).mT @ z.flatten(0, -2)
        return grad_x, remove(grad_core, space, layer.side).to(core.dtype), None


class EffectiveWeight(torch.autograd.Function):
    """d W + L C R^T (out, in), float32; its gradient reaches the core in the same way as the layer's own."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, layer: CoreLinear) -> Tensor:
        ctx.layer, ctx.core_dtype = layer, core.dtype
        return layer.trained_weight(core.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        layer = ctx.layer
        if layer.gradient is None:
            return project(grad, *layer.bases, layer.space, layer.side).to(ctx.core_dtype), None
        layer.gradient.add_matrix(grad)
        return torch.zeros(layer.core_shape, dtype=ctx.core_dtype, device=grad.device), None
