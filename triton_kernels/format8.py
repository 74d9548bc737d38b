"""What 8-bit keys, queries and values look like: the numbers and the rotation that kernels and operators share.

Needs no Triton.
"""

from __future__ import annotations

import functools

import torch

Q_BLOCK = 64
# Keys that share a scale.
K_BLOCK = 128
# Of each block of keys so many rows are looked at for the mean that they lose. Any mean is right, softmax does not see
# it; it only has to be near enough.
K_SAMPLE = 16
HIGHEST_INT8 = 127.0
HIGHEST_E4M3 = 448.0
# Of a channel's values in e4m3: so many scales within an octave are tried, on so many rows.
SCALES_TRIED = 16
SCALES_FROM = 512
# Of a sample's keys at most so many groups, all of the same size but the last, give their largest one: what its values
# lack in e4m3 is multiplied by the same weights. Where tails are heavy, few keys decide, and these are among them.
LARGEST_KEYS = 512
LEAST_HEAD_DIM = 64
_WIDEST_ROTATION = 128


def padded_head_dim(head_dim: int) -> int:
    """D': a power of two."""
    return max(LEAST_HEAD_DIM, 1 << (head_dim - 1).bit_length())


def rows_of_largest(rows: int) -> int:
    """How many rows behind those of the keys are kept for the largest ones: whole blocks."""
    return min(LARGEST_KEYS, -(-rows // K_BLOCK) * K_BLOCK)


def rotation_width(head_dim: int) -> int:
    """Of so many channels each part of a query or key is rotated."""
    return min(padded_head_dim(head_dim), _WIDEST_ROTATION)


@functools.cache
def rotation(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(width, width) of 1 and -1: a Hadamard matrix with its rows' signs at random. Over sqrt(width) it is orthogonal.

    Queries and keys that are both rotated have the same products, and no channel, and no entry of a heavy tail, alone
    decides about a scale (Ashkboos et al. 2024, QuaRot, arXiv 2404.00456, section 3; Shah et al. 2024,
    FlashAttention-3, arXiv 2407.08608, section 3.3).
    """
    with torch.inference_mode(False), torch.device("cpu"):  # It is kept, whatever mode and device are the default now.
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < width:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        signs = torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
        return (signs * matrix).to(device, dtype)
