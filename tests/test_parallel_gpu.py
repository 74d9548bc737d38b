"""Attention over ranks on a GPU, which two processes share, by the transport `host`: prepared in the ring's buffer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import launch
from reference import error
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("para_kernels._C")

from para_kernels import flash_attention
from para_kernels.graphs import Recorded, capture_for, outside
from para_kernels.parallel.attention import context_parallel_attention
from para_kernels.parallel.mesh import build_mesh
from para_kernels.preparation import Norm, Stream, prepare_attention, unprepared
from para_kernels.sources import Unprepared

pytestmark = pytest.mark.gpu

ROUNDING = 6e-3


@dataclass(frozen=True)
class Case:
    """Rows of text and of image on each rank; whether the values are in one tensor."""

    text: tuple[int, int]
    image: tuple[int, int]
    batch: int = 1
    heads: int = 24
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    joined: bool = False

    def streams(self) -> list[list[Stream]]:
        """Of each rank, the same in every process."""
        torch.manual_seed(0)
        norm = Norm("rms", torch.rand(self.head_dim, device="cuda").to(self.dtype) + 0.5, round_first=True)
        return [[self._stream(rows, norm) for rows in of_rank] for of_rank in zip(self.text, self.image, strict=True)]

    def _stream(self, rows: int, norm: Norm) -> Stream:
        shape = (self.batch, rows, 3, self.heads, self.head_dim)
        angles = torch.randn(rows, self.head_dim, device="cuda")
        projections = torch.randn(shape, device="cuda").to(self.dtype).unbind(2)
        return Stream(*projections, norm, norm, (angles.cos(), angles.sin()))


CASES = {
    "FLUX": Case((512, 0), (1792, 2304)),
    "joined values": Case((0, 0), (777, 900), 2, 6, 64, torch.float16, joined=True),
    "uneven": Case((100, 0), (500, 1311), 2, 4),
    "a rank without rows": Case((50, 0), (500, 0), 1, 4),
}


def errors(rank: int, world: int, case: Case) -> list[float]:
    """Of calls one after the other, so that both slots are used, and of a recording and its replays."""
    torch.cuda.set_device(0)
    torch.set_grad_enabled(False)
    mesh = build_mesh(1, world, 1, "cuda")
    of_ranks = case.streams()
    whole = [torch.cat(parts, 1) for parts in zip(*map(prepare_attention, of_ranks), strict=True)]
    lengths = [text + image for text, image in zip(case.text, case.image, strict=True)]
    start = sum(lengths[:rank])
    expected = flash_attention(whole[0][:, start : start + lengths[rank]], whole[1], whole[2])
    own, value = of_ranks[rank], None
    if case.joined:
        value = torch.cat([stream.value for stream in own if stream.value is not None], 1)
        own = [stream._replace(value=None) for stream in own]
    source = unprepared(own, value=value)

    def attend(*tensors: Tensor | None) -> Tensor:
        *of_source, out = tensors
        made: Unprepared = source.with_tensors(of_source)
        outlines = (made.outline,) * 3
        how = {"lengths": lengths, "transport": "host", "out": out, "source": made}
        return context_parallel_attention(*outlines, mesh=mesh, **how)

    def between_graphs() -> Tensor:
        inputs = [None if x is None else x + 0 for x in source.tensors]
        return outside(attend, *inputs, out=source.new_result) * 2

    found = [error(attend(*source.tensors, None), expected) for _ in range(4)]
    capture = capture_for(torch.device("cuda", 0))
    assert capture is not None
    with capture.around():
        between_graphs()
    recorded = Recorded()
    doubled = recorded.record(between_graphs, capture)
    found.append(error(doubled / 2, expected))
    for _ in range(3):
        doubled.zero_()
        recorded.replay()
        found.append(error(doubled / 2, expected))
    torch.cuda.synchronize()  # A rank without rows has compared nothing, and others still wait for what it enqueued.
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_prepared_in_the_rings_buffer(case: Case) -> None:
    for found in launch(2, errors, case, timeout=120.0):
        assert isinstance(found, list), found
        assert max(found) <= ROUNDING
