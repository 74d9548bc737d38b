"""Text to video with one pipeline: the request, its checks, the timed call."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from para_kernels import ContextParallel, FirstBlockCache

from .accelerate import accelerate, apply_cache_on_pipe
from .handle import Handle
from .linears import LINEARS, check_torchao
from .loading import load_pipeline
from .processes import is_first, joined
from .vae import ParallelVae, parallelize_vae
from .video import check_video, make_folder, write_video

ATTENTION = ("exact", "int8", "stock")
SPATIAL_MULTIPLE = 16  # the VAE halves three times and the transformer takes patches of two
MAX_SEED = 2**63 - 1
TEMPORAL_MULTIPLE = 4  # the VAE keeps the first frame and makes one latent frame of every four after it


@dataclass(frozen=True)
class Request:
    """What to generate. Prompt number i of the batch starts from noise of its own seed, ``seed + i``: it gives the same
    video alone and in any batch."""

    prompts: tuple[str, ...]
    height: int
    width: int
    num_frames: int
    steps: int
    guidance: float
    seed: int = 0
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0

    def check(self) -> None:
        """Raise a ValueError that names the first bad field."""
        if not self.prompts or any(not prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompt: {list(self.prompts)}; give at least one, none of them empty")
        for name, value in (("height", self.height), ("width", self.width)):
            if value < SPATIAL_MULTIPLE or value % SPATIAL_MULTIPLE:
                raise ValueError(f"{name}: {value}; must be a positive multiple of {SPATIAL_MULTIPLE}")
        if self.num_frames < 1 or (self.num_frames - 1) % TEMPORAL_MULTIPLE:
            raise ValueError(
                f"frames: {self.num_frames}; must be a multiple of {TEMPORAL_MULTIPLE} plus one (1, 5, 9, 13, 17, ...)"
            )
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps}; must be at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: {self.seed}; must be 0 ... {MAX_SEED}")
        if not math.isfinite(self.guidance) or not math.isfinite(self.true_cfg_scale):
            raise ValueError(f"guidance, cfg: {self.guidance}, {self.true_cfg_scale}; must be finite numbers")
        if self.negative_prompt is not None and self.true_cfg_scale <= 1.0:
            raise ValueError(f"negative-prompt: has no effect with cfg {self.true_cfg_scale}; give a cfg above 1")


@dataclass(frozen=True)
class Acceleration:
    """Which of the package's parts run under the pipeline.

    Attributes:
        attention: ``exact`` swaps in this package's attention, ``int8`` its attention in 8 bits, ``stock`` leaves
            diffusers' own.
        cache: First Block Cache threshold; True for the model family's default, None for no cache.
        warmup_steps: steps that are always computed at the start.
        max_consecutive_hits: reused steps in a row after which one is computed; None for no limit.
        parallel: how the work is spread over the ranks of the world; None for one process.
        parallel_vae: with `parallel`, whether the ranks share out the VAE's tiles too. Turns tiling on.
        compile: whether the transformer's blocks are compiled.
        linears: ``fp8`` or ``fp8-weight-only`` for linears in FP8, None for none.
        graphs: whether forwards are recorded as CUDA graphs.
    """

    attention: str = "exact"
    cache: float | bool | None = None
    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    parallel: ContextParallel | None = None
    parallel_vae: bool = True
    compile: bool = False
    linears: str | None = None
    graphs: bool = False

    def check(self) -> None:
        """Raise a ValueError that names the first bad field, before a model is loaded."""
        if self.attention not in ATTENTION:
            raise ValueError(f"attention: {self.attention!r}; must be one of {', '.join(ATTENTION)}")
        if self.parallel is not None and self.attention == "stock":
            raise ValueError(f"attention: {self.attention!r}; must be exact or int8 on several ranks")
        if self.compile and self.attention == "stock":
            raise ValueError(f"attention: {self.attention!r}; must be exact or int8 with compile")
        if self.graphs and self.attention == "stock":
            raise ValueError(f"attention: {self.attention!r}; must be exact or int8 with graphs")
        if self.linears is not None:
            self._check_linears()
        # True stands for a threshold that only the model's family knows; any valid one lets the others be checked.
        threshold = 0.0 if self.cache is None or self.cache is True else self.cache
        FirstBlockCache(threshold, warmup_steps=self.warmup_steps, max_consecutive_hits=self.max_consecutive_hits)
        if self.cache is None and (self.warmup_steps or self.max_consecutive_hits is not None):
            raise ValueError(
                "warmup-steps, max-consecutive-hits: have no effect without a cache; give a cache threshold"
            )

    def install(self, pipe: Any) -> Handle:
        """Put the parts under `pipe`. With neither of them the handle still reports the steps."""
        self.check()
        if self.attention != "stock":
            handle = accelerate(
                pipe,
                cache=None,
                attention=self.attention,
                parallel=self.parallel,
                compile=self.compile,
                linears=self.linears,
                graphs=self.graphs,
            )
            if self.cache is None:
                return handle
        return apply_cache_on_pipe(
            pipe,
            self._threshold(),
            warmup_steps=self.warmup_steps,
            max_consecutive_hits=self.max_consecutive_hits,
        )

    def install_vae(self, pipe: Any) -> ParallelVae | None:
        """Share the VAE's tiles out over all ranks, where that is wanted. Neither installation depends on the other:
        they may be put on and removed in any order."""
        if self.parallel is None or not self.parallel_vae:
            return None
        return parallelize_vae(pipe.vae, timeout=self.parallel.timeout)

    def _check_linears(self) -> None:
        if self.linears not in LINEARS:
            raise ValueError(f"linears: {self.linears!r}; must be one of {', '.join(LINEARS)}")
        if self.attention == "stock":
            raise ValueError(f"attention: {self.attention!r}; must be exact or int8 with linears {self.linears}")
        check_torchao()

    def _threshold(self) -> float | None:
        """As `apply_cache_on_pipe` takes it: 0 for no cache, None for the family's default."""
        if self.cache is None:
            return 0.0
        return None if self.cache is True else self.cache


