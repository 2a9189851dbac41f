"""Peak figures of accelerators, for rooflines and for the share of the peak that a step reaches.

The figures are the vendors', per chip:

- TPU: https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p-training and v6e. The pages of v5e, v5p
  and v6e give the bandwidth between chips in both directions together; a chip sends half of it. The
  page of v4 gives the all-reduce bandwidth of a pod, 1.1 PB/s for 4,096 chips; the same division
  gives half of the bidirectional bandwidth for v5e and v6e.
- GPU: NVIDIA's data sheets of the A100, H100 and H200 SXM, dense (without sparsity). A chip sends
  half of NVLink's 600 GB/s (A100) or 900 GB/s.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: usual name.
      memory: bytes.
      peak_flops: bfloat16 operations per second. float32 at jax's default precision runs on a TPU
        in bfloat16 as well.
      memory_bandwidth: bytes per second between chip and memory.
      interconnect: bytes per second that the chip sends to other chips over all its links.
    """

    name: str
    memory: float
    peak_flops: float
    memory_bandwidth: float
    interconnect: float


_V5P = Chip("TPU v5p", 95 * 2**30, 459e12, 2765e9, 600e9)

# By jax's `device_kind`.
CHIPS = {
    "TPU v4": Chip("TPU v4", 32 * 2**30, 275e12, 1200e9, 1.1e15 / 4096),
    "TPU v5 lite": Chip("TPU v5e", 16 * 2**30, 197e12, 819e9, 200e9),
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": Chip("TPU v6e", 32 * 2**30, 918e12, 1638e9, 400e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 SXM 40 GB", 40e9, 312e12, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 SXM 80 GB", 80e9, 312e12, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 80e9, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200 SXM", 141e9, 989e12, 4800e9, 450e9),
}
