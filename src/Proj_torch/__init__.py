"""Adam in low-rank gradient subspaces that stay clear of what earlier tasks need."""

from Proj_torch.adamw import ProjAdamW
from Proj_torch.proj_projector import ProjProjector
from Proj_torch.proj_projector_tensor import ProjProjectorTensor

__all__ = ["ProjAdamW", "ProjProjector", "ProjProjectorTensor"]
