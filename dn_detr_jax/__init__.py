"""DN-DETR (query denoising on DAB-DETR) in JAX and Flax, for TPU, GPU and CPU.

`dn_detr_jax.load(workdir)` gives a `Predictor`, whose `predict` finds the objects in pictures.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dn_detr_jax.inference.predictor import Detections as Detections
    from dn_detr_jax.inference.predictor import Predictor as Predictor
    from dn_detr_jax.inference.predictor import load as load

__version__ = "0.1.0"

_OF_PREDICTOR = ("Detections", "Predictor", "load")


def __getattr__(name: str) -> Any:
    # Imported when asked for: parts of this package are used without the libraries it needs.
    if name in _OF_PREDICTOR:
        from dn_detr_jax.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_PREDICTOR])
