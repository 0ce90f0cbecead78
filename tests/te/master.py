"""Stand-ins for the casts of main weights to FP8 weights, sharded over ranks."""

import torch
import torch.nn.functional as F

from tests.te.quantize import BLOCK, EXPONENT
from tests.te.rules import refuse

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def compute_amax(master, amax):
    """Write the largest value of this rank's part."""
    amax.copy_(master.abs().max())


def fp8_block_scaling_compute_partial_amax(master, amax, h, w, start, block_len):
    """Write the largest value of each block within this rank's part."""
    refuse("blocks of 128", block_len == BLOCK)
    refuse("main weights are flat", master.dim() == 1)
    largest = _blocks(_placed(master, h, w, start)).abs().amax(dim=(1, 3))
    # A row of scales is padded to four of them.
    amax.copy_(F.pad(largest, (0, amax.shape[1] - largest.shape[1])))


def multi_tensor_compute_scale_and_scale_inv(chunk, noop, lists, largest, pow2, epsilon):
    """Write the scales that map each largest value to the largest of FP8, and their inverses."""
    for amax, scale, inverse in zip(*lists, strict=True):
        found = largest / amax.clamp(min=epsilon)
        if pow2:
            found = (found.view(torch.int32) & EXPONENT).view(torch.float32)
        scale.copy_(torch.where(amax == 0, torch.ones_like(found), found))
        inverse.copy_(scale.reciprocal())


def fp8_block_scaling_partial_cast(master, out, scale, h, w, start, block_len, dtype):
    """Cast this rank's part."""
    refuse("the part is as large as its place", out.numel() == master.numel())
    refuse("bytes", out.dtype == torch.uint8)
    blocks = _blocks(_placed(master, h, w, start))
    scaled = blocks * scale[:, None, : blocks.shape[2], None]
    whole = scaled.flatten(2, 3).flatten(0, 1)[:h, :w].reshape(-1).clamp(-LARGEST, LARGEST)
    part = whole[start : start + master.numel()]
    out.copy_(part.to(torch.float8_e4m3fn).view(torch.uint8))


def _placed(master, h, w, start):
    return F.pad(master.float(), (start, h * w - start - master.numel())).view(h, w)


def _blocks(values):
    h, w = values.shape
    padded = F.pad(values, (0, -w % BLOCK, 0, -h % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
