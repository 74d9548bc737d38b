"""One denoising step of the full-size HunyuanVideo transformer: stock diffusers against ``accelerate(pipe)``.

    python -m benchmarks.hunyuan_step --out benchmarks/results
    python -m benchmarks.hunyuan_step --small --out /tmp/step        a tiny model and video, also on a CPU
    python -m benchmarks.hunyuan_step --out /tmp/step --profile      and one more step, taken apart by kernel

The weights are random (normal, standard deviation 1 / sqrt(fan-in), so that activations stay of order one) in the
shapes of the public configuration, which is diffusers' default one: 20 dual-stream and 40 single-stream blocks, 24
heads of 128, 13 billion parameters. Speed does not depend on their values. The default video is 720 x 1280 x 129:
118,800 video tokens and 256 text tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor

from para_kernels.integrations.diffusers import accelerate

from . import step_profile
from .record import Record, write_records
from .reference import relative_error

TEXT_TOKENS = 256
SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION = 8, 4
STOCK, OURS = "diffusers", "para_kernels exact"

SMALL_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 64,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (4, 14, 14),
}


@dataclass
class Measured:
    """Of one way to run the step: seconds of each forward, peak memory in GiB, and the last output on the host."""

    seconds: list[float]
    peak_gib: float
    output: Tensor


def main() -> int:
    options = _options()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.perf_counter()
    transformer = build_transformer(SMALL_CONFIG if options.small else {}, device, dtype)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters in {time.perf_counter() - start:.1f} s", flush=True)

    full = step_inputs(transformer, options.height, options.width, options.frames, options.text, device, dtype)
    tokens = _video_tokens(transformer, full)
    measured = measure(transformer, full, options.repeats, device)
    record = _record(transformer, measured, tokens, options, dtype)
    write_records("hunyuan_step", [record], options.out)
    print(_table(measured, tokens))
    print(f"relative difference of the outputs: {record.notes['difference']:.2e}", flush=True)
    if options.profile:
        _profile(transformer, full, record, options.out, device)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON record")
    parser.add_argument("--small", action="store_true", help="a tiny model, and a tiny video unless its size is given")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: 720")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: 1280")
    parser.add_argument("--frames", type=int, metavar="N", help="default: 129")
    parser.add_argument("--text", type=int, default=120, metavar="TOKENS", help="valid ones of 256 (default: 120)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="timed forwards of each (default: 2)")
    parser.add_argument("--profile", action="store_true", help="take one more step apart, of this package")
    options = parser.parse_args()
    for name, small, full in (("height", 64, 720), ("width", 96, 1280), ("frames", 9, 129)):
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else full)
    if options.height % 16 or options.width % 16 or (options.frames - 1) % TEMPORAL_COMPRESSION:
        parser.error("height and width must be multiples of 16, frames a multiple of 4 plus 1")
    if not 1 <= options.text <= TEXT_TOKENS or options.repeats < 1:
        parser.error(f"text must be 1 ... {TEXT_TOKENS} and repeats at least 1")
    return options


def build_transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with random weights, made on `device`: nothing passes through the host."""
    with torch.device("meta"):
        transformer: Any = HunyuanVideoTransformer3DModel(**config)
    transformer = transformer.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            # Vectors are biases or the scales of normalisations.
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    assert not list(transformer.buffers()), "a buffer would be left without values"
    return transformer


def step_inputs(
    transformer: Any, height: int, width: int, frames: int, text: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments that the pipeline gives the transformer in one step, for one prompt of `text` tokens."""
    config = transformer.config
    latent = (
        config.in_channels,
        (frames - 1) // TEMPORAL_COMPRESSION + 1,
        height // SPATIAL_COMPRESSION,
        width // SPATIAL_COMPRESSION,
    )
    mask = (torch.arange(TEXT_TOKENS, device=device) < text)[None].to(dtype)
    return {
        "hidden_states": torch.randn(1, *latent, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.text_embed_dim, device=device, dtype=dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        "return_dict": False,
    }


def measure(transformer: Any, inputs: dict[str, Any], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Time both ways in turns, each warmed up on a small video."""
    pipe = _pipeline(transformer)
    small = step_inputs(transformer, 64, 96, 9, 50, device, transformer.dtype)
    measured: dict[str, Measured] = {}
    for turn in range(repeats):
        for way in (STOCK, OURS):
            handle = accelerate(pipe, cache=None) if way == OURS else None
            if turn == 0:
                _forward(transformer, small, device)
            seconds, peak, output = _forward(transformer, inputs, device)
            entry = measured.setdefault(way, Measured([], 0.0, output))
            entry.seconds.append(seconds)
            entry.peak_gib = max(entry.peak_gib, peak)
            if handle is not None:
                handle.remove()
            print(f"{way}: {seconds:.3f} s", flush=True)
    return measured


def _pipeline(transformer: Any) -> Any:
    """The pipeline around `transformer` alone, for `accelerate`."""
    pipeline: Any = HunyuanVideoPipeline  # its annotations do not say that parts may be missing
    return pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _profile(transformer: Any, inputs: dict[str, Any], measured: Record, out: Path, device: torch.device) -> None:
    """One step of this package under the profiler: written beside the step's record, and printed."""
    handle = accelerate(_pipeline(transformer), cache=None)
    found = step_profile.profiled(transformer, lambda: _output(transformer, inputs), device)
    handle.remove()
    rows = step_profile.records(found, dict(measured.shape), measured.dtype, OURS)
    write_records("hunyuan_step_profile", rows, out)
    print(step_profile.table(found, rows))


def _forward(transformer: Any, inputs: dict[str, Any], device: torch.device) -> tuple[float, float, Tensor]:
    """(seconds, peak GiB, output on the host) of one forward."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    output = _output(transformer, inputs)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0
    return seconds, peak, output.float().cpu()


def _output(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad(), transformer.cache_context("cond"):
        return transformer(**inputs)[0]


def _video_tokens(transformer: Any, inputs: dict[str, Any]) -> int:
    _, _, frames, height, width = inputs["hidden_states"].shape
    config = transformer.config
    return frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size)


def _record(
    transformer: Any, measured: dict[str, Measured], tokens: int, options: argparse.Namespace, dtype: torch.dtype
) -> Record:
    ours, stock = measured[OURS], measured[STOCK]
    config = transformer.config
    return Record(
        op="hunyuan_step",
        shape={
            "height": options.height,
            "width": options.width,
            "frames": options.frames,
            "S": tokens + TEXT_TOKENS,
            "valid": tokens + options.text,
            "H": config.num_attention_heads,
            "D": config.attention_head_dim,
            "blocks": config.num_layers + config.num_single_layers,
        },
        dtype=str(dtype).removeprefix("torch."),
        kernel=OURS,
        median_ms=median(ours.seconds) * 1e3,
        peer=STOCK,
        peer_ms=median(stock.seconds) * 1e3,
        notes={
            "difference": relative_error(ours.output, stock.output),
            "peak_gib": ours.peak_gib,
            "peer_peak_gib": stock.peak_gib,
        },
    )


def _table(measured: dict[str, Measured], tokens: int) -> str:
    lines = [f"{tokens} video + {TEXT_TOKENS} text tokens", f"{'':<20} {'seconds':>9} {'ratio':>7} {'peak GiB':>9}"]
    stock = median(measured[STOCK].seconds)
    for way, entry in measured.items():
        seconds = median(entry.seconds)
        lines.append(f"{way:<20} {seconds:9.3f} {stock / seconds:6.2f}x {entry.peak_gib:9.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
