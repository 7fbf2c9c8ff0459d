"""4-bit weights in the layout of PyTorch's CPU kernel: half a byte per weight in memory.

The kernel multiplies bfloat16 rows by numbers from -8 to 7 times a bfloat16 factor per group, and
sums in float32. Numbers and factors of a `QuantizedLinear` are small integers, which bfloat16 holds
exactly: the weights are those of the file to the last bit. Inputs and sums are rounded to bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a tile. On CPUs without these instructions the kernel is slow, and has other tiles.
TILE_ROWS = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
MULTIPLIES_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
GROUP_SIZES = (32, 64, 128, 256)
FEW_ROWS = 64  # with more rows it is faster to unpack the codes first


def why_not_tiled(codes: Tensor, factors: Tensor) -> str:
    """Why the kernel cannot multiply codes (out, in) with factors (out, groups); "" if it can."""
    size = codes.shape[1] // factors.shape[1]
    if codes.device.type != "cpu":
        return f"PyTorch's kernel is for CPUs, not for {codes.device.type}"
    if not TILE_ROWS:
        return "PyTorch has no fast kernel for this CPU"
    if size not in GROUP_SIZES:
        return f"PyTorch's kernel is for groups of {GROUP_SIZES}, not of {size}"
    return ""


def to_tiles(codes: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and factors (out, groups) -> the same as the kernel takes them.

    These are tiles, uint8 (rows, in/2), and pairs of a factor and a zero, bfloat16
    (groups, rows, 2). Rows of zeros complete the last tile.
    """
    pad = -len(codes) % TILE_ROWS
    numbers = codes.unflatten(1, (factors.shape[1], -1)) / factors[..., None]  # exact
    numbers = F.pad(numbers.add_(8).flatten(1).int(), (0, 0, 0, pad))  # 0 to 15
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    factors = F.pad(factors.t(), (0, pad)).to(torch.bfloat16)  # (groups, rows)
    return tiles, torch.stack((factors, torch.zeros_like(factors)), dim=-1)


def codes_of_tiles(tiles: Tensor, factors: Tensor, d_out: int) -> Tensor:
    """The codes (out, in) that `to_tiles` was given, int8, in operations of every device.

    A byte holds one row of the tile's first half, and above it the same one of the second half.
    """
    d_in, half = 2 * tiles.shape[1], TILE_ROWS // 2
    tiles = tiles.view(-1, d_in, half)
    numbers = torch.stack((tiles & 15, tiles >> 4)).to(torch.int8) - 8  # (2, tiles, in, half)
    numbers = numbers.permute(2, 1, 0, 3).reshape(len(factors), -1, factors.shape[1])
    codes = numbers * factors[:, None, :, 0].to(torch.int8)  # (groups, size, rows)
    return codes.flatten(0, 1).t()[:d_out]


def factors_of_tiles(factors: Tensor, d_out: int) -> Tensor:
    """The factors (out, groups) that `to_tiles` was given, int8."""
    return factors[..., 0].to(torch.int8).t()[:d_out]


def tiled_product(x: Tensor, tiles: Tensor, factors: Tensor, d_out: int) -> Tensor:
    """x (rows, in), rounded to bfloat16, times the transpose of the codes: (rows, out)."""
    if len(x) <= FEW_ROWS:
        size = 2 * tiles.shape[1] // len(factors)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x.to(torch.bfloat16), tiles, size, factors)[:, :d_out]
    narrow = torch.bfloat16 if MULTIPLIES_BFLOAT16 else torch.float32
    return F.linear(x.to(narrow), codes_of_tiles(tiles, factors, d_out).to(narrow))
