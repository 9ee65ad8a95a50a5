"""DALS, the optimizer of arXiv:2604.27295, for PyTorch: ``from fused_dals import DALS``."""

from fused_dals.depth import infer_depths
from fused_dals.optimizer import DALS
from fused_dals.presets import DALSAcc, DALSFast
from fused_dals.replicas import check_replicas_every

__version__ = "0.1.0"

__all__ = ["DALS", "DALSAcc", "DALSFast", "check_replicas_every", "infer_depths"]
