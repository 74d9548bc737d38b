"""Train the toy HunyuanVideo pipeline: a video VAE, a flow-matching transformer with its text encoders, its guidance.

The transformer is trained twice, as HunyuanVideo was: by flow matching, then by guidance distillation, after which one
forward gives what classifier-free guidance takes two for, and the embedded guidance scale steers it.

    python train.py --device cuda --minutes 7 --out toy_run
    python train.py --stage transformer --init toy_run/pipeline --minutes 4 --out toy_run

Everything is bounded by time, not by steps: the learning rates follow a cosine over each stage's share of `--minutes`.
Clips are drawn on the device as training goes. `OUT/pipeline` is written every `--save-every` seconds, so that a run
that is cut short leaves a pipeline that loads, and `--init` goes on from any saved pipeline. At the end the saved
pipeline is read back and evaluated (evaluate.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, LlamaModel
from transformers.utils.logging import disable_progress_bar

if __package__:
    from .digits import ClipRenderer, contact_sheet, split_digits, to_uint8
    from .evaluate import evaluate
    from .parts import LATENT_CHANNELS, SHIFT, Parts, load_parts, new_parts
    from .prompts import Scene, describe, is_held_out, sample_scene
    from .text import CROP_START, tokenize
else:  # run as a script
    from digits import ClipRenderer, contact_sheet, split_digits, to_uint8
    from evaluate import evaluate
    from parts import LATENT_CHANNELS, SHIFT, Parts, load_parts, new_parts
    from prompts import Scene, describe, is_held_out, sample_scene
    from text import CROP_START, tokenize

TEXT_TOKENS = 64
"""Room for the prompt in training. The pipeline pads to 256; padding is masked, so that it changes nothing."""
DEFAULT_GUIDANCE = 6.0
KL_WEIGHT = 2e-3
"""Lets the posterior's noise show up in pixels at about half a grey level: the decoder forgives small errors."""
GUIDANCE_SLOPE = 0.4
"""A guidance of g stands for a classifier-free weight of 1 + 0.4 (g - 1): 1 at 1, 3 at the pipeline's default of 6."""
VAE_SHARE, FLOW_SHARE = 0.4, 0.55
"""Of the whole time, and of what is left for the transformer."""


