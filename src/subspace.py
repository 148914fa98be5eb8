"""The shared gradient space: for each protected weight, the directions that earlier tasks' training needed.

After a task, M is Adam's first moment of a weight. What the space S (orthonormal columns) does not hold of it,
M' = M - S S^T M, gives its leading left singular vectors to S, as few as make S hold a share `energy` of ||M||_F^2
(GPM, Saha et al. 2021, equation 9, with the moment in place of the activations). For side "input" the same is
done to M^T, so that S lives in the weight's columns. There a sample of the layer's inputs can stand in for the moment
(GPM itself), because the gradient's rows are combinations of inputs.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from errors import InputError
from files import read_tensors, whole_file
from Proj_torch.proj_projector import SIDES
from Proj_torch.svd import at_least_float32, truncated_svd

log = logging.getLogger("gorp")

FORMAT = "gorp-gradient-space"
VERSION = "1"
ROUNDING = 1e-6  # a share of the energy that float32 cannot tell from nothing
SAMPLE = 16  # input vectors that a layer's sample takes from a row


def extend_basis(S: Tensor | None, M: Tensor, energy: float = 0.9, max_directions: int | None = None) -> Tensor:
    """S with the fewest further orthonormal columns that make it hold a share `energy` of M.

    The share is ||S'^T M||_F^2 / ||M||_F^2. Columns already in S stay bitwise as they are.

    Args:
        S: (d, c) with orthonormal columns, or None for an empty space.
        M: (d, n).
        energy: in (0, 1].
        max_directions: most columns that S' may have; at most, and by default, d.

    Returns:
        S' (d, c') in float32 at least, c <= c' <= max_directions unless c is more already. S itself where M is zero.

    Raises:
        InputError: M is no matrix or not finite, its rows are not S's, or `energy` is not in (0, 1].
        torch.linalg.LinAlgError: no method finds the singular vectors of M'.
    """
    _check_energy(energy)
    if M.ndim != 2 or not M.isfinite().all():
        raise InputError(f"moment of shape {tuple(M.shape)}: not a matrix of finite numbers")
    M = at_least_float32(M)
    peak = M.abs().max()
    S = M.new_zeros(len(M), 0) if S is None else S.to(M)
    if len(S) != len(M):
        raise InputError(f"moment has {len(M)} rows, its gradient space {len(S)}; both must belong to one weight")
    free = min(len(M) if max_directions is None else max_directions, len(M)) - S.shape[1]
    if free <= 0 or peak == 0:
        return S
    M = M / peak  # squares of the entries must neither under- nor overflow
    residual = torch.addmm(M, S, S.T @ M, alpha=-1)
    whole = M.double().square().sum()
    held = whole - residual.double().square().sum()
    wanted = (energy - ROUNDING) * whole
    if held >= wanted:
        return S
    U, s, _ = truncated_svd(residual, min(residual.shape))
    reached = held + s.double().square().cumsum(0)
    count = min(int((reached < wanted).sum()) + 1, free, len(s))
    return torch.cat([S, orthonormal_against(S, U[:, :count])], dim=1)


def orthonormal_against(S: Tensor, U: Tensor) -> Tensor:
    """Orthonormal columns that span U's directions and are orthogonal to S; in float64, so that errors do not add up
    over many extensions. Twice is enough (Giraud, Langou and Rozloznik 2005)."""
    Q, wide = U.double(), S.double()
    for _ in range(2):
        Q = torch.linalg.qr(Q - wide @ (wide.T @ Q)).Q
    return Q.to(S.dtype)


def _check_energy(energy: float) -> None:
    if not 0 < energy <= 1:
        raise InputError(f"energy {energy}: allowed is a share above 0 and up to 1")


def _is_orthonormal(S: Tensor) -> bool:
    if S.ndim != 2 or not S.is_floating_point():
        return False
    S = at_least_float32(S)
    return torch.allclose(S.T @ S, torch.eye(S.shape[1], dtype=S.dtype), rtol=0, atol=1e-3)


class GradientSpace:
    """One basis S for each protected weight, by the weight's name.

    Args:
        side: "output" (S has the weight's rows) or "input" (its columns).
        energy: the share of a moment that its basis shall hold.
        max_directions: most columns of one basis; None for the weight's dimension.
        bases: name -> S (d, c), to start from.

    A parameter's name counts without its `.weight`, so that a layer stands for its weight.
    """

    def __init__(
        self,
        side: str = "output",
        energy: float = 0.9,
        max_directions: int | None = None,
        bases: Mapping[str, Tensor] | None = None,
    ):
        if side not in SIDES:
            raise InputError(f"side {side!r} of a gradient space: allowed are {', '.join(SIDES)}")
        _check_energy(energy)
        self.side = side
        self.energy = energy
        self.max_directions = max_directions
        self.bases = dict(bases or {})

    def get(self, name: str) -> Tensor | None:
        """S of a weight, None where nothing is protected yet: an entry of ProjAdamW's `scale_mats`."""
        return self.bases.get(_key(name))

    def extend(self, moments: Mapping[str, Tensor]) -> None:
        """Extend every weight's basis by what its moment (out, in), or a sample of its inputs (rows, in), needs.

        A moment that is zero or not finite, or whose singular vectors no method finds, leaves its basis as it is and
        says so in the log.

        Raises:
            InputError: a moment's shape does not fit its basis.
        """
        for name, moment in moments.items():
            if not moment.any() or not moment.isfinite().all():
                log.warning("%s: what the task needed is zero or not finite; its gradient space stays as it is", name)
                continue
            M = moment if self.side == "output" else moment.mT
            try:
                self.bases[_key(name)] = extend_basis(self.get(name), M, self.energy, self.max_directions)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            except torch.linalg.LinAlgError as error:
                log.warning("%s: %s; its gradient space stays as it is", name, error)

    def describe(self) -> list[str]:
        """How full each basis is, as lines like "encoder.q: 5 of 8 directions"."""
        return [
            f"{name}: {S.shape[1]} of {S.shape[0]} directions" + (", full" if S.shape[1] == S.shape[0] else "")
            for name, S in self.bases.items()
        ]

    def total(self) -> int:
        """Directions of all bases together."""
        return sum(S.shape[1] for S in self.bases.values())

    def line(self) -> str:
        """All bases in one line."""
        full = sum(S.shape[1] == S.shape[0] for S in self.bases.values())
        return f"shared space: {self.total()} directions in {len(self.bases)} bases, {full} of them full"

    def take_over(self, path: str | PathLike, weights: Mapping[str, Tensor]) -> None:
        """Start from the bases in a file that `save` wrote.

        Args:
            weights: by name, (out, in); not every one needs a basis.

        Raises:
            InputError: as `load`; the file's side is another, or a basis does not fit its weight.
        """
        found = GradientSpace.load(path)
        if found.side != self.side:
            hint = " (by METHOD=sgorp, or by the gorp that was the default before it)" if found.side == "input" else ""
            raise InputError(f"--protect_side: found {self.side}; {path} was built for the {found.side} side{hint}")
        side = SIDES.index(self.side)
        for name, weight in weights.items():
            S = found.get(name)
            if S is not None and len(S) != weight.shape[side]:
                raise InputError(
                    f"{path}: {_key(name)} has a basis of {len(S)} rows; {weight.shape[side]} are needed, the "
                    f"{self.side} side of a {weight.shape[0]} x {weight.shape[1]} matrix"
                )
        self.bases = found.bases

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {"format": FORMAT, "version": VERSION, "side": self.side, "energy": repr(self.energy)}
        if self.max_directions is not None:
            metadata["max_directions"] = str(self.max_directions)
        with whole_file(path) as partial:
            save_file({name: S.cpu().contiguous() for name, S in self.bases.items()}, partial, metadata)

    @classmethod
    def load(cls, path: str | PathLike) -> "GradientSpace":
        """Read what `save` wrote; the bases are on the CPU.

        Raises:
            InputError: the file is missing, damaged, no gradient space of this version, or holds what is no basis.
        """
        bases, metadata = read_tensors(path)
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{path}: not a gradient space of version {VERSION}, its metadata is {metadata}")
        for name, S in bases.items():
            if not _is_orthonormal(S):
                raise InputError(f"{path}: {name} is no matrix of orthonormal columns")
        limit = metadata.get("max_directions")
        try:
            return cls(metadata["side"], float(metadata["energy"]), limit and int(limit), bases)
        except (KeyError, ValueError, InputError) as error:
            raise InputError(f"{path}: metadata of the gradient space is wrong ({error})") from None


def _key(name: str) -> str:
    return name.removesuffix(".weight")


def layer_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """A sample of the vectors (n, in) that each layer sees, float32 on the CPU: `SAMPLE` of each row, no padding.

    Which places of a row are taken depends on its number alone, so the sample is the same however rows share batches.
    The arguments are those of `see_inputs`.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def take(name: str, number: int, vectors: Tensor) -> None:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(number))[:SAMPLE]
        seen[name].append(vectors[chosen.to(vectors.device)].float().cpu())

    see_inputs(model, layers, batches, take)
    return {name: torch.cat(vectors) for name, vectors in seen.items()}


@torch.no_grad()
def see_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    see: Callable[[str, int, Tensor], None],
) -> None:
    """Run the batches in evaluation mode and call `see` with what each layer sees of each row, without padding.

    Args:
        model: takes the batches; as it trains, so under DeepSpeed the engine.
        layers: name -> module of the model; a module may stand under several names.
        batches: with `attention_mask`, and `labels` whose -100 are padding where a layer sees the decoder's places. A
            layer's places are told by how many there are; one that sees neither is shown with all of them.
        see: gets the layer's name, the row's number over all batches, and the vectors (places, in).
    """
    two_stacks = getattr(getattr(getattr(model, "module", model), "config", None), "is_encoder_decoder", False)
    masks: list[Tensor] = []  # of the batch that is running
    rows_before = 0

    def take(name: str, X: Tensor) -> None:
        fitting = (mask for mask in masks if mask.shape == X.shape[:-1])
        mask = next(fitting, torch.ones(X.shape[:-1], dtype=torch.bool))
        for number, (row, places) in enumerate(zip(X, mask), rows_before):
            see(name, number, row[places])

    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: take(name, args[0]))
             for name, layer in layers.items()]  # fmt: skip
    training = model.training
    model.eval()
    try:
        for batch in batches:
            labels = batch["labels"]
            if two_stacks and labels.shape == batch["attention_mask"].shape:
                # Another place of padding tells the two apart.
                labels = nn.functional.pad(labels, (0, 1), value=-100)
            masks[:] = [batch["attention_mask"].bool(), labels != -100]
            model(**{**batch, "labels": labels})
            rows_before += len(batch["labels"])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
