"""Read generated clips: does the asked-for digit move the asked-for way?

    python evaluate.py pipeline --count 200 --device cuda --out figures

The reader sees frames only. It finds the ink (what differs from the frame's border), cuts a square around it, and asks
a support-vector machine that was trained on the *real* digits of scikit-learn, drawn and cut the same way; a clip's
digit is the class with the highest decision value, averaged over its frames. The motion is the slope of the ink's
centroid over the frames. The reader's own accuracy, on clips of real digits that neither it nor the generator was
trained on, is part of the report.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC
from torch.nn import functional

if __package__:
    from .digits import ClipRenderer, contact_sheet, split_digits, to_uint8
    from .prompts import BACKGROUNDS, COLOURS, MOTIONS, SIZES, Scene, evaluation_prompts, sample_scene
else:  # run as a script
    from digits import ClipRenderer, contact_sheet, split_digits, to_uint8
    from prompts import BACKGROUNDS, COLOURS, MOTIONS, SIZES, Scene, evaluation_prompts, sample_scene

_CROP = 16
_INK = 0.35
"""Share of the strongest contrast from which a pixel counts as ink."""
_STILL_BELOW = 0.5
"""Pixels per frame along the larger axis; the slowest motion asked for is 1.0."""
_FIRST_SEED = 900_000
"""Noise seeds of the evaluation; training draws its noise elsewhere."""


def ink_of(videos: np.ndarray) -> np.ndarray:
    """Contrast (N, T, H, W) in [0, 1] of videos (N, T, H, W, 3) of uint8 with the median colour of their border."""
    border = np.concatenate(
        [videos[:, :, 0], videos[:, :, -1], videos[:, :, :, 0], videos[:, :, :, -1]], axis=2
    ).astype(np.float32)
    ground = np.median(border, axis=(1, 2))[:, None, None, None]
    contrast = np.abs(videos.astype(np.float32) - ground).max(axis=-1)
    return contrast / np.maximum(contrast.max(axis=(1, 2, 3), keepdims=True), 1.0)


def crop_ink(ink: np.ndarray) -> np.ndarray:
    """Frames of ink (N, H, W), each cut to the square around its ink with a small margin, as (N, 256) features."""
    height, width = ink.shape[1:]
    left, right = _extent((ink > _INK).any(axis=1))
    top, bottom = _extent((ink > _INK).any(axis=2))
    half = 0.55 * np.maximum(np.maximum(right - left, bottom - top), 1)
    theta = np.zeros((len(ink), 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = 2 * half / width, (left + right) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = 2 * half / height, (top + bottom) / height - 1
    grid = functional.affine_grid(torch.from_numpy(theta), [len(ink), 1, 2 * _CROP, 2 * _CROP], align_corners=False)
    cut = functional.grid_sample(torch.from_numpy(ink).float()[:, None], grid, align_corners=False)
    return functional.avg_pool2d(cut, 2).flatten(1).numpy()


def _extent(is_inked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First inked index and one past the last, per row of (N, L); (0, L) for a row without ink."""
    return is_inked.argmax(axis=1), is_inked.shape[1] - is_inked[:, ::-1].argmax(axis=1)


def track(ink: np.ndarray) -> np.ndarray:
    """Velocity (x, y) in pixels per frame: the least-squares slope of the centroid of ink (T, H, W)."""
    weight = np.where(ink > _INK, ink, 0.0)
    mass = weight.sum(axis=(1, 2))
    seen = np.flatnonzero(mass > 0)
    if len(seen) < 2:
        return np.zeros(2)
    y = (weight.sum(axis=2) @ np.arange(ink.shape[1]))[seen] / mass[seen]
    x = (weight.sum(axis=1) @ np.arange(ink.shape[2]))[seen] / mass[seen]
    return np.array([np.polyfit(seen, x, 1)[0], np.polyfit(seen, y, 1)[0]])


def name_motion(velocity: np.ndarray) -> str:
    """The motion whose direction is nearest to `velocity`, or "still"."""
    if np.abs(velocity).max() < _STILL_BELOW:
        return "still"
    directions = {name: np.array(axes) / np.hypot(*axes) for name, axes in MOTIONS.items() if name != "still"}
    return max(directions, key=lambda name: float(directions[name] @ velocity))


