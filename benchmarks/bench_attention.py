"""Attention against its peers: dense, with key lengths, and packed.

Run: ``python -m pytest benchmarks/bench_attention.py``. On CUDA the shapes are HunyuanVideo's (24 heads of 128); on a
CPU they are of the shipped small pipeline's order of size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.inputs import attention_flops, attention_inputs, cu_seqlens, key_mask, lens_tensor
from benchmarks.peers import ATTENTION_PEERS, SDPA_MASKED, PeerUnavailableError, attention_peer, sdpa
from benchmarks.record import OURS
from para_kernels import flash_attention, flash_attention_varlen

ON_GPU = torch.cuda.is_available()
LENGTHS = (4096, 16384) if ON_GPU else (512, 1536)
HEADS, HEAD_DIM = (24, 128) if ON_GPU else (4, 64)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# Video tokens plus a text of 256 of which a part is padding: four prompts of clearly different lengths.
TEXT_TOKENS = 256
VALID_TEXT = (12, 56, 120, 250)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", [OURS, *ATTENTION_PEERS])
def test_dense(kernel: str, length: int, device: torch.device, measure: Callable[..., None]) -> None:
    q, k, v = attention_inputs(1, length, HEADS, HEAD_DIM, DTYPE, device)
    try:
        attention = flash_attention if kernel == OURS else attention_peer(kernel, device)
    except PeerUnavailableError as reason:
        pytest.skip(str(reason))
    measure(
        lambda: attention(q, k, v),
        op="flash_attention",
        shape={"B": 1, "S": length, "H": HEADS, "D": HEAD_DIM},
        dtype=DTYPE,
        kernel=kernel,
        flops=attention_flops([length], [length], HEADS, HEAD_DIM),
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", [OURS, SDPA_MASKED])
def test_key_lengths(kernel: str, length: int, device: torch.device, measure: Callable[..., None]) -> None:
    lens = [length - TEXT_TOKENS + valid for valid in VALID_TEXT]
    q, k, v = attention_inputs(len(lens), length, HEADS, HEAD_DIM, DTYPE, device)
    kv_lens, mask = lens_tensor(lens, device), key_mask(lens, length, device)
    measure(
        (lambda: flash_attention(q, k, v, kv_lens=kv_lens)) if kernel == OURS else (lambda: sdpa(q, k, v, mask)),
        op="flash_attention_kv_lens",
        shape={"B": len(lens), "S": length, "H": HEADS, "D": HEAD_DIM},
        dtype=DTYPE,
        kernel=kernel,
        flops=attention_flops([length] * len(lens), lens, HEADS, HEAD_DIM),
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", [OURS, "SDPA per sample"])
def test_packed(kernel: str, length: int, device: torch.device, measure: Callable[..., None]) -> None:
    lens = [length - TEXT_TOKENS + valid for valid in VALID_TEXT]
    q, k, v = (x[0] for x in attention_inputs(1, sum(lens), HEADS, HEAD_DIM, DTYPE, device))
    offsets = cu_seqlens(lens, device)

    def ours() -> object:
        return flash_attention_varlen(q, k, v, offsets, offsets, max(lens), max(lens))

    def per_sample() -> object:
        samples = zip(*(x[None].split(lens, dim=1) for x in (q, k, v)), strict=True)
        return [sdpa(*sample) for sample in samples]

    measure(
        ours if kernel == OURS else per_sample,
        op="flash_attention_varlen",
        shape={"B": len(lens), "T": sum(lens), "H": HEADS, "D": HEAD_DIM},
        dtype=DTYPE,
        kernel=kernel,
        flops=attention_flops(lens, lens, HEADS, HEAD_DIM),
    )
