"""Scenes of the toy pipeline and the English that describes them.

A `Scene` is what a clip shows; `describe` words it. The wording is drawn at random from a small grammar, from two words
("seven, left") up to some fifty tokens. One wording in ten is held out of training (`is_held_out`), by a checksum of
the text, so that the evaluation asks with sentences that the model has never seen.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MOTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "upper left": (-1, -1),
    "upper right": (1, -1),
    "lower left": (-1, 1),
    "lower right": (1, 1),
    "still": (0, 0),
}
"""Name of each motion and its direction (x to the right, y downwards)."""

SIZES: dict[str, float] = {"small": 26.0, "medium": 32.0, "large": 38.0}
"""Side of the square that holds the digit with its margin (a tenth each side), in pixels of a 64 x 64 frame."""

SPEEDS: dict[str, float] = {"slow": 1.0, "medium": 1.4, "fast": 1.8}
"""Pixels per frame along the larger axis of the motion."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.25, 0.2),
    "green": (0.25, 0.9, 0.3),
    "blue": (0.3, 0.5, 1.0),
    "yellow": (1.0, 0.85, 0.2),
}

BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.0, 0.0, 0.0),
    "gray": (0.25, 0.25, 0.25),
    "navy": (0.05, 0.07, 0.3),
}

_DIRECTIONS: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "left", "leftwards", "toward the left side"),
    "right": ("to the right", "right", "rightwards", "toward the right side"),
    "up": ("up", "upwards", "to the top", "toward the top"),
    "down": ("down", "downwards", "to the bottom", "toward the bottom"),
    "upper left": ("to the upper left", "up and to the left", "toward the upper left corner"),
    "upper right": ("to the upper right", "up and to the right", "toward the upper right corner"),
    "lower left": ("to the lower left", "down and to the left", "toward the lower left corner"),
    "lower right": ("to the lower right", "down and to the right", "toward the lower right corner"),
}
_STILL = ("standing still", "that does not move", "staying in place", "at rest")
_VERBS = ("moving", "moving", "drifting", "sliding", "gliding", "that moves", "going")
_OPENERS = ("", "", "a video of", "a short clip of", "an animation of", "footage of")
_NOUNS = ("handwritten {}", "handwritten {}", "handwritten digit {}", "digit {}", "number {}", "hand drawn {}")
_SIZE_WORDS = {"small": ("small", "little"), "medium": ("",), "large": ("large", "big")}
_SPEED_WORDS = {"slow": ("slowly",), "medium": ("",), "fast": ("fast", "quickly")}
_SURFACES = ("on a {} background", "over a plain {} background", "in front of a {} wall")
_FILLERS = (
    "seen from a fixed camera",
    "in high quality",
    "the stroke is smooth and the motion is steady",
    "with soft edges and even light",
    "a clean and minimal scene with nothing else in the frame",
    "drawn with a thick pen in a single stroke",
)


@dataclass(frozen=True)
class Scene:
    """What one clip shows. Every attribute but the digit and the motion has a default that goes without saying."""

    digit: int
    motion: str
    size: str = "medium"
    speed: str = "medium"
    colour: str = "white"
    background: str = "black"


def sample_scene(rng: random.Random) -> Scene:
    """A random scene; each optional attribute keeps its default in about half of the draws."""

    def maybe(options: dict, default: str) -> str:
        return rng.choice(tuple(options)) if rng.random() < 0.5 else default

    motion = rng.choice(tuple(MOTIONS))
    return Scene(
        digit=rng.randrange(10),
        motion=motion,
        size=maybe(SIZES, "medium"),
        speed="medium" if motion == "still" else maybe(SPEEDS, "medium"),
        colour=maybe(COLOURS, "white"),
        background=maybe(BACKGROUNDS, "black"),
    )


def describe(scene: Scene, rng: random.Random) -> str:
    """One random wording of `scene`, in lower case. Attributes at their default are usually left out."""
    name = rng.choice((str(scene.digit), WORDS[scene.digit]))
    plain = scene == Scene(scene.digit, scene.motion)
    if plain and rng.random() < 0.08:
        return f"{name}, {scene.motion}"
    adjectives = [rng.choice(_SIZE_WORDS[scene.size]), _unless_default(scene.colour, "white", rng)]
    noun = " ".join(word for word in (*adjectives, rng.choice(_NOUNS).format(name)) if word)
    sentence = [rng.choice(_OPENERS), "a", noun, _movement(scene, rng), _surface(scene, rng)]
    fillers = rng.sample(_FILLERS, k=rng.choices((0, 1, 2, 3), weights=(6, 2, 1, 1))[0])
    return ", ".join([" ".join(part for part in sentence if part), *fillers])


def _unless_default(value: str, default: str, rng: random.Random) -> str:
    return "" if value == default and rng.random() < 0.8 else value


def _movement(scene: Scene, rng: random.Random) -> str:
    if scene.motion == "still":
        return rng.choice(_STILL)
    words = [rng.choice(_VERBS), rng.choice(_SPEED_WORDS[scene.speed]), rng.choice(_DIRECTIONS[scene.motion])]
    return " ".join(word for word in words if word)


def _surface(scene: Scene, rng: random.Random) -> str:
    background = _unless_default(scene.background, "black", rng)
    return rng.choice(_SURFACES).format(background) if background else ""


def is_held_out(text: str) -> bool:
    """Whether a wording is kept for the evaluation: one in ten, by its CRC-32."""
    return zlib.crc32(text.encode()) % 10 == 0


def sample_prompts(count: int, seed: int, held_out: bool = False) -> list[tuple[Scene, str]]:
    """`count` scenes with one wording each, all from training (`held_out=False`) or all from the held-out tenth."""
    rng = random.Random(seed)
    pairs: list[tuple[Scene, str]] = []
    while len(pairs) < count:
        scene = sample_scene(rng)
        text = describe(scene, rng)
        if is_held_out(text) == held_out:
            pairs.append((scene, text))
    return pairs


def evaluation_prompts(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Held-out wordings with digits and motions balanced: prompt i asks for digit i mod 10, motions in turn."""
    rng = random.Random(seed)
    motions = tuple(MOTIONS)
    pairs: list[tuple[Scene, str]] = []
    while len(pairs) < count:
        wanted = (len(pairs) % 10, motions[len(pairs) % len(motions)])
        scene = sample_scene(rng)
        text = describe(scene, rng)
        if (scene.digit, scene.motion) == wanted and is_held_out(text):
            pairs.append((scene, text))
    return pairs
