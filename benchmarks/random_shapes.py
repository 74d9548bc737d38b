"""Random attention problems against float64: shapes, strides, lengths, dtypes, scales, NaN where nothing may be read.

    python -m benchmarks.random_shapes --seed 0                 all of them; prints each that fails
    python -m benchmarks.random_shapes --seed 0 --case 17       one of them again

A problem is made of (seed, case) alone, so each can be run again by itself, on any device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch
from torch import Tensor

from para_kernels import flash_attention, flash_attention_varlen

from .inputs import cu_seqlens, lens_tensor
from .record import Check
from .reference import TOLERANCES, attention_float64
from .section import Result, dtype_name

CASES, SEED = 1000, 0
LONGEST = 2500
EDGES = (16, 64, 128, 176)  # tile sizes: lengths are drawn at and around their multiples
LAST_KEYS = 64
# Absolute, and of an lse beyond 100 per hundred: float32 sums of scores are exact to about 1e-6 of the largest score. A
# key too many among 2,500 changes the lse by 4e-4.
LSE_TOLERANCE, LSE_SCALE = 3e-4, 100.0

Form = Literal["dense", "padded", "packed"]
# What the scores look like: those of normal data; all of them large; large for one key; for one key about as large as
# what float32's exponent can hold relative to the others.
Values = Literal["normal", "large", "sink", "edge"]
STORAGES = ("token-major", "head-major", "sequence-first", "pitched", "fused")
# Rows that no 16-byte load can start at, a first row that none can, and one head for all: each asks for another variant
# or for other care with strides, so they are rare.
ODD_STORAGES = ("odd pitch", "odd offset", "shared head")


@dataclass(frozen=True)
class Problem:
    """One attention problem; everything that a run needs but the values, which come from (seed, case).

    Attributes:
        form: "dense" gives no lengths, "padded" gives kv_lens and perhaps q_lens, "packed" gives cu_seqlens.
        query_lens, key_lens: of each sample.
        rows_q, rows_k: sizes of the tensors' sequence dimension: S, or T where packed. Rows past the samples are NaN.
        gives_q_lens: padded only; without, every row of q is real.
        slack: packed only, how much larger than the longest sample the given maximum lengths are.
        poisoned: packed only, a sample whose keys and values are all NaN, which no other sample may see; or None.
        values: what the scores look like. "large" multiplies the queries by `strength`, "sink" one key of each sample;
            with "edge" that key's scores exceed the others' by about `strength`.
    """

    seed: int
    case: int
    form: Form
    dtype: torch.dtype
    head_dim: int
    heads: int
    key_heads: int
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    rows_q: int
    rows_k: int
    scale: float | None
    storage_q: str
    storage_kv: str
    gives_q_lens: bool
    slack: int
    poisoned: int | None
    values: Values
    strength: float


@dataclass
class Judged:
    """How one problem came out: relative error, absolute error of the lse, what else was wrong, seconds of the call."""

    error: float
    lse_error: float
    allowed: float
    seconds: float
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and self.lse_error <= LSE_TOLERANCE and not self.faults


# --- problems ---------------------------------------------------------------------------------------------------------


def problem(seed: int, case: int, longest: int = LONGEST) -> Problem:
    """The problem number `case` of `seed`, with lengths up to `longest`."""
    draw = Random(f"{seed}/{case}")
    head_dim = draw.choices((64, 128, 80, 96), weights=(42, 42, 8, 8))[0]
    odd = head_dim == 128 and draw.random() < 0.06
    # Each form, dtype, kind of pointer and of stride is one more variant for a kernel to be compiled in: what is rare
    # is not tried in all of them.
    rare = odd or head_dim not in (64, 128)
    form: Form = "padded" if rare else draw.choices(("dense", "padded", "packed"), weights=(2, 5, 3))[0]
    gives_q_lens = form == "padded" and (rare or draw.random() < 0.6)
    query_lens, key_lens, rows_q, rows_k = _lengths(draw, form, gives_q_lens, longest)
    storages = draw.choices(ODD_STORAGES if odd else ("token-major",) if rare else STORAGES, k=2)
    values: Values = draw.choices(("normal", "large", "sink", "edge"), weights=(70, 8, 8, 14))[0]
    scales = (None, None, None, None, None, None, 0.0, 0.3, 1.0, draw.uniform(0.01, 0.5))
    key_heads = draw.randint(1, 3)
    batch = len(query_lens)
    return Problem(
        seed=seed,
        case=case,
        form=form,
        dtype=torch.bfloat16 if odd else draw.choice((torch.bfloat16, torch.float16)),
        head_dim=head_dim,
        heads=key_heads * draw.choice((1, 1, 2, 3, 4)),
        key_heads=key_heads,
        query_lens=query_lens,
        key_lens=key_lens,
        rows_q=rows_q,
        rows_k=rows_k,
        scale=draw.choice(scales) if values == "normal" else None,
        storage_q=storages[0],
        storage_kv=storages[0] if odd else storages[1],
        gives_q_lens=gives_q_lens,
        slack=draw.choice((0, 0, 1, 300)),
        poisoned=draw.randrange(batch) if form == "packed" and batch > 1 and draw.random() < 0.5 else None,
        values=values,
        strength=draw.uniform(75.0, 110.0) if values == "edge" else draw.uniform(5.0, 60.0),
    )


def _lengths(
    draw: Random, form: Form, gives_q_lens: bool, longest: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Lengths of the samples' queries and keys, and the sizes of the tensors that hold them."""
    batch = draw.randint(1, 4)
    query_lens = tuple(_length(draw, longest) for _ in range(batch))
    key_lens = tuple(_length(draw, longest) for _ in range(batch))
    spare_q, spare_k = draw.choices((0, 0, 1, 37, 200), k=2)
    if form == "packed":
        return query_lens, key_lens, sum(query_lens) + spare_q, sum(key_lens) + spare_k
    if form == "dense":
        return query_lens[:1] * batch, key_lens[:1] * batch, query_lens[0], key_lens[0]
    rows_q = max(query_lens) + spare_q
    return query_lens if gives_q_lens else (rows_q,) * batch, key_lens, rows_q, max(key_lens) + spare_k