@dataclass
class TimeBox:
    """A stage's share of wall time, with the learning-rate schedule over it and progress lines."""

    name: str
    seconds: float
    log: Path
    save_every: float
    started: float = field(default_factory=time.monotonic)
    _printed: float = 0.0
    _saved: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> float:
        return (time.monotonic() - self.started) / self.seconds

    def steps(self) -> Iterator[int]:
        """Step numbers until the time is used up."""
        step = 0
        while self.progress < 1.0:
            yield step
            step += 1

    def learning_rate(self, peak: float, warmup: float = 0.03) -> float:
        """Linear warm-up over a share `warmup` of the box, then a cosine down to 1 % of `peak`."""
        progress = min(self.progress, 1.0)
        if progress < warmup:
            return peak * (progress + 1e-3) / (warmup + 1e-3)
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))

    def report(self, step: int, every: float = 3.0, **values: Any) -> None:
        """Print and log a line at most every few seconds. Tensors are read only then, to keep the device busy."""
        now = time.monotonic()
        if now - self._printed < every:
            return
        self._printed = now
        numbers = {key: float(f"{float(value):.5g}") for key, value in values.items()}
        line = {"stage": self.name, "step": step, "seconds": round(now - self.started, 1), **numbers}
        text = "  ".join(f"{key} {value}" for key, value in line.items())
        print(f"[{min(self.progress, 1.0):4.0%}] {text}", flush=True)
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def is_time_to_save(self) -> bool:
        if time.monotonic() - self._saved < self.save_every:
            return False
        self._saved = time.monotonic()
        return True


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Ema:
    """Exponential moving average of modules' parameters, kept in copies of the modules."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        self.modules = [copy.deepcopy(module).requires_grad_(False) for module in modules]
        self.decay = decay
        self._live = [parameter for module in modules for parameter in module.parameters()]
        self._mean = [parameter for module in self.modules for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The decay starts low, so that the first steps are forgotten soon."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, self._live, 1 - decay)


def _optimiser(parameters: list[nn.Parameter], device: torch.device, decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=decay, fused=device.type == "cuda", eps=1e-8
    )


def _advance(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float, parameters: list[nn.Parameter]) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def encode_mean_and_logvar(vae: AutoencoderKLHunyuanVideo, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of whole clips (B, 3, 17, 64, 64) in one piece: two tensors (B, 16, 5, 8, 8)."""
    mean, logvar = vae.quant_conv(vae.encoder(clips)).chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def vae_loss(vae: AutoencoderKLHunyuanVideo, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(total, squared error, KL divergence per latent number) of clips in [-1, 1].

    The pipeline decodes 17 frames in two overlapping pieces, latents 0..4 and 3..4 (the class's frame-wise decoding),
    so that both are trained.
    """
    mean, logvar = encode_mean_and_logvar(vae, clips)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    whole = vae.decoder(vae.post_quant_conv(latents)).float()
    tail = vae.decoder(vae.post_quant_conv(latents[:, :, 3:])).float()[:, :, 1:]
    divergence = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1.0 - logvar.float()).mean()
    error = whole - clips
    tail_error = tail - clips[:, :, 13:]
    squared = (error**2).mean()
    total = error.abs().mean() + 4 * squared + 0.25 * (tail_error.abs().mean() + 4 * (tail_error**2).mean())
    return total + KL_WEIGHT * divergence, squared.detach(), divergence.detach()


def train_vae(parts: Parts, device: torch.device, box: TimeBox, batch: int, out: Path) -> None:
    """Train the VAE on freshly drawn clips until the box's time is up; its running average replaces it."""
    rng = random.Random(1)
    images, _, labels, _ = split_digits()
    renderer = ClipRenderer(images, labels, device)
    vae = parts.vae.train().requires_grad_(True)
    parameters = list(vae.parameters())
    optimiser = _optimiser(parameters, device, decay=0.0)
    ema = Ema([vae], decay=0.998)
    for step in box.steps():
        clips = renderer.render([sample_scene(rng) for _ in range(batch)], rng)
        loss, squared, divergence = vae_loss(vae, clips)
        rate = box.learning_rate(1e-3)
        _advance(optimiser, loss, rate, parameters)
        ema.update(step)
        box.report(step, loss=loss.detach(), squared_error=squared, kl=divergence, learning_rate=rate)
        if box.is_time_to_save():
            parts.save(out / "pipeline")
    vae.load_state_dict(ema.modules[0].state_dict())


@torch.no_grad()
def calibrate_vae(parts: Parts, device: torch.device, out: Path) -> dict[str, float]:
    """Set `scaling_factor` to one over the latents' root mean square; report the PSNR of held-out digits.

    Writes OUT/vae_reconstruction.png: real clips, each beside its reconstruction.

    The PSNR is of the pipeline's own way of decoding (frame-wise), in dB over [0, 1].
    """
    rng = random.Random(2)
    batch = 64 if device.type == "cuda" else 12
    vae = parts.vae.eval().requires_grad_(False)
    train_images, test_images, train_labels, test_labels = split_digits()
    clips = ClipRenderer(train_images, train_labels, device).render([sample_scene(rng) for _ in range(batch)], rng)
    mean, logvar = encode_mean_and_logvar(vae, clips)
    root_mean_square = mean.square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=1.0 / root_mean_square)
    held_out = ClipRenderer(test_images, test_labels, device).render([sample_scene(rng) for _ in range(batch)], rng)
    latents, _ = encode_mean_and_logvar(vae, held_out)
    decoded = vae.decode(latents).sample.clamp(-1, 1)
    error = (decoded - held_out).square().mean().item() / 4
    pairs = torch.stack([held_out[:12], decoded[:12]], dim=1).flatten(0, 1)
    Image.fromarray(contact_sheet(to_uint8(pairs))).save(out / "vae_reconstruction.png")
    return {
        "scaling_factor": 1.0 / root_mean_square,
        "posterior_noise": (torch.exp(0.5 * logvar).mean() / root_mean_square).item(),
        "held_out_psnr_db": -10 * math.log10(error),
    }


class LatentPool:
    """Encoded clips with their prompts' tokens, on the device. A part is replaced by new clips at each step.

    Encoding every clip of every batch anew would take as long as the transformer's own step.
    """

    def __init__(self, parts: Parts, device: torch.device, size: int, refresh: int, prompts: int) -> None:
        images, _, labels, _ = split_digits()
        self._renderer = ClipRenderer(images, labels, device)
        self._vae, self._device, self._refresh = parts.vae, device, refresh
        self._rng = random.Random(3)
        self._scale = parts.vae.config.scaling_factor
        self._scenes, texts = _training_texts(prompts, self._rng)
        tokens = tokenize(texts, parts.llama_tokenizer, parts.clip_tokenizer, TEXT_TOKENS)
        self._tokens = [tensor.to(device) for tensor in tokens]
        self.latents = torch.empty(size, LATENT_CHANNELS, 5, 8, 8, device=device)
        self._text = torch.zeros(size, dtype=torch.long, device=device)
        self._next = 0
        for _ in range(math.ceil(size / 64)):
            self.refresh(64)

    @torch.no_grad()
    def refresh(self, count: int | None = None) -> None:
        """Replace the `count` oldest clips."""
        count = min(count or self._refresh, len(self.latents))
        chosen = [self._rng.randrange(len(self._scenes)) for _ in range(count)]
        clips = self._renderer.render([self._scenes[index] for index in chosen], self._rng)
        mean, _ = encode_mean_and_logvar(self._vae, clips)
        slots = torch.arange(self._next, self._next + count, device=self._device) % len(self.latents)
        self.latents[slots] = mean * self._scale
        self._text[slots] = torch.tensor(chosen, device=self._device)
        self._next = (self._next + count) % len(self.latents)

    def sample(self, batch: int) -> tuple[Tensor, list[Tensor]]:
        """Latents (B, 16, 5, 8, 8) of unit scale and their prompts' (Llama ids, mask, CLIP ids)."""
        slots = torch.randint(len(self.latents), (batch,), device=self._device)
        rows = self._text[slots]
        return self.latents[slots], [tensor[rows] for tensor in self._tokens]


def _training_texts(count: int, rng: random.Random, empty: float = 0.02) -> tuple[list[Scene], list[str]]:
    """Scenes and wordings, none held out; a few are empty, so that an empty negative prompt means "any clip"."""
    scenes, texts = [], []
    while len(texts) < count:
        scene = sample_scene(rng)
        text = "" if rng.random() < empty else describe(scene, rng)
        if not text or not is_held_out(text):
            scenes.append(scene)
            texts.append(text)
    return scenes, texts


def encode_text(llama: LlamaModel, clip: CLIPTextModel, tokens: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the pipeline gives to the transformer: text states (B, L, 64), their mask (B, L), pooled states (B, 64)."""
    ids, mask, clip_ids = tokens
    states = llama(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
    return states[:, CROP_START:], mask[:, CROP_START:], clip(clip_ids).pooler_output


def sample_sigma(batch: int, device: torch.device) -> Tensor:
    """Noise levels (B,) in (0, 1): half logit-normal, half uniform, then shifted as the scheduler shifts its own."""
    normal = torch.sigmoid(torch.randn(batch, device=device))
    uniform = torch.rand(batch, device=device)
    level = torch.where(torch.rand(batch, device=device) < 0.5, normal, uniform).clamp(1e-3, 1.0)
    return SHIFT * level / (1 + (SHIFT - 1) * level)


Text = tuple[Tensor, Tensor, Tensor]
"""What `encode_text` returns."""


def noised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, s, velocity): x = (1 - s) data + s noise at random noise levels s (B,), and noise - data."""
    sigma = sample_sigma(latents.shape[0], latents.device)
    noise = torch.randn_like(latents)
    return torch.lerp(latents, noise, sigma[:, None, None, None, None]), sigma, noise - latents


def sample_guidance(batch: int, device: torch.device) -> Tensor:
    """Guidance scales (B,): the pipeline's default of 6 in 4 of 5 draws, else anything from 1 to 12."""
    uniform = 1.0 + 11.0 * torch.rand(batch, device=device)
    return torch.where(torch.rand(batch, device=device) < 0.8, DEFAULT_GUIDANCE, uniform)


def velocity(transformer: nn.Module, mixed: Tensor, sigma: Tensor, text: Text, guidance: Tensor) -> Tensor:
    """The transformer's prediction, called as the pipeline calls it: timestep 1000 s, guidance times 1000."""
    states, mask, pooled = text
    return transformer(
        hidden_states=mixed,
        timestep=1000.0 * sigma,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        guidance=1000.0 * guidance,
        return_dict=False,
    )[0].float()


def flow_loss(parts: Parts, latents: Tensor, tokens: list[Tensor]) -> Tensor:
    """Rectified flow (Liu et al. 2023, arXiv 2209.03003): at x the transformer predicts noise - data.

    This is the convention of `FlowMatchEulerDiscreteScheduler`: a step adds (s_next - s) times the prediction.
    """
    mixed, sigma, target = noised(latents)
    guidance = sample_guidance(len(latents), latents.device)
    text = encode_text(parts.llama, parts.clip, tokens)
    return functional.mse_loss(velocity(parts.transformer, mixed, sigma, text, guidance), target)


def distillation_loss(
    parts: Parts, teacher: nn.Module, empty: list[Tensor], latents: Tensor, tokens: list[Tensor]
) -> Tensor:
    """Guidance distillation (Meng et al. 2023, arXiv 2210.03142, section 3.1), for rectified flow.

    The target is the teacher's classifier-free guidance against the `empty` prompt's tokens, at the weight that the
    student's guidance scale stands for.
    """
    mixed, sigma, _ = noised(latents)
    guidance = sample_guidance(len(latents), latents.device)
    default = torch.full_like(guidance, DEFAULT_GUIDANCE)
    with torch.no_grad():
        text = encode_text(parts.llama, parts.clip, tokens)
        nothing = encode_text(parts.llama, parts.clip, [row.expand(len(latents), -1) for row in empty])
        towards = velocity(teacher, mixed, sigma, text, default)
        away = velocity(teacher, mixed, sigma, nothing, default)
        weight = 1.0 + GUIDANCE_SLOPE * (guidance - 1.0)
        target = away + weight[:, None, None, None, None] * (towards - away)
    return functional.mse_loss(velocity(parts.transformer, mixed, sigma, text, guidance), target)


Loss = Callable[[Tensor, list[Tensor]], Tensor]
"""Of latents and their prompts' tokens."""


def _compile_blocks(*transformers: Any) -> None:
    for transformer in transformers:
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(dynamic=False)


def _uncompile_blocks(*transformers: Any) -> None:
    for transformer in transformers:
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block._compiled_call_impl = None


def _try_compiled(loss: Loss, pool: LatentPool, device: torch.device, batch: int, *transformers: Any) -> bool:
    """Compile the blocks and take one trial step; a machine that cannot compile trains eagerly."""
    _compile_blocks(*transformers)
    try:
        with autocast(device):
            trial = loss(*pool.sample(batch))
        trial.backward()
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler raises, training goes on without it
        print(f"torch.compile failed, training eagerly: {type(error).__name__}: {str(error)[:300]}", flush=True)
        _uncompile_blocks(*transformers)
        return False
    return True


def train_flow(parts: Parts, pool: LatentPool, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Flow matching: transformer and text encoders together. Their running averages replace them."""

    def loss(latents: Tensor, tokens: list[Tensor]) -> Tensor:
        return flow_loss(parts, latents, tokens)

    trained = [parts.transformer, parts.llama, parts.clip]
    averages, record = _fit("flow", parts, trained, loss, pool, seconds, options.learning_rate, options)
    parts.transformer, parts.llama, parts.clip = averages
    return record


def distil_guidance(parts: Parts, pool: LatentPool, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Guidance distillation: the transformer alone, from itself. Its running average replaces it."""
    teacher = copy.deepcopy(parts.transformer).eval().requires_grad_(False)
    for encoder in (parts.llama, parts.clip):
        encoder.eval().requires_grad_(False)
    device = pool.latents.device
    empty = [row.to(device) for row in tokenize([""], parts.llama_tokenizer, parts.clip_tokenizer, TEXT_TOKENS)]

    def loss(latents: Tensor, tokens: list[Tensor]) -> Tensor:
        return distillation_loss(parts, teacher, empty, latents, tokens)

    rate = options.learning_rate / 2
    averages, record = _fit("guidance", parts, [parts.transformer], loss, pool, seconds, rate, options, teacher)
    parts.transformer = averages[0]
    return record


def _fit(
    stage: str,
    parts: Parts,
    trained: list[Any],
    loss: Loss,
    pool: LatentPool,
    seconds: float,
    learning_rate: float,
    options: argparse.Namespace,
    *frozen: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """Train `trained`, the transformer first, for `seconds`: (their running averages, what happened)."""
    deadline = time.monotonic() + seconds
    device = pool.latents.device
    batch = options.batch or (128 if device.type == "cuda" else 8)
    parameters = [parameter for module in trained for parameter in module.train().requires_grad_(True).parameters()]
    ema = Ema(trained, decay=0.999)
    compiled = (
        device.type == "cuda"
        and not options.no_compile
        and _try_compiled(loss, pool, device, batch, trained[0], *frozen)
    )
    optimiser = _optimiser(parameters, device, decay=0.01)
    box = TimeBox(stage, max(deadline - time.monotonic(), 1.0), options.out / "train.jsonl", options.save_every)
    print(f"{stage}: {box.seconds:.0f} s left after preparation, compiled: {compiled}", flush=True)
    step, mean_loss = 0, torch.ones((), device=device)
    for step in box.steps():
        pool.refresh()
        latents, tokens = pool.sample(batch)
        with autocast(device):
            value = loss(latents, tokens)
        rate = box.learning_rate(learning_rate)
        _advance(optimiser, value, rate, parameters)
        ema.update(step)
        mean_loss = torch.lerp(mean_loss, value.detach(), 0.02 if step > 50 else 0.2)
        box.report(step, loss=mean_loss, learning_rate=rate)
        if box.is_time_to_save():
            averages = (*ema.modules, parts.llama, parts.clip)[:3] if len(trained) == 1 else ema.modules
            Parts(parts.vae, *averages, parts.llama_tokenizer, parts.clip_tokenizer).save(options.out / "pipeline")
            pack(options.out)
            publish(options.out, options.results)
    steps = {"steps": step + 1, "batch": batch, "compiled": compiled, "loss": round(mean_loss.item(), 5)}
    return ema.modules, steps


def pack(out: Path) -> Path:
    """`OUT/pipeline` as `OUT/toy_pipeline.tar.gz`, replaced in one move."""
    fresh = out / "toy_pipeline.tar.gz.new"
    with tarfile.open(fresh, "w:gz") as archive:
        archive.add(out / "pipeline", arcname="pipeline")
    return fresh.rename(out / "toy_pipeline.tar.gz")


def publish(out: Path, results: Path | None) -> None:
    """Copy the flat result files into `results`."""
    if results is None:
        return
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.iterdir()):
        if path.is_file():
            shutil.copy2(path, results / path.name)


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time, the evaluation not counted")
    parser.add_argument("--stage", choices=("vae", "transformer", "all"), default="all")
    parser.add_argument("--init", type=Path, help="start from this saved pipeline instead of from nothing")
    parser.add_argument("--out", type=Path, default=Path("toy_run"), help="where pipeline/ and the figures go")
    parser.add_argument("--results", type=Path, help="also copy the flat files (figures, archive, log) here")
    parser.add_argument("--batch", type=int, help="clips per transformer step (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--vae-batch", type=int, help="clips per VAE step (default: 16 on a GPU, 4 on a CPU)")
    parser.add_argument("--pool", type=int, help="encoded clips kept (default: 16384 on a GPU, 256 on a CPU)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="transformer's peak (default: 1e-3)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the transformer's blocks")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between saved pipelines")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out clips to judge at the end; 0 for none")
    parser.add_argument("--evaluation-batch", type=int, help="prompts per call (default: 50 on a GPU, 4 on a CPU)")
    return parser.parse_args()


def main() -> None:
    options = _read_arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    disable_progress_bar()  # of the many small files, not of training
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    parts = load_parts(options.init) if options.init else new_parts(out / "tokenizers")
    parts.to(device)
    record: dict[str, Any] = {"torch": torch.__version__, "device": str(device), "minutes": options.minutes}
    seconds = 60 * options.minutes
    vae_seconds = {"vae": 1.0, "transformer": 0.0, "all": VAE_SHARE}[options.stage] * seconds
    began = time.monotonic()
    if vae_seconds:
        batch = options.vae_batch or (16 if device.type == "cuda" else 4)
        train_vae(parts, device, TimeBox("vae", vae_seconds, out / "train.jsonl", options.save_every), batch, out)
    record["vae"] = calibrate_vae(parts, device, out)
    print(json.dumps(record["vae"]), flush=True)
    parts.save(out / "pipeline")
    if options.stage != "vae":
        on_gpu = device.type == "cuda"
        size = options.pool or (16384 if on_gpu else 256)
        pool = LatentPool(parts, device, size, refresh=8, prompts=50_000 if on_gpu else 5_000)
        left = seconds - (time.monotonic() - began)
        record["flow"] = train_flow(parts, pool, FLOW_SHARE * left, options)
        parts.save(out / "pipeline")
        left = seconds - (time.monotonic() - began)
        record["guidance"] = distil_guidance(parts, pool, left, options)
        parts.save(out / "pipeline")
    pack(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    publish(out, options.results)
    if options.evaluate and options.stage != "vae":
        pipe = HunyuanVideoPipeline.from_pretrained(out / "pipeline").to(device)
        batch = options.evaluation_batch or (50 if device.type == "cuda" else 4)
        figures = evaluate(pipe, out, options.evaluate, batch)
        print(json.dumps({key: figures[key] for key in ("generated", "real_held_out_digits")}, indent=1), flush=True)
        publish(out, options.results)


if __name__ == "__main__":
    main()