def _nearest(colour: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str:
    return min(palette, key=lambda name: float(np.abs(colour - np.array(palette[name])).sum()))


@dataclass(frozen=True)
class Reading:
    """What the reader saw in one clip. `frames` is the digit read in each frame, `velocity` in pixels per frame."""

    digit: int
    motion: str
    colour: str
    background: str
    frames: list[int]
    velocity: tuple[float, float]


class Reader:
    """Reads digits and motions from clips; trained on real digits when made.

    Attributes:
        accuracy: share of clips of held-out real digits in which it reads the digit, and the motion, correctly.
    """

    def __init__(self, seed: int = 0) -> None:
        train_images, test_images, train_labels, test_labels = split_digits()
        rng = random.Random(seed)
        frames, labels = _frames_of_real_digits(train_images, train_labels, rng)
        self._svm = SVC(C=10.0, gamma="scale").fit(frames, labels)
        self.accuracy = self._accuracy_on(ClipRenderer(test_images, test_labels), rng)

    def read(self, videos: np.ndarray) -> list[Reading]:
        """Read videos (N, T, H, W, 3) of uint8."""
        ink = ink_of(videos)
        crops = crop_ink(ink.reshape(-1, *ink.shape[2:]))
        votes = self._svm.decision_function(crops).reshape(len(videos), videos.shape[1], -1)
        return [_reading(*parts) for parts in zip(videos, ink, votes, strict=True)]

    def _accuracy_on(self, renderer: ClipRenderer, rng: random.Random, count: int = 400) -> dict[str, float]:
        scenes = [sample_scene(rng) for _ in range(count)]
        return score(scenes, self.read(to_uint8(renderer.render(scenes, rng))))


def _frames_of_real_digits(
    images: np.ndarray, labels: np.ndarray, rng: random.Random, copies: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Crops of real digits, each drawn at `copies` random sizes and places: (N * copies, 256) and their classes."""
    renderer = ClipRenderer(images, labels)
    glyphs = np.tile(np.arange(len(images)), copies)
    crops = []
    for chunk in np.array_split(glyphs, math.ceil(len(glyphs) / 256)):
        scenes = [Scene(int(labels[glyph]), "still", size=rng.choice(tuple(SIZES))) for glyph in chunk]
        clips = renderer.render(scenes, rng, glyphs=chunk.tolist())
        crops.append(crop_ink(ink_of(to_uint8(clips[:, :, :1]))[:, 0]))
    return np.concatenate(crops), labels[glyphs]


def _reading(video: np.ndarray, ink: np.ndarray, votes: np.ndarray) -> Reading:
    velocity = track(ink)
    strong, weak = ink > 0.8, ink < 0.05
    colour = video[strong].mean(axis=0) / 255 if strong.any() else np.zeros(3)
    background = video[weak].mean(axis=0) / 255 if weak.any() else np.zeros(3)
    return Reading(
        digit=int(votes.mean(axis=0).argmax()),
        motion=name_motion(velocity),
        colour=_nearest(colour, COLOURS),
        background=_nearest(background, BACKGROUNDS),
        frames=votes.argmax(axis=1).tolist(),
        velocity=(float(velocity[0]), float(velocity[1])),
    )


def score(scenes: list[Scene], readings: list[Reading]) -> dict[str, float]:
    """Shares of clips that are right in each respect, in [0, 1]; `digit_per_frame` counts frames."""
    pairs = list(zip(scenes, readings, strict=True))

    def share(is_right: Callable[[Scene, Reading], bool | float]) -> float:
        return round(float(np.mean([is_right(*pair) for pair in pairs])), 4)

    return {
        "digit": share(lambda scene, seen: seen.digit == scene.digit),
        "motion": share(lambda scene, seen: seen.motion == scene.motion),
        "digit_and_motion": share(lambda scene, seen: (seen.digit, seen.motion) == (scene.digit, scene.motion)),
        "digit_per_frame": share(lambda scene, seen: float(np.mean([digit == scene.digit for digit in seen.frames]))),
        "colour": share(lambda scene, seen: seen.colour == scene.colour),
        "background": share(lambda scene, seen: seen.background == scene.background),
    }


def generate(
    pipe: Any, prompts: list[str], first_seed: int, steps: int = 30, batch: int = 8
) -> tuple[np.ndarray, list[float]]:
    """Videos (N, 17, 64, 64, 3) of uint8 from a `HunyuanVideoPipeline`, and the seconds of each batch.

    Noise comes from CPU generators seeded `first_seed + i`, so that every device starts from the same noise.
    """
    videos, seconds = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(first_seed + start + offset) for offset in range(len(part))]
        began = time.perf_counter()
        frames = pipe(
            prompt=part,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=steps,
            generator=seeds,
            output_type="np",
        ).frames
        seconds.append(round(time.perf_counter() - began, 3))
        videos.append((np.asarray(frames) * 255).round().astype(np.uint8))
        print(f"generated {start + len(part)}/{len(prompts)} clips, {seconds[-1]:.1f} s", flush=True)
    return np.concatenate(videos), seconds


def evaluate(pipe: Any, out: Path, count: int = 200, batch: int = 8, steps: int = 30, seed: int = 1) -> dict[str, Any]:
    """Generate `count` held-out clips, read them, write figures.json and contact_sheet.png into `out`; the figures."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = evaluation_prompts(count, seed)
    pipe.set_progress_bar_config(disable=True)
    videos, seconds = generate(pipe, [text for _, text in pairs], _FIRST_SEED, steps, batch)
    reader = Reader()
    readings = reader.read(videos)
    scenes = [scene for scene, _ in pairs]
    figures = {
        "count": count,
        "steps": steps,
        "generated": score(scenes, readings),
        "real_held_out_digits": reader.accuracy,
        "digit_by_class": {str(d): _share_of_digit(d, scenes, readings) for d in range(10)},
        "motion_by_class": {motion: _share_of_motion(motion, scenes, readings) for motion in MOTIONS},
        "seconds_per_batch": seconds,
        "batch": batch,
        "device": _device_name(pipe.device),
        "torch": torch.__version__,
        "wrong": [
            {"clip": i, "prompt": text, "read": f"{seen.digit}, {seen.motion}", "frames": seen.frames}
            for i, ((scene, text), seen) in enumerate(zip(pairs, readings, strict=True))
            if (seen.digit, seen.motion) != (scene.digit, scene.motion)
        ],
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    Image.fromarray(contact_sheet(videos[:40])).save(out / "contact_sheet.png")
    save_gif(videos[:20], out / "samples.gif")
    return figures


def _share_of_digit(digit: int, scenes: list[Scene], readings: list[Reading]) -> float:
    right = [seen.digit == digit for scene, seen in zip(scenes, readings, strict=True) if scene.digit == digit]
    return round(float(np.mean(right)), 4) if right else float("nan")


def _share_of_motion(motion: str, scenes: list[Scene], readings: list[Reading]) -> float:
    right = [seen.motion == motion for scene, seen in zip(scenes, readings, strict=True) if scene.motion == motion]
    return round(float(np.mean(right)), 4) if right else float("nan")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"


def save_gif(videos: np.ndarray, path: Path, columns: int = 5) -> None:
    """One animated picture of videos (N, T, H, W, 3) in full rows, at 8 frames a second, doubled in size."""
    columns = min(columns, len(videos))
    rows = len(videos) // columns
    grid = videos[: rows * columns].reshape(rows, columns, *videos.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
    sheets = grid.reshape(videos.shape[1], rows * videos.shape[2], columns * videos.shape[3], 3)
    frames = [Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0])) for sheet in sheets]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="directory of a HunyuanVideoPipeline")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for figures.json and the pictures")
    parser.add_argument("--count", type=int, default=200, help="clips to generate (default: 200)")
    parser.add_argument("--batch", type=int, default=8, help="prompts per pipeline call (default: 8)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="draws the prompts (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--accelerate", action="store_true", help="generate through para_kernels' attention")
    parser.add_argument("--cache", type=float, help="with --accelerate: First Block Cache at this threshold")
    arguments = parser.parse_args()
    from diffusers import HunyuanVideoPipeline

    pipe = HunyuanVideoPipeline.from_pretrained(arguments.pipeline).to(arguments.device)
    if arguments.accelerate or arguments.cache is not None:
        from para_kernels.integrations.diffusers import accelerate

        accelerate(pipe, cache=arguments.cache)
    figures = evaluate(pipe, arguments.out, arguments.count, arguments.batch, arguments.steps, arguments.seed)
    print(json.dumps({key: figures[key] for key in ("generated", "real_held_out_digits")}, indent=1))


if __name__ == "__main__":
    main()
