"""From the names a user types (model, device, dtype) to a pipeline in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from .toy import TOY_PIPELINE

TOY = "toy"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model was made for: size in pixels, number of frames and steps, embedded guidance, frames per second."""

    height: int
    width: int
    num_frames: int
    steps: int
    guidance: float
    fps: int
    zoom: int


TOY_DEFAULTS = GenerationDefaults(height=64, width=64, num_frames=17, steps=30, guidance=6.0, fps=8, zoom=4)
HUNYUAN_VIDEO_DEFAULTS = GenerationDefaults(
    height=720, width=1280, num_frames=129, steps=50, guidance=6.0, fps=24, zoom=1
)


def defaults_for(model: str) -> GenerationDefaults:
    """The toy's own size for the toy, HunyuanVideo's published one for every other model."""
    is_toy = model == TOY or (Path(model).is_dir() and Path(model).resolve() == TOY_PIPELINE.resolve())
    return TOY_DEFAULTS if is_toy else HUNYUAN_VIDEO_DEFAULTS


def resolve_device(name: str) -> torch.device:
    """``auto`` (the first GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:INDEX``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r}; must be auto, cpu, cuda or cuda:INDEX") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r}; must be auto, cpu, cuda or cuda:INDEX")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` (bf16 on a GPU, fp32 on the CPU), ``fp32``, ``bf16`` or ``fp16``."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype: {name!r}; must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype, revision: str | None = None) -> Any:
    """Load a diffusers pipeline and move it to `device`.

    Args:
        model: ``toy`` for the pipeline that ships with the package, a directory that holds a ``model_index.json``,
            or a Hugging Face id such as ``hunyuanvideo-community/HunyuanVideo``.
        device: where the weights go.
        dtype: of the weights.
        revision: branch, tag or commit on the Hugging Face hub.

    Raises:
        ValueError: no such model, or it cannot be loaded.
    """
    source = model_source(model, revision)
    try:
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, revision=revision)
    except Exception as error:  # A download or a directory can be broken in any way; the chain is kept.
        raise ValueError(f"model: {model!r} could not be loaded: {_root_cause(error)}") from error
    return pipe.to(device)


def model_source(model: str, revision: str | None = None) -> str:
    """The path or hub id that `model` stands for, after the checks that need no network."""
    path = TOY_PIPELINE if model == TOY else Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"model: {str(path)!r} holds no model_index.json, so it is not a diffusers pipeline")
        if revision is not None:
            raise ValueError(f"revision: {revision!r}; a directory has none, only an id on the Hugging Face hub has")
        return str(path)
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id:
        raise ValueError(
            f"model: {model!r} is not a directory; give 'toy', a pipeline's directory or a Hugging Face id OWNER/NAME"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Failures are reported once, by the exception; and `torch_dtype` is what every supported diffusers understands."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def _root_cause(error: BaseException) -> str:
    """The first line of the exception that started the chain: the ones above it tell the same at length."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
