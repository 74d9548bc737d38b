"""Writing videos to files: mp4 to be looked at, npy with the very numbers, to be compared.

Frames are float arrays of shape (frames, height, width, 3) with values in [0, 1].
"""

from __future__ import annotations

import os
from pathlib import Path

import imageio_ffmpeg
import numpy as np

ENDINGS = (".mp4", ".npy")
MP4_QUALITY = 8  # imageio-ffmpeg's scale of 0 (worst) to 10: no visible blocks in small synthetic frames


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to 0..255, rounded to nearest; values outside are clipped."""
    return (np.clip(frames, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def enlarge(frames: np.ndarray, zoom: int) -> np.ndarray:
    """Each pixel becomes a square of `zoom` x `zoom` pixels (nearest neighbour); `zoom` 1 changes nothing."""
    return frames.repeat(zoom, axis=1).repeat(zoom, axis=2)


def check_video(path: Path, fps: int, zoom: int) -> None:
    """Raise a ValueError if no video can be written like this: wrong ending, or `fps` or `zoom` below 1."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"output: {str(path)!r}; must end in {' or '.join(ENDINGS)}")
    if fps < 1:
        raise ValueError(f"fps: {fps}; must be at least 1")
    if zoom < 1:
        raise ValueError(f"zoom: {zoom}; must be a whole number of at least 1")


def make_folder(folder: Path) -> None:
    """Create `folder`, or raise a ValueError that says why nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: folder {str(folder)!r} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output: folder {str(folder)!r} is not writable")


def write_video(path: Path, frames: np.ndarray, fps: int, zoom: int = 1) -> None:
    """Write one video as the path's ending says: by `write_mp4`, or by `write_npy`, which needs no `fps` and no `zoom`.

    Raises:
        ValueError: what they refuse.
    """
    if path.suffix == ".npy":
        write_npy(path, frames)
    else:
        write_mp4(path, frames, fps, zoom)


def write_npy(path: Path, frames: np.ndarray) -> None:
    """Write one video as a float32 array in NumPy's format (`numpy.load`): values as they are, nothing is clipped.

    Args:
        path: file to write, ending in `.npy`, in a folder that exists.
        frames: (frames, height, width, 3), float.

    Raises:
        ValueError: `frames` of another shape, or another ending.
    """
    if path.suffix != ".npy":
        raise ValueError(f"output: {str(path)!r}; must end in .npy")
    _check_frames(frames)
    np.save(path, frames.astype(np.float32, copy=False), allow_pickle=False)


def _check_frames(frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: shape {frames.shape}; must be (frames, height, width, 3)")


def write_mp4(path: Path, frames: np.ndarray, fps: int, zoom: int = 1) -> None:
    """Write one video as H.264, each pixel enlarged `zoom` times.

    Args:
        path: file to write, ending in `.mp4`, in a folder that exists.
        frames: (frames, height, width, 3), float in [0, 1].
        fps: frames per second.
        zoom: whole factor of enlargement, for small videos.

    Raises:
        ValueError: `frames` of another shape, or what `check_video` refuses.
    """
    check_video(path, fps, zoom)
    if path.suffix != ".mp4":
        raise ValueError(f"output: {str(path)!r}; must end in .mp4")
    _check_frames(frames)
    pixels = enlarge(to_uint8(frames), zoom)
    height, width = pixels.shape[1:3]
    # 4:2:0 chroma needs even sides, nothing more: keep ffmpeg from rescaling to multiples of 16.
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, quality=MP4_QUALITY, codec="libx264", macro_block_size=2
    )
    writer.send(None)
    for frame in pixels:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
