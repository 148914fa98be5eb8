"""The shared gradient space: for each protected weight, the directions in which earlier tasks trained.

After a task, let M be Adam's first moment of a weight, and M' = M - S S^T M the part of it outside the space S
(orthonormal columns). S is extended by the fewest leading left singular vectors of M' that make it hold a share
`energy` of ||M||_F^2 (GPM, Saha et al. 2021, equation 9, with the moment in place of the activations). For side "input"
M^T takes the place of M, so that S holds directions of the layer's input. There a sample of the layer's inputs can
replace the moment (as in GPM), because the gradient's rows are combinations of inputs.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from errors import InputError
from files import atomic_file, read_tensors
from Proj_torch.proj_projector import SIDES, check_space
from Proj_torch.svd import at_least_float32, truncated_svd
from ranks import is_first

logger, detail = logging.getLogger("gorp"), logging.getLogger("gorp.detail")

FORMAT = "gorp-gradient-space"
VERSION = "1"
ROUNDING = 1e-6  # share of the energy that is within float32's rounding error
SAMPLE = 16  # input vectors from each example in a layer's sample

Moment = Tensor | tuple[Tensor, ...]  # a matrix, or two thin ones whose product it is


def extend_basis(S: Tensor | None, M: Tensor, energy: float = 0.9) -> Tensor:
    """Extend S (d, c) by the fewest orthonormal columns that make it hold a share `energy` of M (d, n).

    The share is ||S'^T M||_F^2 / ||M||_F^2, where S' (d, c') is the result, in float32 at least; its first c columns
    are S. None is an empty space. Raises torch.linalg.LinAlgError if M is not finite or the SVD does not converge.
    """
    M = at_least_float32(M)
    peak = M.abs().max()
    S = M.new_zeros(len(M), 0) if S is None else S.to(M)
    free = len(M) - S.shape[1]
    if free == 0 or peak == 0:
        return S
    M = M / peak  # so that squares neither under- nor overflow
    residual = torch.addmm(M, S, S.T @ M, alpha=-1)
    total = M.double().square().sum()
    held = total - residual.double().square().sum()
    wanted = (energy - ROUNDING) * total
    if held >= wanted:
        return S
    U, s, _ = truncated_svd(residual, min(residual.shape))
    reached = held + s.double().square().cumsum(0)
    count = min(int((reached < wanted).sum()) + 1, free, len(s))
    return torch.cat([S, orthonormal_against(S, U[:, :count])], dim=1)


def orthonormal_against(S: Tensor, U: Tensor) -> Tensor:
    """Orthonormal columns that span U's directions and are orthogonal to S.

    In float64, so that errors do not add up over many extensions; two passes suffice (Giraud, Langou, Rozloznik 2005).
    """
    Q, wide = U.double(), S.double()
    for _ in range(2):
        Q = torch.linalg.qr(Q - wide @ (wide.T @ Q)).Q
    return Q.to(S.dtype)


def columns_of(moment: Moment, side: str) -> Tensor:
    """A matrix whose column space and energies are those of M (out, in), or of M^T for side "input".

    For a product M = A B with A (out, k) and B (k, in) it has k columns: with the QR decomposition B^T = Q R, M is
    (A R^T) Q^T, and Q^T changes neither the column space nor the energies.
    """
    factors = moment if isinstance(moment, tuple) else (moment,)
    if side == "input":
        factors = tuple(factor.mT for factor in factors[::-1])
    if len(factors) == 1:
        return factors[0]
    A, B = factors
    return A @ torch.linalg.qr(B.mT).R.mT


@dataclass
class GradientSpace:
    """One basis S for each protected weight, by the weight's name.

    Attributes:
        side: "output" (S has the weight's rows) or "input" (its columns).
        energy: the share of a moment that its basis must hold, above 0 and at most 1.
        bases: name -> S (d, c); the name is that of the weight's layer, without the parameter's `.weight`.
    """

    side: str = "output"
    energy: float = 0.9
    bases: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str) -> Tensor | None:
        """S of a weight; None if nothing is protected yet."""
        return self.bases.get(_key(name))

    def extend(self, moments: Mapping[str, Moment]) -> None:
        """Extend the basis of every weight by its moment (out, in), or by a sample of its inputs (n, in).

        The SVDs run on the moments' device, and with several ranks only on the first, which saves the space. A moment
        that is not finite, or whose SVD does not converge, is skipped with a warning; a zero one with a line in the
        log. Neighbours that see the same inputs, such as an attention's q and v, share one SVD.
        """
        last: tuple[Tensor | None, ...] = (None, None, None)  # a moment, and its S before and after
        for name, moment in tqdm(moments.items(), "shared space", leave=False, delay=1) if is_first() else ():
            M, S = columns_of(moment, self.side), self.get(name)
            if not M.any():  # as in every later task once S is full: no reason to warn
                detail.info("%s: the moment is zero; its gradient space does not change", name)
                continue
            try:
                if not (is_equal(M, last[0]) and is_equal(S, last[1])):
                    last = M, S, extend_basis(S, M, self.energy)
                self.bases[_key(name)] = last[2].clone()
            except torch.linalg.LinAlgError as error:
                logger.warning("%s: %s; its gradient space does not change", name, error)

    def describe(self) -> list[str]:
        """How full each basis is, in lines such as "encoder.q: 5 of 8 directions"."""
        return [f"{name}: {S.shape[1]} of {S.shape[0]} directions" for name, S in self.bases.items()]

    def total(self) -> int:
        """Directions of all bases together."""
        return sum(S.shape[1] for S in self.bases.values())

    def line(self) -> str:
        """All bases in one line."""
        full = sum(S.shape[1] == S.shape[0] for S in self.bases.values())
        return f"shared space: {self.total()} directions in {len(self.bases)} bases, {full} of them full"

    def load(self, path: str | PathLike, weights: Mapping[str, Tensor]) -> None:
        """Start from the bases in a file that `save` wrote; some of the `weights` (out, in) may have none.

        Raises InputError where the file is missing, damaged, of another kind, version or side, or holds a tensor that
        is not a basis or does not fit its weight.
        """
        bases, metadata = read_tensors(path)
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{path}: not a gradient space of version {VERSION}, its metadata is {metadata}")
        if (side := metadata.get("side")) != self.side:
            hint = " (by METHOD=sgorp)" if side == "input" else ""
            raise InputError(f"--protect_side: found {self.side}; allowed: {side}, for which {path} was built{hint}")
        sizes = {_key(name): weight.shape[SIDES.index(side)] for name, weight in weights.items()}
        for name, S in bases.items():
            check_space(S, sizes.get(name, len(S) if S.ndim else 0), f"{path}: {name}")
        self.bases = bases

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file."""
        metadata = {"format": FORMAT, "version": VERSION, "side": self.side, "energy": repr(self.energy)}
        with atomic_file(path) as partial:
            save_file({name: S.cpu().contiguous() for name, S in self.bases.items()}, partial, metadata)


def _key(name: str) -> str:
    return name.removesuffix(".weight")


def is_equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are None, or have the same shape, device and values."""
    if one is None or other is None:
        return one is other
    return (one.shape, one.device) == (other.shape, other.device) and torch.equal(one, other)


def layer_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """A sample of each layer's input vectors (n, in), on its device: `SAMPLE` from each example, without padding.

    The positions depend only on the example's number, so the sample does not depend on the batch size. A layer that no
    example reaches is left out. The arguments are those of `see_inputs`.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def take(name: str, first: int, inputs: list[Tensor]) -> None:
        for number, vectors in enumerate(inputs, first):
            chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(number))[:SAMPLE]
            seen[name].append(vectors[chosen.to(vectors.device)])

    see_inputs(model, layers, batches, take)
    return {name: torch.cat(vectors) for name, vectors in seen.items() if vectors}


@torch.no_grad()
def see_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    see: Callable[[str, int, list[Tensor]], None],
) -> None:
    """Run the batches in evaluation mode and call `see` with each layer's inputs for each batch, without padding.

    Args:
        model: the model that takes the batches, under DeepSpeed the engine.
        layers: name -> module of the model; a module may have several names.
        batches: with `attention_mask` for the encoder's positions, and `labels`, -100 for padding, for the decoder's. A
            layer's positions are recognised by their number; where it fits neither, all positions count.
        see: gets the layer's name, the number of the batch's first example over all batches, and the vectors
            (positions, in) of each of its examples; for neighbours with the same input, such as q and v, the same list.
    """
    two_stacks = getattr(getattr(getattr(model, "module", model), "config", None), "is_encoder_decoder", False)
    positions: dict[torch.Size, list[Tensor]] = {}  # by the current batch's shape, each example's without padding
    examples_before = 0
    last: tuple[Tensor | None, int, list[Tensor]] = (None, 0, [])  # an input and its version, which writing changes

    def take(name: str, X: Tensor) -> None:
        nonlocal last
        if X is not last[0] or X._version != last[1]:
            last = X, X._version, without_padding(X)
        see(name, examples_before, last[2])

    def without_padding(X: Tensor) -> list[Tensor]:
        if X.ndim == 2:  # some models flatten the batch to (examples * positions, in)
            X = X.unflatten(0, next((shape for shape in positions if shape.numel() == len(X)), (1, len(X))))
        counted = positions.get(X.shape[:-1], [slice(None)] * len(X))
        return [vectors[which] for vectors, which in zip(X, counted)]

    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: take(name, args[0]))
             for name, layer in layers.items()]  # fmt: skip
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch, labels = dict(batch), batch["labels"]
            if two_stacks and labels.shape == batch["attention_mask"].shape:
                # One more position of padding makes them differ.
                labels = nn.functional.pad(labels, (0, 1), value=-100)
                batch.pop("decoder_input_ids", None)  # of the old length; the model makes them from the labels
            positions.clear()
            for mask in (labels != -100, batch["attention_mask"].bool()):
                positions[mask.shape] = [row.nonzero().squeeze(1).to(mask.device) for row in mask.cpu()]
            model(**batch | {"labels": labels})
            examples_before += len(labels)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
