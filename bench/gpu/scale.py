"""How much of everything ``python -m bench gpu`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.byte_table import STEP_DTYPES, Dtypes
from bench.gpu.correctness import DTYPES, Spec, grid
from bench.gpu.features import FEATURES
from bench.gpu.races import Crowd
from bench.gpu.runner import SECTIONS
from fused_dals.kernels import layout

SWEEP_MODELS, SWEEP_DTYPES = ("resnet50", "vit_l_16", "gpt2_xl"), ("fp32", "mixed")
MODELS = ("resnet50", "vit_b_16", "vit_l_16", "bert_large", "gpt2", "gpt2_xl", "llama_7b")
QUICK_MODELS = ("resnet50", "vit_b_16", "gpt2")
#: Of 16-bit parameters; others have half of it, so that what lies around its borders lies around theirs.
LARGEST_CHUNK = layout.chunk_elements(2, 2, 2)
CROWD = Crowd(tiny=4000, tiny_elements=3000, huge=3, huge_elements=40_000_000)


@dataclass(frozen=True)
class Scale:
    """``seconds`` is the time of the whole run; ``compile_budget`` what torch.compile may take of it, in all and for
    one model; ``quick_to_compile``: lists of few tensors, for which that suffices, beside the models."""

    models: tuple[str, ...]
    specs: tuple[Spec, ...] = tuple(grid(LARGEST_CHUNK, 150))
    grid_dtypes: tuple[Dtypes, ...] = tuple(DTYPES)
    chunk: int | None = None
    crowd: Crowd = CROWD
    reruns: tuple[int, int] = (100, 25)
    launch_counts: tuple[int, ...] = (1, 300, 10_000)
    host_tensors: int = 300
    host_groups: tuple[int, ...] = (1, 10, 100, 300)
    host_samples: int = 100
    features: tuple[str, ...] = FEATURES
    step_dtypes: tuple[str, ...] = tuple(STEP_DTYPES)
    samples: int = 25
    copy_samples: int = 10
    compile_budget: tuple[float, float] = (60.0, 40.0)
    quick_to_compile: tuple[str, ...] = ("of_1mi",)
    sweep_models: tuple[str, ...] = SWEEP_MODELS
    sweep_samples: int = 5
    sections: tuple[str, ...] = SECTIONS
    seconds: float = 430.0
    seed: int = 0


def scale_for(
    models: Sequence[str] | None, quick: bool, sections: Sequence[str] | None = None, seconds: float | None = None
) -> Scale:
    """The whole benchmark, or a look in a minute or two without sweep and large models; or some sections of either."""
    scale = Scale(models=tuple(models or MODELS))
    if quick:
        scale = Scale(
            models=tuple(models or QUICK_MODELS),
            reruns=(100, 5),
            step_dtypes=("fp32", "mixed"),
            samples=10,
            compile_budget=(40.0, 40.0),
            sweep_models=(),
            seconds=240.0,
        )
    return replace(scale, sections=tuple(sections or SECTIONS), seconds=seconds or scale.seconds)