@dataclass(frozen=True)
class Generation:
    """Videos (prompts, frames, height, width, 3) in [0, 1], and the wall time of the pipeline call in seconds."""

    videos: np.ndarray
    seconds: float


def generate(pipe: Any, request: Request) -> Generation:
    """Run the pipeline once on all prompts as one batch."""
    request.check()
    device = pipe._execution_device
    _synchronize(device)
    start = time.perf_counter()
    videos = pipe(
        prompt=list(request.prompts),
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=_generators(request),
        output_type="np",
        **_classifier_free_guidance(request),
    ).frames
    _synchronize(device)
    return Generation(videos=np.asarray(videos), seconds=time.perf_counter() - start)


def _classifier_free_guidance(request: Request) -> dict[str, Any]:
    if request.true_cfg_scale <= 1.0:
        return {}
    # The pipeline does not repeat a single negative prompt over a batch.
    negative = [request.negative_prompt or ""] * len(request.prompts)
    return {"negative_prompt": negative, "true_cfg_scale": request.true_cfg_scale}


def _generators(request: Request) -> list[torch.Generator]:
    # Always the CPU's generator, so that a seed means the same noise on every device.
    return [torch.Generator("cpu").manual_seed(request.seed + i) for i in range(len(request.prompts))]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class GenerateJob:
    """The ``generate`` command: where the pipeline comes from, what to make, where to write it."""

    model: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    request: Request
    acceleration: Acceleration
    batched: bool
    output: Path
    fps: int
    zoom: int


def run(job: GenerateJob) -> None:
    """Generate, write one video per prompt, print what was written and the step summary; on rank 0 alone."""
    job.request.check()
    job.acceleration.check()
    check_video(job.output, job.fps, job.zoom)
    if is_first():
        make_folder(job.output.parent)
    with joined(job.device, job.acceleration.parallel):
        pipe = load_pipeline(job.model, job.device, job.dtype, job.revision)
        handle = job.acceleration.install(pipe)
        vae = job.acceleration.install_vae(pipe)
        paths = output_paths(job.output, len(job.request.prompts))
        for request, request_paths in _calls(job.request, paths, job.batched):
            generation = generate(pipe, request)
            if is_first():
                _write(job, request, generation, request_paths)
                print(handle.summary())
                if vae is not None:
                    print(f"\n{vae.summary()}")


def _write(job: GenerateJob, request: Request, generation: Generation, paths: list[Path]) -> None:
    for path, prompt, video in zip(paths, request.prompts, generation.videos, strict=True):
        write_video(path, video, job.fps, job.zoom)
        print(f"{path}  {prompt!r}")
    print(f"\n{generation.seconds:.2f} s for {len(request.prompts)} video(s), {request.steps} steps\n")


def output_paths(output: Path, count: int) -> list[Path]:
    """`output` itself for one video, else ``NAME-1.mp4``, ``NAME-2.mp4``, ...; or with its other ending."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i + 1}{output.suffix}") for i in range(count)]


def _calls(request: Request, paths: list[Path], batched: bool) -> list[tuple[Request, list[Path]]]:
    """One call for the batch, or one call per prompt with the noise it would have had in the batch."""
    if batched:
        return [(request, paths)]
    return [
        (replace(request, prompts=(prompt,), seed=request.seed + i), [path])
        for i, (prompt, path) in enumerate(zip(request.prompts, paths, strict=True))
    ]
