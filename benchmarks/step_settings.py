"""Denoising steps of a full-size transformer under every setting, in one run: stock diffusers, and this package's.

    python -m benchmarks.step_settings hunyuan --out benchmarks/results
    python -m benchmarks.step_settings flux --out benchmarks/results --steps 28
    python -m benchmarks.step_settings flux --side 512 --out /tmp/steps      pictures whose steps Python is slower than
    python -m benchmarks.step_settings flux --small --out /tmp/steps         a tiny model, also on a CPU
    python -m benchmarks.step_settings hunyuan --only "diffusers,exact,exact compiled" --out /tmp/steps

`hunyuan`: one step at 720 x 1280 x 129. `flux`: FLUX.1-dev's configuration, 28 steps at 1024 x 1024 or --side.
`cogvideox`: CogVideoX-5b's, one step at 480 x 720 x 49. Weights are random in the shapes of the public configurations.
Every second step's latents differ little from those before, so that a cache
reuses about half of the steps; which ones is in the record. The differences between outputs are those of the last step.
A setting that fails is reported and does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from torch import Tensor

from para_kernels.integrations.diffusers import Fp8Linears, Handle, accelerate

from . import cogvideox_model, flux_model, step_model
from .record import Record, write_records
from .reference import relative_error
from .step_model import forward

STOCK = "diffusers"
FP8 = Fp8Linears(keep_originals=True)  # every setting is taken off again


@dataclass(frozen=True)
class Setting:
    """How the transformer runs.

    Attributes:
        options: what `accelerate` is given; None: nothing of this package is installed.
        compiled: stock diffusers with its own regional compilation.
        cache: stock diffusers with its own First Block Cache, of this threshold.
    """

    name: str
    options: dict[str, Any] | None
    compiled: bool = False
    cache: float | None = None

    @property
    def is_of_one_size(self) -> bool:
        """Whether only steps of the full size warm it up."""
        options = self.options or {}
        return self.compiled or bool(options.get("compile") or options.get("graphs"))


THRESHOLD = 0.08
SETTINGS = (
    Setting(STOCK, None),
    Setting("diffusers compiled", None, compiled=True),
    Setting("diffusers, cache", None, cache=THRESHOLD),
    Setting("exact", {}),
    Setting("exact, graphs", {"graphs": True}),
    Setting("exact compiled", {"compile": True}),
    Setting("exact compiled, graphs", {"compile": True, "graphs": True}),
    Setting("exact, cache", {"cache": THRESHOLD}),
    Setting("exact, cache, graphs", {"cache": THRESHOLD, "graphs": True}),
    Setting("exact compiled, cache", {"compile": True, "cache": THRESHOLD}),
    Setting("exact compiled, cache, graphs", {"compile": True, "cache": THRESHOLD, "graphs": True}),
    Setting("fp8 linears compiled", {"compile": True, "linears": FP8}),
    Setting("fp8 linears compiled, graphs", {"compile": True, "linears": FP8, "graphs": True}),
    Setting(
        "fp8 linears compiled, cache, graphs", {"compile": True, "linears": FP8, "cache": THRESHOLD, "graphs": True}
    ),
    Setting("int8 attention", {"attention": "int8"}),
    Setting("int8 attention, fp8 linears compiled", {"compile": True, "linears": FP8, "attention": "int8"}),
    Setting(
        "int8 attention, fp8 linears compiled, cache",
        {"compile": True, "linears": FP8, "attention": "int8", "cache": THRESHOLD},
    ),
)


@dataclass(frozen=True)
class Model:
    """What is measured: `steps` are the transformer's arguments of every step, `small` those of a tiny one."""

    transformer: Any
    pipe: Any
    steps: list[dict[str, Any]]
    small: dict[str, Any]
    shape: dict[str, int]
    op: str


