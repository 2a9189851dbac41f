"""DN-DETR (query denoising on DAB-DETR) in JAX and Flax, for TPU, GPU and CPU."""

__version__ = "0.1.0"
