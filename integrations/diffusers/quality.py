"""How far a video is from its reference: PSNR, SSIM and the largest difference.

Videos are float arrays of shape (frames, height, width, channels) with values in [0, 1], which is what a diffusers
pipeline returns for ``output_type="np"``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from skimage.metrics import structural_similarity

SSIM_WINDOW = 7  # scikit-image's default window, in pixels: no side of a frame may be shorter


@dataclass(frozen=True)
class Quality:
    """Distance of a batch of videos from its reference.

    Attributes:
        psnr: mean over the videos, in dB; ``inf`` if every value is equal.
        psnr_worst: the lowest PSNR of any one video, in dB.
        ssim: mean over all frames of all videos, 1.0 for equal frames.
        max_abs_diff: largest difference of any value, on the scale of [0, 1].
    """

    psnr: float
    psnr_worst: float
    ssim: float
    max_abs_diff: float


def psnr(reference: np.ndarray, video: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of one video, from the mean squared error over all of its frames.

    The error is pooled before the logarithm: a mean of per-frame figures would let one still frame that happens to be
    equal (infinite PSNR) hide all others.
    """
    _check_pair(reference, video)
    mean_squared_error = float(np.mean(np.square(reference.astype(np.float64) - video.astype(np.float64))))
    return math.inf if mean_squared_error == 0.0 else -10.0 * math.log10(mean_squared_error)


def ssim(reference: np.ndarray, video: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, as in scikit-image), the mean over a video's frames."""
    _check_pair(reference, video)
    return float(
        np.mean(
            [
                structural_similarity(a, b, channel_axis=-1, data_range=1.0, win_size=SSIM_WINDOW)
                for a, b in zip(reference, video, strict=True)
            ]
        )
    )


def compare(references: np.ndarray, videos: np.ndarray) -> Quality:
    """Distance of `videos` from `references`, both (videos, frames, height, width, channels)."""
    if references.ndim != 5 or references.shape != videos.shape:
        raise ValueError(
            f"videos: shape {videos.shape} and references: shape {references.shape} must be one and the same "
            "(videos, frames, height, width, channels)"
        )
    per_video = [psnr(reference, video) for reference, video in zip(references, videos, strict=True)]
    return Quality(
        psnr=float(np.mean(per_video)),
        psnr_worst=min(per_video),
        ssim=float(np.mean([ssim(reference, video) for reference, video in zip(references, videos, strict=True)])),
        max_abs_diff=float(np.abs(references.astype(np.float64) - videos.astype(np.float64)).max()),
    )


def _check_pair(reference: np.ndarray, video: np.ndarray) -> None:
    if reference.ndim != 4 or reference.shape != video.shape:
        raise ValueError(
            f"video: shape {video.shape} and reference: shape {reference.shape} must be one and the same "
            "(frames, height, width, channels)"
        )
    if min(reference.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"video: frames of {reference.shape[1:3]} pixels; no side may be below {SSIM_WINDOW}")
    for name, array in (("reference", reference), ("video", video)):
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name}: dtype {array.dtype}; must be floating point with values in [0, 1]")