@dataclass
class Measured:
    """Seconds of all steps in each round, peak memory in GiB, the last output on the host, steps reused (None: not
    known), seconds of the warm-up."""

    rounds: list[float]
    peak_gib: float
    output: Tensor
    reused: int | None
    warmup: float

    @property
    def seconds(self) -> float:
        return median(self.rounds)


def hunyuan(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Model:
    config = step_model.SMALL_CONFIG if options.small else {}
    transformer = step_model.build_transformer(config, device, dtype)
    tiny = (64, 96, 9)
    size = tiny if options.small else (720, 1280, 129)
    inputs, small = (step_model.step_inputs(transformer, *of, 120, device, dtype) for of in (size, tiny))
    tokens = step_model.video_tokens(transformer, inputs) + step_model.TEXT_TOKENS
    height, width, frames = size
    shape = {"height": height, "width": width, "frames": frames, "S": tokens}
    pipe = step_model.pipeline_around(transformer)
    return Model(transformer, pipe, _steps(inputs, options.steps or 1), small, shape, "hunyuan_step")


def flux(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Model:
    config = flux_model.SMALL_CONFIG if options.small else flux_model.CONFIG
    transformer = flux_model.build_transformer(config, device, dtype)
    side = 64 if options.small else options.side
    inputs, small = (flux_model.step_inputs(transformer, of, of, device, dtype) for of in (side, 64))
    shape = {"height": side, "width": side, "S": inputs["hidden_states"].shape[1] + flux_model.TEXT_TOKENS}
    pipe = flux_model.pipeline_around(transformer)
    return Model(transformer, pipe, _steps(inputs, options.steps or 28), small, shape, "flux_step")


def cogvideox(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Model:
    config = cogvideox_model.SMALL_CONFIG if options.small else cogvideox_model.CONFIG
    transformer = cogvideox_model.build_transformer(config, device, dtype)
    tiny = (64, 64, 9)
    height, width, frames = tiny if options.small else (480, 720, 49)
    inputs = cogvideox_model.step_inputs(transformer, height, width, frames, device, dtype)
    small = cogvideox_model.step_inputs(transformer, *tiny, device, dtype)
    shape = {"height": height, "width": width, "frames": frames}
    pipe = cogvideox_model.pipeline_around(transformer)
    shape["S"] = cogvideox_model.tokens(transformer, inputs)
    return Model(transformer, pipe, _steps(inputs, options.steps or 1), small, shape, "cogvideox_step")


MODELS: dict[str, Callable[[argparse.Namespace, torch.device, torch.dtype], Model]] = {
    "hunyuan": hunyuan,
    "flux": flux,
    "cogvideox": cogvideox,
}


def _steps(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Latents that change little in every second step, and much in the others."""
    latents = inputs["hidden_states"]
    noise = latents.flip(-1)
    changes = [0.005 * (step % 2) + 0.6 * (step // 2) for step in range(count)]
    return [inputs | {"hidden_states": latents + change * noise} for change in changes]


def main() -> int:
    options = _options()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.perf_counter()
    model = MODELS[options.model](options, device, dtype)
    print(
        f"{options.model}: {model.shape}, {len(model.steps)} steps, made in {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    measured: dict[str, Measured] = {}
    failed = []
    for setting in SETTINGS:
        if setting.name not in options.only:
            continue
        try:
            measured[setting.name] = measure(model, setting, device, options.rounds)
        except Exception:  # one setting that fails must not cost the others their results
            failed.append(setting.name)
            print(f"{setting.name}: {traceback.format_exc()}", flush=True)
        else:
            print(_line(setting.name, measured), flush=True)
            write_records(f"{model.op}_settings", records(model, measured, dtype), options.out)
        _free(device)
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def measure(model: Model, setting: Setting, device: torch.device, rounds: int) -> Measured:
    """Install, warm up, run all steps so many times, remove. What compiles is warmed up by three steps of full size:
    a cache that reuses a step, the second, runs other code than in one that it computes, and graphs are recorded in a
    later one that is computed. The others are warmed up by a tiny one.
    """
    handle = _installed(model, setting)
    try:
        start = time.perf_counter()
        _run(model, model.steps[:3] if setting.is_of_one_size else [model.small])
        _synchronize(device)
        warmup = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            output = _run(model, model.steps)
            _synchronize(device)
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        return Measured(times, peak, output.float().cpu(), _reused(model, setting, handle), warmup)
    finally:
        _uninstall(model, setting, handle)


def _reused(model: Model, setting: Setting, handle: Handle | None) -> int | None:
    if handle is None:
        return 0 if setting.cache is None else None
    return sum(record.reused for record in handle.records[-len(model.steps) :])


def _installed(model: Model, setting: Setting) -> Handle | None:
    if setting.options is not None:
        return accelerate(model.pipe, **setting.options)
    if setting.compiled:
        model.transformer.compile_repeated_blocks(fullgraph=True)
    if setting.cache is not None:
        model.transformer.enable_cache(FirstBlockCacheConfig(threshold=setting.cache))
    return None


def _uninstall(model: Model, setting: Setting, handle: Handle | None) -> None:
    if handle is not None:
        handle.remove()
    if setting.compiled:
        for module in model.transformer.modules():
            module._compiled_call_impl = None
    if setting.cache is not None:
        model.transformer.disable_cache()


def _run(model: Model, steps: list[dict[str, Any]]) -> Tensor:
    """All steps as one call of the pipeline would run them: a cache remembers nothing of the call before."""
    with torch.no_grad():
        outputs = [forward(model.transformer, inputs) for inputs in steps]
    reset = getattr(model.transformer, "_reset_stateful_cache", None)
    if reset is not None:
        reset()
    return outputs[-1]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def records(model: Model, measured: dict[str, Measured], dtype: torch.dtype) -> list[Record]:
    """One for each setting, against stock diffusers where that was measured."""
    stock = measured.get(STOCK)
    made = []
    for name, entry in measured.items():
        notes: dict[str, Any] = {"peak_gib": entry.peak_gib, "reused": entry.reused, "warmup_s": entry.warmup}
        notes["rounds_ms"] = [round(seconds * 1e3, 2) for seconds in entry.rounds]
        if stock is not None:
            notes |= {"difference": relative_error(entry.output, stock.output), "peer_peak_gib": stock.peak_gib}
        peer = (None, None) if stock is None else (STOCK, stock.seconds * 1e3)
        kind = str(dtype).removeprefix("torch.")
        made.append(
            Record(
                model.op, model.shape | {"steps": len(model.steps)}, kind, name, entry.seconds * 1e3, *peer, notes=notes
            )
        )
    return made


def _line(name: str, measured: dict[str, Measured]) -> str:
    entry, stock = measured[name], measured.get(STOCK)
    reused = "?" if entry.reused is None else entry.reused
    against = "" if stock is None else f"  {stock.seconds / entry.seconds:5.2f}x"
    return (
        f"{name:<46} {entry.seconds:8.3f} s{against}  peak {entry.peak_gib:5.1f} GiB  {reused} reused"
        f"  (warm-up {entry.warmup:.1f} s)"
    )


def add_side(parser: argparse.ArgumentParser) -> None:
    """The size of a picture, for `MODELS["flux"]`."""
    parser.add_argument("--side", type=_side, default=1024, metavar="PIXELS", help="of flux's picture (default: 1024)")


def _side(text: str) -> int:
    pixels = int(text)
    if pixels < 16 or pixels % 16:
        raise argparse.ArgumentTypeError(f"{pixels}; must be a multiple of 16")
    return pixels


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--small", action="store_true", help="a tiny model and picture")
    add_side(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="default: 28 for flux, 1 for the others")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of all steps (default: 1)")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="SETTING", help=", ".join(names))
    options = parser.parse_args()
    if (options.steps is not None and options.steps < 1) or options.rounds < 1:
        parser.error("steps and rounds must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
