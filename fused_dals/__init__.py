"""DALS, the optimizer of arXiv:2604.27295, for PyTorch: ``from fused_dals import DALS``."""

from pathlib import Path

if not Path(__file__).with_name("kernels").is_dir():
    # A checkout that is not installed has the kernels beside this package, where an installation has them in it.
    __path__.append(str(Path(__file__).parents[1]))

from fused_dals.depth import infer_depths
from fused_dals.optimizer import DALS
from fused_dals.presets import DALSAcc, DALSFast
from fused_dals.replicas import check_replicas_every

__version__ = "0.1.0"

__all__ = ["DALS", "DALSAcc", "DALSFast", "check_replicas_every", "infer_depths"]
