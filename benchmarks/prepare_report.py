"""The preparation of attention's input on one GPU: whether it is right, and how fast beside the unfused expressions.

    python -m benchmarks.prepare_report --out /tmp/prepare
    python -m benchmarks.prepare_report --out /tmp/prepare --tune

Checks every form against float64 and against the expressions of diffusers, times the blocks of HunyuanVideo (720 x
1280, 129 frames) and FLUX.1 (1024 x 1024) against those expressions, eager and compiled, and against a copy of as many
bytes, and writes JSON records to --out. --tune also times other launch configurations. Without CUDA it runs small.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from para_kernels import ops
from para_kernels.integrations.diffusers.norms import left_to_norm
from para_kernels.preparation import Norm, Rotary, RotaryForm, Stream, prepare_attention

from .record import OURS, Check, Record, write_records
from .section import Result, dtype_name
from .timing import host_microseconds, medians_ms

# Relative to the largest value: float32 as it must be; half precision up to three roundings, half an ulp each.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
# (elements of a tile, heads of a program, warps)
CONFIGS = tuple(
    (tile, heads, warps) for tile in (1024, 2048, 4096, 8192) for heads in (1, 4, 8, 24) for warps in (4, 8)
)
HEADS, HEAD_DIM = 24, 128


@dataclass(frozen=True)
class Block:
    """Projections as a block of a model has them.

    Attributes:
        rotated: tokens of the stream that has RoPE.
        plain: tokens of the stream that has none.
        joined: whether both streams have one projection, so that the values need no copy.
    """

    rotated: int
    plain: int
    joined: bool


BLOCKS = {
    "HunyuanVideo, dual": Block(118800, 256, joined=False),
    "HunyuanVideo, single": Block(118800, 256, joined=True),
    "FLUX.1, dual": Block(4096, 512, joined=False),
    "FLUX.1, single": Block(4608, 0, joined=True),
}
SMALL_BLOCKS = {"dual": Block(40, 8, joined=False), "single": Block(40, 8, joined=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--tune", action="store_true", help="time other launch configurations too")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sections = {"checks": checks, "speed": speed} | ({"tune": tune} if options.tune else {})
    failed = False
    for name, section in sections.items():
        print(f"== {name}", flush=True)
        with torch.no_grad():
            lines, records = section(device)
        for line in lines:
            print(f"  {line}", flush=True)
        write_records(f"prepare-{name}", records, options.out)
        failed |= any(isinstance(record, Check) and not record.passed for record in records)
    return int(failed)


# --- checks -----------------------------------------------------------------------------------------------------------


def checks(device: torch.device) -> Result:
    """The worst error of each form, relative to the largest value, against float64 and the unfused expression."""
    lines, records = [], []
    for dtype, allowed in TOLERANCES.items():
        for name, (stream, form) in _forms(dtype, device).items():
            q, _, _ = prepare_attention([stream], rotary_form=form)
            exact = _rotated(_normed(stream.query.double(), stream.norm_query), stream.rotary, form)
            unfused = ops._rotated(
                ops._normed(stream.query, *_numbers(stream.norm_query)), *_angles(stream), form == "half"
            ).to(dtype)
            worst, beside, unfused_error = (_worst(*pair) for pair in ((q, exact), (q, unfused), (unfused, exact)))
            equal = (q == unfused).float().mean().item()
            lines.append(
                f"{name}, {dtype_name(dtype)}: {worst:.1e} of float64 (unfused {unfused_error:.1e}),"
                f" {beside:.1e} of unfused, {equal:.2%} of the values equal"
            )
            records.append(
                Check(
                    f"preparation, {name}", 1, int(not max(worst, beside) <= allowed), dtype_name(dtype),
                    max(worst, beside), allowed, {"unfused": unfused_error, "equal": equal},
                )
            )  # fmt: skip
    return lines, records


def _forms(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Stream, RotaryForm]]:
    """One stream of each form that the families of models have."""
    tokens, heads = (3001, 5) if device.type == "cuda" else (37, 3)
    forms: dict[str, tuple[Stream, RotaryForm]] = {}
    for name, kind, over, form, shape in (
        ("rms, interleaved", "rms", "head", "interleaved", (tokens, HEAD_DIM)),
        ("rms, half", "rms", "head", "half", (tokens, HEAD_DIM)),
        ("layer, interleaved", "layer", "head", "interleaved", (tokens, HEAD_DIM)),
        ("rms over heads", "rms", "heads", "interleaved", (tokens, HEAD_DIM)),
        ("angles of each head", "rms", "head", "interleaved", (tokens, heads, HEAD_DIM // 2)),
    ):
        query, key, value = torch.randn(2, tokens, 3, heads, HEAD_DIM, device=device).to(dtype).unbind(2)
        channels = HEAD_DIM * (heads if over == "heads" else 1)
        weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
        rounds = kind == "rms" and dtype != torch.float32
        norm = Norm(kind, weight, bias if kind == "layer" else None, 1e-6, over, rounds)  # type: ignore[arg-type]
        rotary = _rotary(shape, form, device)
        forms[name] = (Stream(query, key, value, norm, norm, rotary), form)  # type: ignore[assignment]
    return forms


def _rotary(shape: tuple[int, ...], form: str, device: torch.device) -> Rotary:
    angle = torch.rand((*shape[:-1], HEAD_DIM // 2), device=device) * 100
    if shape[-1] == HEAD_DIM:
        angle = torch.cat([angle, angle], -1) if form == "half" else angle.repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def _numbers(norm: Norm | None) -> tuple[Any, ...]:
    """How the operator is told of a norm."""
    assert norm is not None
    number = 2 if norm.kind == "layer" else 1 + 2 * (norm.over == "heads") + 4 * norm.round_first
    return number, norm.weight, norm.bias, norm.eps


def _angles(stream: Stream) -> Rotary:
    assert stream.rotary is not None
    return stream.rotary


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x (B, S, H, D), float64."""
    assert norm is not None
    assert norm.weight is not None
    rows = x.flatten(2) if norm.over == "heads" else x
    if norm.kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    return (rows if norm.bias is None else rows + norm.bias.double()).reshape(x.shape)


