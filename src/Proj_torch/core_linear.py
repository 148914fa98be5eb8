"""Linear layers whose weights are kept in a form that ZeRO may cut up; `zero_core` says why, and drives them.

`CoreLinear` is frozen and trains a small core; `GuardedLinear` trains whole, but for its component in a space.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from Proj_torch.layer_gradient import LayerGradient
from Proj_torch.proj_projector import Bases, back_factors, project, remove, times_thin


class CoreLinear(nn.Linear):
    """A frozen linear layer and a trainable core: y = (d W + L C R^T) x + b. Keeps the name `weight`.

    Args:
        linear: the layer whose weight and bias this one takes over.
        ranks: of the left and the right basis, None where that side is not projected.
        space: S, orthonormal columns, or None.
        side: "output" for S (out, c), "input" for S (in, c).
        gp_first, gp_second: remove S from the gradient, from the update.
    """

    def __init__(
        self,
        linear: nn.Linear,
        ranks: Sequence[int | None],
        space: Tensor | None = None,
        side: str = "output",
        gp_first: bool = False,
        gp_second: bool = False,
    ):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.trainable_before = linear.weight.requires_grad
        self.weight.requires_grad_(False)
        self.train(linear.training)
        self.shape = (linear.out_features, linear.in_features)
        self.ranks = tuple(ranks)
        self.core_shape = tuple(rank or size for rank, size in zip(self.ranks, self.shape, strict=True))
        self.core = nn.Parameter(torch.zeros(self.core_shape, device=linear.weight.device))
        self.space = None if space is None else space.detach().float()
        self.side, self.gp_first, self.gp_second = side, gp_first, gp_second
        self.decay = 1.0  # d
        self.bases: Bases | None = None
        self.bases_before: Bases | None = None  # what a skipped refresh step goes back to
        self.rounding: Tensor | None = None  # a 16-bit weight's rounding error, in the weight's dtype
        self.gradient: LayerGradient | None = None  # collects a refresh step's gradient
        self.share = 0.0  # of the last refresh's gradient, in its bases: ||L^T G R||^2 / ||G||^2
        self.counts = {"refreshes": 0, "projections": 0, "energy": 0.0}  # energy: sum of the shares

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

    def effective_weight(self) -> Tensor:
        """d W + L C R^T (out, in), float32, differentiable: for penalties on the trained weight.

        Raises:
            InputError: DeepSpeed's stage 3 has partitioned the weight.
        """
        if self.weight.shape != self.shape:
            raise InputError("DeepSpeed stage 3: a penalty on a partitioned weight; allowed are stages 0 to 2")
        return _EffectiveWeight.apply(self.core, self)

    def removed(self, first: bool) -> tuple:
        """(S, side) for the gradient (`first`) or for the update, empty where nothing is removed."""
        active = self.gp_first if first else self.gp_second
        return (self.space, self.side) if active and self.space is not None else ()

    def factors(self, first: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Left and right basis in `dtype` and S in float32, for the gradient (`first`) or for the update.

        S is taken out of the basis of its side where that side is projected, which is the same (the removal is
        linear and symmetric); only where it is not projected S is left over for the core.
        """
        (left, right), space = self.bases, None
        if self.removed(first):
            if self.side == "output" and left is not None:
                left = remove(left, self.space, "output")
            elif self.side == "input" and right is not None:
                right = remove(right, self.space, "output")
            else:
                space = self.space
        return *(None if X is None else X.to(dtype) for X in (left, right)), space

    def prepare_refresh(self) -> None:
        """Collect the next step's gradient; the core must be zero."""
        self.gradient, self.bases_before = LayerGradient(self.shape), self.bases

    @torch.no_grad()
    def fold(self, core: Tensor) -> None:
        """W <- d W + L C R^T in float32, d <- 1. The weight must be whole (see `gathered`)."""
        if self.weight.dtype == torch.float32:
            self._add_update(self.weight.detach(), core)  # in place: nothing of W's size beside it
        else:
            W = self.trained_weight(core)
            self.weight.copy_(W)
            self.rounding = (W - self.weight.float()).to(self.weight.dtype)
        self.decay = 1.0

    def trained_weight(self, core: Tensor) -> Tensor:
        """d W + L C R^T (out, in) in float32, with what 16-bit rounding left out of W."""
        W = self.weight.detach().to(torch.float32, copy=True)
        if self.rounding is not None:
            W += self.rounding
        return self._add_update(W, core)

    def _add_update(self, W: Tensor, core: Tensor) -> Tensor:
        """W <- d W + L C R^T, in place."""
        if self.bases is None:
            return W.mul_(self.decay)
        factors = back_factors(core, *self.bases, *self.removed(first=False))
        return W.addmm_(*factors, beta=self.decay) if len(factors) == 2 else W.mul_(self.decay).add_(*factors)


