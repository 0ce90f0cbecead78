"""Peak rates of matrix products: published ones of GPUs, and a measured one of this CPU.

GPU rates are dense (without structured sparsity) and accumulate in float32, as training does.
Data sheets often print only the sparse rate, which is twice the dense one. Importing this module
does not load torch.
"""

import functools
import math
import re
import time
from dataclasses import dataclass

TERA = 1e12
MEASURED_SECONDS, LEAST_PRODUCTS = 0.05, 3  # of the measurement
CPU_SIZE = 256  # rows and columns of the measured matrices for one thread
# Words of names with another chip, or a part of one.
OTHER_CHIPS = {"laptop", "mig", "max", "d", "ti", "super", "cnx"}


@dataclass(frozen=True)
class Rate:
    """A rate of matrix products, with its source."""

    flops: float  # per second, of one device
    text: str  # for instance "H100 SXM bf16 dense peak 989 TFLOP/s, published"


@dataclass(frozen=True)
class Gpu:
    """Published rates of a GPU in TFLOP/s; None: its tensor cores lack the format."""

    name: str
    words: str  # all of them are in the name that the driver gives
    bf16: float
    fp8: float | None
    tf32: float
    fp32: float  # without tensor cores

    def rate(self, precision: str) -> Rate | None:
        """Return the rate of a precision, or None if the GPU has none."""
        tera = getattr(self, precision)
        if tera is None:
            return None
        text = f"{self.name} {precision} dense peak {tera:g} TFLOP/s, published"
        return Rate(tera * TERA, text)


GPUS = (
    # NVIDIA A100 Tensor Core GPU data sheet; the A800 differs in NVLink only.
    Gpu("A100", "a100", 312, None, 156, 19.5),
    Gpu("A800", "a800", 312, None, 156, 19.5),
    # NVIDIA A10 data sheet.
    Gpu("A10", "a10", 125, None, 62.5, 31.2),
    # NVIDIA A40 data sheet.
    Gpu("A40", "a40", 149.7, None, 74.8, 37.4),
    # NVIDIA Ampere GA102 architecture whitepaper, appendices on RTX A6000 and GeForce RTX 3090.
    Gpu("RTX A6000", "rtx a6000", 154.8, None, 77.4, 38.7),
    Gpu("RTX 3090", "rtx 3090", 71, None, 35.6, 35.6),
    # NVIDIA H100 Tensor Core GPU architecture whitepaper, table 2 (SXM5 and PCIe).
    Gpu("H100 SXM", "h100", 989, 1979, 494.7, 66.9),
    Gpu("H100 PCIe", "h100 pcie", 756, 1513, 378, 51.2),
    # NVIDIA H100 data sheet, column H100 NVL; half of its sparse rates.
    Gpu("H100 NVL", "h100 nvl", 835.5, 1671, 417.5, 60),
    # The H800 differs from the H100 in NVLink and float64 only.
    Gpu("H800 SXM", "h800", 989, 1979, 494.7, 66.9),
    Gpu("H800 PCIe", "h800 pcie", 756, 1513, 378, 51.2),
    # NVIDIA H20 data sheet.
    Gpu("H20", "h20", 148, 296, 74, 44),
    # NVIDIA H200 data sheet; half of its sparse rates.
    Gpu("H200 SXM", "h200", 989, 1979, 494.5, 67),
    Gpu("H200 NVL", "h200 nvl", 835.5, 1670.5, 417.5, 60),
    # NVIDIA GH200 Grace Hopper Superchip data sheet.
    Gpu("GH200", "gh200", 990, 1979, 494, 67),
    # NVIDIA Blackwell data sheet: an eighth of HGX B200's and B300's, and GB200's per GPU.
    Gpu("B200", "b200", 2250, 4500, 1125, 75),
    Gpu("B300", "b300", 2250, 4500, 1125, 75),
    Gpu("GB200", "gb200", 2500, 5000, 1250, 80),
    # NVIDIA L4, L40 and L40S data sheets.
    Gpu("L4", "l4", 121, 242.5, 60, 30.3),
    Gpu("L40", "l40", 181, 362, 90.5, 90.5),
    Gpu("L40S", "l40s", 362, 733, 183, 91.6),
    # NVIDIA Ada GPU architecture whitepaper, appendix A (float32 accumulation).
    Gpu("RTX 4090", "rtx 4090", 165.2, 330.3, 82.6, 82.6),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A (float32 accumulation).
    Gpu("RTX 5090", "rtx 5090", 209.5, 419, 104.8, 104.8),
    # NVIDIA RTX PRO Blackwell GPU architecture whitepaper.
    Gpu("RTX PRO 6000 Blackwell", "rtx pro 6000 blackwell", 503.8, 1007.6, 251.9, 126),
)


def published_rate(device: str, precision: str) -> Rate | None:
    """Return the published rate of a GPU, or None if this table has none.

    Args:
        device: a name as the driver gives it ("NVIDIA H100 80GB HBM3") or a short one ("h100-pcie",
            "H100 SXM"). More words of an entry beat fewer: an H100 is an SXM unless it says PCIe.
        precision: bf16, fp8, tf32 or fp32.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    if words & OTHER_CHIPS:
        return None
    found = [gpu for gpu in GPUS if words.issuperset(gpu.words.split())]
    best = max(found, key=lambda gpu: len(gpu.words.split()), default=None)
    return best.rate(precision) if best is not None else None


@functools.cache
def measured_cpu_rate(precision: str) -> Rate:
    """Measure the rate of this CPU once, with torch's present threads; about 0.1 s.

    fp8, which no CPU has, counts as bf16; tf32 as fp32.
    """
    import torch

    name = "bf16" if precision in ("bf16", "fp8") else "fp32"
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    threads = torch.get_num_threads()
    # So short that one of many products is not disturbed by other processes.
    size = CPU_SIZE * math.ceil(math.sqrt(threads))
    left = torch.ones(size, size, dtype=dtype)
    right, product, times = left.clone(), left.clone(), list[float]()
    began = time.perf_counter()
    while len(times) < LEAST_PRODUCTS or time.perf_counter() - began < MEASURED_SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        times.append(time.perf_counter() - start)
    flops = 2 * size**3 / min(times)
    cores = f"{threads} CPU thread" + ("s" if threads > 1 else "")
    return Rate(flops, f"{cores}, {name} {flops / 1e9:.0f} GFLOP/s, measured by a matrix product")


def device_rate(precision: str, *, gpu: str | None) -> Rate | None:
    """Return the rate of a rank's device: its GPU's published one, or this CPU's measured one.

    Args:
        gpu: the GPU's name (`machine.look().gpu`); None: the rank runs on the CPU.
    """
    return measured_cpu_rate(precision) if gpu is None else published_rate(gpu, precision)