def _length(draw: Random, longest: int) -> int:
    """0 ... longest: often at or beside a multiple of a tile size, now and then 0 or 1, small as often as large."""
    kind = draw.random()
    if kind < 0.06:
        return 0
    if kind < 0.12:
        return 1
    if kind < 0.5:
        edge = draw.choice(EDGES)
        return min(longest, edge * draw.randint(1, max(1, longest // edge)) + draw.choice((-1, 0, 0, 1)))
    return round(longest ** draw.uniform(0.2, 1.0))


# --- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(one: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, rows_q, H, D) and k, v (B, rows_k, Hk, D) with the problem's strides; packed ones have a batch of 1."""
    batch = 1 if one.form == "packed" else len(one.query_lens)
    generator = torch.Generator(device).manual_seed(one.seed * 1_000_003 + one.case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=one.dtype, device=device)

    q_heads, kv_heads, dim = one.heads, one.key_heads, one.head_dim
    if one.storage_q == one.storage_kv == "fused" and one.rows_q == one.rows_k:
        fused = normal(batch, one.rows_q, q_heads + 2 * kv_heads, dim)
        q, k, v = fused.split([q_heads, kv_heads, kv_heads], dim=2)
        return q, k, v

    def stored(storage: str, rows: int, heads: int) -> Tensor:
        if storage == "head-major":
            return normal(batch, heads, rows, dim).transpose(1, 2)
        if storage == "sequence-first":
            return normal(rows, batch, heads, dim).transpose(0, 1)
        if storage == "pitched":
            return normal(batch, rows, heads, dim + 8)[..., :dim]
        if storage == "odd pitch":
            return normal(batch, rows, heads, dim + 1)[..., :dim]
        if storage == "odd offset":
            return normal(batch * rows * heads * dim + 1)[1:].view(batch, rows, heads, dim)
        if storage == "shared head":
            return normal(batch, rows, 1, dim).expand(-1, -1, heads, -1)
        return normal(batch, rows, heads, dim)

    q = stored(one.storage_q, one.rows_q, q_heads)
    if one.storage_kv == "fused":
        k, v = normal(batch, one.rows_k, 2 * kv_heads, dim).split([kv_heads, kv_heads], dim=2)
        return q, k, v
    return q, stored(one.storage_kv, one.rows_k, kv_heads), stored(one.storage_kv, one.rows_k, kv_heads)


def _set_values(one: Problem, q: Tensor, k: Tensor) -> None:
    """Change the normal q and k into what `one.values` says."""
    if one.values == "normal":
        return
    if one.values == "large":
        _writable(q).mul_(one.strength)
        return
    draw = Random(f"{one.seed}/{one.case}/values")
    sinks = []
    for b, length in enumerate(one.key_lens):
        if length:
            batch, rows, _ = _spans(one, b)[1]
            # Not among the last keys where there are others: they are where a kernel may take its bearings from.
            sinks.append((batch, rows.start + draw.randrange(max(1, length - LAST_KEYS))))
    if one.values == "sink":
        for batch, row in sinks:
            _writable(k)[batch, row] *= one.strength
        return
    # A direction that all queries share and that the sinks point to: 40 long in the queries, so that the sink's length,
    # which the queries' other parts meet, stays small.
    direction = q.new_full((one.head_dim,), one.head_dim**-0.5)
    _writable(q).add_(40 * direction)
    for batch, row in sinks:
        _writable(k)[batch, row] = one.strength * one.head_dim**0.5 / 40 * direction


def _writable(x: Tensor) -> Tensor:
    """`x` (B, S, H, D), or its first head where that is all of them in memory."""
    return x[:, :, :1] if x.stride(2) == 0 else x


def _spans(one: Problem, b: int) -> tuple[tuple[int, slice, slice], tuple[int, slice, slice]]:
    """Where sample `b` lies in q and in k, v: (index of the batch, its rows, in the padded form the rows past them)."""
    spans = []
    for lens in (one.query_lens, one.key_lens):
        first = sum(lens[:b]) if one.form == "packed" else 0
        rows = slice(first, first + lens[b])
        spans.append((0, rows, slice(0, 0)) if one.form == "packed" else (b, rows, slice(lens[b], None)))
    return spans[0], spans[1]


def _plant_nan(one: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
    """NaN in every row that belongs to no sample, and in the keys and values of the poisoned one."""
    nan = float("nan")
    q, k, v = (_writable(x) for x in (q, k, v))
    for b in range(len(one.query_lens)):
        (batch_q, _, past_q), (batch_k, rows_k, past_k) = _spans(one, b)
        q[batch_q, past_q] = nan
        for x in (k, v):
            x[batch_k, past_k] = nan
            if one.poisoned == b:
                x[batch_k, rows_k] = nan
    if one.form == "packed":
        q[0, sum(one.query_lens) :] = nan
        for x in (k, v):
            x[0, sum(one.key_lens) :] = nan


# --- one problem ------------------------------------------------------------------------------------------------------


def judge(one: Problem, device: torch.device) -> Judged:
    """Run a problem through the public functions and compare with float64."""
    q, k, v = _inputs(one, device)
    _set_values(one, q, k)
    _plant_nan(one, q, k, v)
    start = time.perf_counter()
    with _empty_is_nan():
        out, lse = _call(one, q, k, v)
    seconds = time.perf_counter() - start
    judged = Judged(0.0, 0.0, TOLERANCES[one.dtype], seconds)
    _compare(one, (q, k, v), out, lse, judged)
    return judged


def _call(one: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, rows_q, H, D) and lse (B, H, rows_q), also where packed."""
    device = q.device
    if one.form == "packed":
        offsets = cu_seqlens(one.query_lens, device), cu_seqlens(one.key_lens, device)
        longest = max(one.query_lens) + one.slack, max(one.key_lens) + one.slack
        out, lse = flash_attention_varlen(q[0], k[0], v[0], *offsets, *longest, scale=one.scale, return_lse=True)
        return out[None], lse[None]
    kv_lens = None if one.form == "dense" else lens_tensor(one.key_lens, device)
    q_lens = lens_tensor(one.query_lens, device) if one.gives_q_lens else None
    return flash_attention(q, k, v, kv_lens=kv_lens, q_lens=q_lens, scale=one.scale, return_lse=True)


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Fresh memory is filled with NaN in the block: an element that a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _compare(one: Problem, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, judged: Judged) -> None:
    q, k, v = qkv
    squares = torch.zeros(2, dtype=torch.float64, device=q.device)  # of the difference, of the reference
    lse_error = torch.zeros((), dtype=torch.float64, device=q.device)
    sampled = torch.zeros(out.shape[:2], dtype=torch.bool, device=q.device)
    wrong: dict[str, Tensor] = {}
    for b in range(len(one.query_lens)):
        (batch_q, rows_q, _), (batch_k, rows_k, _) = _spans(one, b)
        sampled[batch_q, rows_q] = True
        if one.poisoned == b:
            continue
        got, got_lse = out[batch_q, rows_q], lse[batch_q, :, rows_q]
        expected, expected_lse = attention_float64(
            q[batch_q, rows_q], k[batch_k, rows_k], v[batch_k, rows_k], one.scale
        )
        wrong[f"sample {b}: output not finite"] = ~got.isfinite().all()
        squares += torch.stack([(got.double() - expected).square().sum(), expected.square().sum()])
        if one.key_lens[b] == 0:
            wrong[f"sample {b}: without keys, but not zeros with lse -inf"] = got.any() | ~got_lse.isneginf().all()
        elif got_lse.numel():
            relative = (got_lse.double() - expected_lse).abs() / (expected_lse.abs() / LSE_SCALE).clamp(min=1.0)
            lse_error = torch.maximum(lse_error, relative.amax())
    wrong["rows of no sample are not zeros"] = out[~sampled].ne(0).any()
    wrong["rows of no sample have an lse"] = ~lse.transpose(1, 2)[~sampled].isneginf().all()
    # One read of the device for all of it.
    values = torch.stack([*squares, lse_error, *(flag.double() for flag in wrong.values())]).tolist()
    difference, reference, judged.lse_error = values[:3]
    judged.error = (difference / reference) ** 0.5 if reference > 0 else difference**0.5
    judged.faults += [name for name, flag in zip(wrong, values[3:], strict=True) if flag]


# --- many -------------------------------------------------------------------------------------------------------------


def sweep(
    seed: int, cases: int, device: torch.device, longest: int = LONGEST, progress: bool = False
) -> tuple[list[tuple[Problem, Judged]], float]:
    """Judge problems 0 ... cases - 1; what came out, and the seconds it took."""
    start = time.perf_counter()
    judged = []
    for case in range(cases):
        one = problem(seed, case, longest)
        judged.append((one, judge(one, device)))
        if progress and (case + 1) % 100 == 0:
            failed = sum(not result.passed for _, result in judged)
            print(f"  {case + 1} problems, {failed} failed, {time.perf_counter() - start:.0f} s", flush=True)
    return judged, time.perf_counter() - start


def checks(judged: list[tuple[Problem, Judged]], seconds: float) -> list[Check]:
    """One check per dtype."""
    found = []
    for dtype in dict.fromkeys(one.dtype for one, _ in judged):
        group = [result for one, result in judged if one.dtype == dtype]
        found.append(
            Check(
                check="random attention problems",
                cases=len(group),
                failures=sum(not result.passed for result in group),
                dtype=dtype_name(dtype),
                worst=_worst([result.error for result in group]),
                allowed=TOLERANCES[dtype],
                notes={
                    "worst_lse": _worst([result.lse_error for result in group]),
                    "allowed_lse": LSE_TOLERANCE,
                    "seed": judged[0][0].seed,
                    "seconds_of_all": seconds,
                },
            )
        )
    return found


def _worst(errors: list[float]) -> float | None:
    """The largest; None where one is NaN or infinite, which JSON cannot hold (the check has then failed)."""
    worst = max(errors, key=lambda error: float("inf") if error != error else error)
    return worst if worst < float("inf") else None


def report(judged: list[tuple[Problem, Judged]], longest: int) -> list[str]:
    """What failed, in full, with the command that runs it again."""
    lines = []
    size = "" if longest == LONGEST else f" --longest {longest}"
    for one, result in judged:
        if not result.passed:
            lines.append(
                f"case {one.case}: error {result.error:.2e} (allowed {result.allowed:.1e}), lse {result.lse_error:.1e},"
                f" faults: {'; '.join(result.faults) or 'none'}\n    {one}\n"
                f"    python -m benchmarks.random_shapes --seed {one.seed} --case {one.case}{size}"
            )
    return lines


def random_shapes(device: torch.device) -> Result:
    """A thousand problems on a GPU; forty short ones on a CPU."""
    cases, longest = (CASES, LONGEST) if device.type == "cuda" else (40, 200)
    judged, seconds = sweep(SEED, cases, device, longest, progress=True)
    slow = sum(result.seconds for _, result in judged if result.seconds > 0.25)
    lines = [f"{cases} problems in {seconds:.1f} s, {slow:.1f} s of it in calls of over 0.25 s (compiling)"]
    return [*lines, *report(judged, longest)], [*checks(judged, seconds)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help=f"(default: {SEED})")
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help=f"how many (default: {CASES})")
    parser.add_argument("--case", type=int, metavar="I", help="only this one")
    parser.add_argument(
        "--longest", type=int, default=LONGEST, metavar="S", help=f"largest length (default: {LONGEST})"
    )
    options = parser.parse_args()
    if options.cases < 1 or options.longest < 1 or (options.case is not None and options.case < 0):
        parser.error("cases and longest must be at least 1, case at least 0")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.case is not None:
        one = problem(options.seed, options.case, options.longest)
        judged = [(one, judge(one, device))]
        print(one, judged[0][1], sep="\n")
    else:
        judged, seconds = sweep(options.seed, options.cases, device, options.longest, progress=True)
        print(*checks(judged, seconds), sep="\n")
    failures = report(judged, options.longest)
    print(*failures, f"{len(judged)} problems judged, {len(failures)} failed", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