class GuardedLinear(nn.Linear):
    """A trainable linear layer that keeps its weight's component in S, whatever the optimizer does (`gp_second`).

    y = (W - S S^T W + C) x, with C = S S^T W as it was at the start (or the same from the right). The gradient of W is
    that of y = W x. So an optimizer that sees slices of W moves W as it always would, and the layer moves by that
    update without its component in S, as ProjAdamW does it with the whole update at hand. Not for weight decay, which
    would move C.

    Args:
        linear: the layer whose weight and bias this one takes over.
        space: S, orthonormal columns.
        side: "output" for S (out, c), "input" for S (in, c).
    """

    def __init__(self, linear: nn.Linear, space: Tensor, side: str):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.space, self.side = linear.weight, linear.bias, space, side
        W = linear.weight.detach().float()
        self.kept = W - remove(W, space, side)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) for x (..., in)."""
        return F.linear(x, _Guarded.apply(self.weight, self), self.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """Let the weight itself hold what the layer computes with. The weight must be whole (see `gathered`)."""
        self.weight.copy_(self.guarded(self.weight))

    def guarded(self, weight: Tensor) -> Tensor:
        """W - S S^T W + C, float32."""
        return remove(weight, self.space.to(weight.device), self.side) + self.kept.to(weight.device)


class _Guarded(torch.autograd.Function):
    """The guarded weight, whose gradient goes to the weight as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: GuardedLinear) -> Tensor:
        return layer.guarded(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class _Tap(torch.autograd.Function):
    """The identity on y; backward leaves the factors of the weight's gradient at the layer."""

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
    """L C R^T x, whose core gradient is L^T G R, each with or without S (autograd alone would tie the two)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, layer: CoreLinear) -> Tensor:
        left, right, space = layer.factors(first=False, dtype=x.dtype)
        z = x if right is None else times_thin(x, right)
        C = core.to(x.dtype) if space is None else remove(core, space, layer.side).to(x.dtype)
        h = F.linear(z, C)
        right_of_gradient = layer.factors(first=True, dtype=x.dtype)[1]
        same = right_of_gradient is None or layer.gp_first == layer.gp_second
        ctx.layer = layer
        ctx.save_for_backward(z if same else times_thin(x, right_of_gradient), core)
        return h if left is None else F.linear(h, left)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        z, core = ctx.saved_tensors
        layer, grad_x = ctx.layer, None
        if ctx.needs_input_grad[0]:
            left, right, space = layer.factors(first=False, dtype=grad_y.dtype)
            C = core.to(grad_y.dtype) if space is None else remove(core, space, layer.side).to(grad_y.dtype)
            grad_x = (grad_y if left is None else times_thin(grad_y, left)) @ C
            grad_x = grad_x if right is None else F.linear(grad_x, right)
        left, _, space = layer.factors(first=True, dtype=grad_y.dtype)
        grad_h = grad_y if left is None else times_thin(grad_y, left)
        grad_core = grad_h.flatten(0, -2).mT @ z.flatten(0, -2)
        grad_core = grad_core if space is None else remove(grad_core, space, layer.side)
        return grad_x, grad_core.to(core.dtype), None


class _EffectiveWeight(torch.autograd.Function):
    """The weight itself, whose gradient goes to the core as the layer's own does."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, layer: CoreLinear) -> Tensor:
        ctx.layer, ctx.core_dtype = layer, core.dtype
        return layer.trained_weight(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        layer = ctx.layer
        if layer.gradient is None:
            return project(grad, *layer.bases, *layer.removed(first=True)).to(ctx.core_dtype), None
        layer.gradient.add_matrix(grad)
        return torch.zeros(layer.core_shape, dtype=ctx.core_dtype, device=grad.device), None
