"""Moving handwritten digits: the real digits of scikit-learn, drawn smoothly into short clips, on any device.

The 1,797 digits of `sklearn.datasets.load_digits` (8 x 8, UCI Optical Recognition of Handwritten Digits) are split once
into a training part and a held-out part. Clips are rendered in batches with `grid_sample`, at sub-pixel positions.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

if __package__:
    from .prompts import BACKGROUNDS, COLOURS, MOTIONS, SIZES, SPEEDS, Scene
else:  # run as a script
    from prompts import BACKGROUNDS, COLOURS, MOTIONS, SIZES, SPEEDS, Scene

FRAMES, SIDE = 17, 64
_GLYPH_SIDE = 64
_SPLIT_SEED = 0


def split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Real digits in [0, 1]: (training images, held-out images, training labels, held-out labels), images (N, 8, 8)."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16.0
    parts = train_test_split(images, labels, test_size=0.25, random_state=_SPLIT_SEED, stratify=labels)
    train_images, held_out_images, train_labels, held_out_labels = map(np.asarray, parts)
    return train_images, held_out_images, train_labels, held_out_labels


def smooth_glyphs(images: np.ndarray) -> torch.Tensor:
    """Upscale (N, 8, 8) digits to smooth strokes (N, 64, 64) in [0, 1]: cubic splines, then a soft threshold."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    factor = _GLYPH_SIDE / padded.shape[-1]
    large = zoom(padded, (1, factor, factor), order=3, mode="grid-constant", grid_mode=True)
    ink = 1.0 / (1.0 + np.exp(-9.0 * (large - 0.42)))
    paper = 1.0 / (1.0 + np.exp(9.0 * 0.42))
    return torch.from_numpy((ink - paper) / (1.0 - paper)).float().clamp_(0, 1)


class ClipRenderer:
    """Draws scenes with digits from one part of the split.

    Args:
        images: real digits (N, 8, 8) in [0, 1].
        labels: their classes (N,).
        device: where clips are rendered.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.glyphs = smooth_glyphs(images).to(self.device)
        self._by_class = [np.flatnonzero(labels == digit).tolist() for digit in range(10)]

    def render(self, scenes: list[Scene], rng: random.Random, glyphs: list[int] | None = None) -> torch.Tensor:
        """Clips (B, 3, 17, 64, 64) in [-1, 1], float32: starting point and handwriting are drawn from `rng`.

        `glyphs` chooses the handwriting instead, as positions in `images`.
        """
        if glyphs is None:
            glyphs = [rng.choice(self._by_class[scene.digit]) for scene in scenes]
        glyph = torch.tensor(glyphs, device=self.device)
        numbers = torch.tensor([_place(scene, rng) for scene in scenes], dtype=torch.float32).to(self.device)
        start, step, size, ink, ground = numbers.split((2, 2, 1, 3, 3), dim=1)
        mask = self._masks(self.glyphs[glyph], start, step, size)[:, None]
        ink, ground = ink[:, :, None, None, None], ground[:, :, None, None, None]
        return 2.0 * (ground + mask * (ink - ground)) - 1.0

    def _masks(self, glyphs: torch.Tensor, start: torch.Tensor, step: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Coverage (B, 17, 64, 64) in [0, 1] of glyphs (B, 64, 64) whose centre goes from `start` by `step` a frame."""
        frame = torch.arange(FRAMES, device=self.device, dtype=torch.float32)
        pixel = torch.arange(SIDE, device=self.device, dtype=torch.float32) + 0.5
        centre = start[:, None] + step[:, None] * frame[None, :, None]
        local = (pixel - centre[..., None]) * (2.0 / size[:, :, None, None])
        grid = torch.stack(torch.broadcast_tensors(local[:, :, 0, None, :], local[:, :, 1, :, None]), dim=-1)
        batch = glyphs.shape[0]
        drawn = functional.grid_sample(
            glyphs[:, None], grid.reshape(batch, FRAMES * SIDE, SIDE, 2), align_corners=False
        )
        return drawn.view(batch, FRAMES, SIDE, SIDE)


def _place(scene: Scene, rng: random.Random) -> list[float]:
    """Start (x, y), step per frame (x, y), size, ink (r, g, b) and background (r, g, b) of a clip, 11 numbers."""
    size = SIZES[scene.size]
    step = [SPEEDS[scene.speed] * axis for axis in MOTIONS[scene.motion]]
    start = [_starting_point(move * (FRAMES - 1), size, rng) for move in step]
    return [*start, *step, size, *COLOURS[scene.colour], *BACKGROUNDS[scene.background]]


def _starting_point(travel: float, size: float, rng: random.Random) -> float:
    """A coordinate from which the digit's square stays inside the frame, or leaves it evenly where it cannot stay."""
    half = size / 2
    low, high = half - min(travel, 0.0), SIDE - half - max(travel, 0.0)
    return rng.uniform(low, high) if low < high else (low + high) / 2


def to_uint8(clips: torch.Tensor) -> np.ndarray:
    """Clips (B, 3, T, H, W) in [-1, 1] to frames (B, T, H, W, 3) of uint8."""
    frames = ((clips.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 4, 1).cpu().numpy()


def contact_sheet(videos: np.ndarray, picks: int = 5, columns: int = 4, gap: int = 2) -> np.ndarray:
    """Tile videos (N, T, H, W, 3) of uint8 into one picture: `picks` evenly spaced frames of each, `columns` wide."""
    chosen = np.linspace(0, videos.shape[1] - 1, picks).round().astype(int)
    frames = np.pad(videos[:, chosen], ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)), constant_values=90)
    strips = frames.transpose(0, 2, 1, 3, 4).reshape(len(videos), videos.shape[2], -1, 3)
    strips = np.pad(strips, ((0, 0), (gap, gap), (gap, 3 * gap), (0, 0)), constant_values=90)
    rows = math.ceil(len(strips) / columns)
    blank = np.full((rows * columns - len(strips), *strips.shape[1:]), 90, np.uint8)
    grid = np.concatenate([strips, blank]).reshape(rows, columns, *strips.shape[1:])
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * strips.shape[1], -1, 3)