def _rotated(x: Tensor, rotary: Rotary | None, form: str) -> Tensor:
    """x (B, S, H, D), float64: a product of complex numbers."""
    assert rotary is not None
    cos, sin = (angle.double() for angle in rotary)
    if cos.shape[-1] == x.shape[-1]:
        cos, sin = (y[..., : x.shape[-1] // 2] if form == "half" else y[..., ::2] for y in (cos, sin))
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    real, imaginary = x.chunk(2, -1) if form == "half" else (x[..., ::2], x[..., 1::2])
    turned = torch.complex(real, imaginary) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1) if form == "half" else torch.view_as_real(turned).flatten(-2)


def _worst(value: Tensor, reference: Tensor) -> float:
    distance = (value.double() - reference.double()).abs().max() / reference.double().abs().max()
    return distance.item() if distance.isfinite() else float("inf")


# --- speed ------------------------------------------------------------------------------------------------------------


class _Candidate:
    """A block's projections, norms and angles, and the two ways to prepare them."""

    def __init__(self, block: Block, device: torch.device) -> None:
        heads, dtype = (HEADS if device.type == "cuda" else 2), torch.bfloat16
        make: Callable[..., Tensor] = lambda tokens: torch.randn(  # noqa: E731
            1, tokens, heads, HEAD_DIM, device=device, dtype=dtype
        )
        self.block = block
        tokens = (block.rotated + block.plain,) if block.joined else (block.rotated, block.plain)
        self.projections = [[make(count) for _ in range(3)] for count in tokens]
        self.norms: list[nn.Module] = [
            RMSNorm(HEAD_DIM, eps=1e-6).to(device, dtype).requires_grad_(False) for _ in range(4)
        ]
        self.rotary = _rotary((block.rotated, HEAD_DIM), "interleaved", device)
        parts = 4 if block.joined else 6
        size = sum(tokens) * heads * HEAD_DIM * dtype.itemsize
        self.bytes = parts * size + sum(angle.nbytes for angle in self.rotary)
        self.shape = {"B": 1, "S": sum(tokens), "H": heads, "D": HEAD_DIM}

    def fused(self) -> tuple[Tensor, Tensor, Tensor]:
        (query, key, value), *others = self.projections
        rows = self.block.rotated
        norm_q, norm_k, text_q, text_k = (left_to_norm(norm, query)[1] for norm in self.norms)
        if not self.block.joined:
            (text,) = others
            first = Stream(query, key, value, norm_q, norm_k, self.rotary)
            return prepare_attention([first, Stream(text[0], text[1], text[2], text_q, text_k)])
        streams = [
            Stream(query[:, :rows], key[:, :rows], None, norm_q, norm_k, self.rotary),
            Stream(query[:, rows:], key[:, rows:], None, norm_q, norm_k),
        ]
        return prepare_attention(streams, value=value)

    def unfused(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the attention processors of diffusers have it."""
        (query, key, value), *others = self.projections
        rows, rotary = self.block.rotated, self.rotary
        turn: Callable[[Tensor], Any] = lambda x: apply_rotary_emb(x, rotary, sequence_dim=1)  # type: ignore[arg-type]  # noqa: E731
        query, key = self.norms[0](query), self.norms[1](key)
        if self.block.joined:
            query, key = (torch.cat([turn(x[:, :rows]), x[:, rows:]], dim=1) for x in (query, key))
            return query, key, value
        (text,) = others
        query = torch.cat([turn(query), self.norms[2](text[0])], dim=1)
        key = torch.cat([turn(key), self.norms[3](text[1])], dim=1)
        return query, key, torch.cat([value, text[2]], dim=1)


def speed(device: torch.device) -> Result:
    """Against the unfused expressions and a copy of as many bytes."""
    lines, records = [], []
    for name, block in (BLOCKS if device.type == "cuda" else SMALL_BLOCKS).items():
        candidate = _Candidate(block, device)
        source = torch.empty(candidate.bytes // 4, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        ways = {OURS: candidate.fused, "eager": candidate.unfused, "copy": lambda: target.copy_(source)}  # noqa: B023
        if device.type == "cuda":
            torch._dynamo.reset()
            ways["compiled"] = torch.compile(candidate.unfused, dynamic=False)
        times = medians_ms(ways, device)
        host = host_microseconds(candidate.fused, device, *((100, 15) if device.type == "cuda" else (5, 3)))
        gbps = candidate.bytes / times[OURS] / 1e6
        of_copy = times["copy"] / times[OURS]
        lines.append(
            f"{name}: {times[OURS]:.3f} ms, {gbps:.0f} GB/s, {of_copy:.1%} of a copy; eager {times['eager']:.3f} ms"
            f" ({times['eager'] / times[OURS]:.2f} x), compiled {times.get('compiled', float('nan')):.3f} ms;"
            f" host {host:.0f} us"
        )
        notes = {
            "block": name,
            "of_copy": of_copy,
            "copy_ms": times["copy"],
            "host_us": host,
            "compiled_ms": times.get("compiled"),
        }
        records.append(
            Record(
                "prepare_attention", candidate.shape, "bfloat16", OURS, times[OURS], "eager", times["eager"], gbps=gbps,
                notes=notes,
            )
        )  # fmt: skip
    return lines, records


def tune(device: torch.device) -> Result:
    """Every launch configuration on the largest block and on a small one."""
    from para_kernels.triton_kernels import prepare

    lines, records = [], []
    shipped = prepare.TILE, prepare.HEADS, prepare.WARPS
    blocks = list(BLOCKS.values()) if device.type == "cuda" else list(SMALL_BLOCKS.values())
    for block in (blocks[0], blocks[-2]):
        candidate = _Candidate(block, device)
        found = []
        for config in CONFIGS:
            prepare.TILE, prepare.HEADS, prepare.WARPS = config
            prepare._plan.cache_clear()
            time = medians_ms({OURS: candidate.fused}, device, rounds=10, seconds=0.3)[OURS]
            found.append((time, config))
            sizes = dict(zip(("tile", "heads_of_a_program", "warps"), config, strict=True))
            records.append(Record("prepare_attention", candidate.shape | sizes, "bfloat16", OURS, time))
        best = ", ".join(f"{config} {time:.3f} ms" for time, config in sorted(found)[:6])
        ours = next(time for time, config in found if config == shipped)
        lines.append(f"{candidate.shape}: shipped {shipped} {ours:.3f} ms; {best}")
    prepare.TILE, prepare.HEADS, prepare.WARPS = shipped
    prepare._plan.cache_clear()
    return lines, records


if __name__ == "__main__":
    sys.exit(main())
