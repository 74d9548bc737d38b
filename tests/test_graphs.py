"""Functions recorded as graphs, and calls between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake_graphs import FakeCapture
from torch import Tensor

from para_kernels.graphs import Capture, CudaCapture, Recorded, capture_for, instead, leave_out, outside, rejoin

CPU = torch.device("cpu")


class Function:
    """y = 3 * f(x + 1) + 1, where f is outside and adds `self.added`."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.x = torch.arange(4.0, device=device)
        self.added = 10.0
        self.runs = 0

    def f(self, x: Tensor, none: Tensor | None, out: Tensor | None) -> Tensor:
        assert none is None
        return x + self.added

    def __call__(self) -> Tensor:
        self.runs += 1
        inner = self.x + 1
        return 3 * outside(self.f, inner, None, out=lambda: torch.empty_like(inner)) + 1

    def expected(self) -> Tensor:
        return 3 * (self.x + 1 + self.added) + 1


def check_replays(function: Function, capture: Capture) -> None:
    recorded = Recorded()
    y = recorded.record(function, capture)
    assert torch.equal(y, function.expected())
    for i in range(3):
        function.x += i
        function.added -= 1.0
        recorded.replay()
        assert torch.equal(y, function.expected())
    assert (function.runs, recorded.graphs, recorded.calls) == (1, 2, 1)


def test_a_replay_reads_the_memory_of_the_recording_and_calls_what_is_outside() -> None:
    check_replays(Function(), FakeCapture())


def test_outside_of_a_recording_a_call_is_just_a_call() -> None:
    x = torch.ones(3)
    assert outside(lambda y, out: y, x, out=lambda: pytest.fail("is not needed")) is x


def test_calls_inside_of_a_call_outside_belong_to_it() -> None:
    def inner(x: Tensor, out: Tensor | None) -> Tensor:
        return outside(lambda y, none: y + 1, x, out=lambda: pytest.fail("is not needed"))

    x = torch.zeros(2)
    recorded = Recorded()
    y = recorded.record(lambda: outside(inner, x, out=lambda: torch.empty(2)), FakeCapture())
    assert torch.equal(y, torch.ones(2))
    assert recorded.calls == 1


def test_what_is_written_to_the_recordings_memory_is_not_copied() -> None:
    class InPlace(Function):
        copies = 0

        def f(self, x: Tensor, none: Tensor | None, out: Tensor | None) -> Tensor:
            assert out is not None
            return torch.add(x, self.added, out=out)

    function, copy = InPlace(), Tensor.copy_

    def counted(self: Tensor, other: Tensor) -> Tensor:
        function.copies += self.data_ptr() == other.data_ptr()
        return copy(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "copy_", counted)
        check_replays(function, FakeCapture())
    assert function.copies == 0


def fails_in_a_graph() -> Tensor:
    return torch.zeros(1) + torch.ones(1).item()


def fails_outside() -> Tensor:
    def fail(x: Tensor, out: Tensor | None) -> Tensor:
        raise RuntimeError("operation failed")

    return outside(fail, torch.ones(1), out=lambda: torch.ones(1))


@pytest.mark.parametrize(("function", "calls"), [(fails_in_a_graph, 0), (fails_outside, 1)])
def test_a_failure_ends_the_recording(function: Callable[[], Tensor], calls: int) -> None:
    capture, recorded = FakeCapture(), Recorded()
    with pytest.raises(RuntimeError, match="operation"):
        recorded.record(function, capture)
    assert recorded.calls == calls
    assert torch.ones(1).item() == 1.0
    check_replays(Function(), capture)


# --- parts that are left out ------------------------------------------------------------------------------------------


class Cached:
    """Layers of which a run leaves the middle out where `x` has changed by less than 1 since it last did not: what
    those added then is added again, doubled to tell it apart. `decided` stands for a decision that has been made."""

    def __init__(self, device: torch.device = CPU, size: int = 4) -> None:
        self.x = torch.arange(float(size), device=device)
        self.runs = self.called = 0
        self.decided: bool | None = None
        self.kept: tuple[Tensor, Tensor] | None = None
        self.decisions: list[bool] = []

    def close(self, first: Tensor, none: Tensor | None) -> bool:
        assert none is None
        decided, self.decided = self.decided, None
        if decided is not None:
            return decided
        self.decisions.append(self.kept is not None and (first - self.kept[0]).abs().max().item() < 1)
        if not self.decisions[-1]:
            self.kept = (first.clone(), first)
        return self.decisions[-1]

    def remember(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        assert self.kept is not None
        self.kept = (self.kept[0], after[0] - before[0])

    def added(self, before: Sequence[Tensor]) -> Sequence[Tensor]:
        assert self.kept is not None
        return [before[0] + 2 * self.kept[1]]

    def middle(self, y: Tensor) -> Tensor:
        for _ in range(6):
            wide = torch.cat([y, y * 2])
            y = (wide[: y.numel()] - wide[y.numel() :] * 0.25) + outside(lambda z, out: z * 0.1 + 1, y, out=y.clone)
        return y

    def call(self, y: Tensor, out: Tensor | None) -> Tensor:
        self.called += 1
        return y + 0.25

    def __call__(self) -> Tensor:
        self.runs += 1
        constant = self.x.flip(0) * 3
        first = outside(self.call, self.x * 1.5 + 1, out=lambda: torch.empty_like(self.x)) * 1.25
        if leave_out(self.close, first, None):
            (last,) = instead(self.added, [first])
        else:
            last = self.middle(first)
            rejoin(self.remember, self.added, [first], [last])
        del first
        return (last + constant) * 0.5 + self.x


CHANGES = [0.0, 0.1, 0.2, 3.0, 0.1, 5.0, 0.0, 0.3, 0.2, 0.1, 0.2, 2.0]


def check_parts(function: Cached, plain: Cached, capture: Capture) -> None:
    """In replays the same values and the same decisions as without, whatever the order of hits and misses."""
    recorded = Recorded()
    y = recorded.record(function, capture)
    assert torch.equal(y, plain())
    check_replays_of_parts(recorded, y, function, plain)
    assert (function.runs, recorded.graphs, recorded.calls, recorded.parts) == (1, 10, 7, 1)


def check_replays_of_parts(recorded: Recorded, y: Tensor, function: Cached, plain: Cached) -> None:
    for change in CHANGES:
        for one in (function, plain):
            one.x += change
        assert recorded.replay() is None
        assert torch.equal(y, plain())
    assert function.decisions == plain.decisions
    assert function.called == plain.called
    assert set(function.decisions) == {True, False}
    assert recorded.is_whole
    assert recorded.has_parts


def test_a_replay_leaves_out_what_it_is_told_to() -> None:
    check_parts(Cached(), Cached(), FakeCapture())


def check_hits_alone(function: Cached, plain: Cached, capture: Capture) -> None:
    """What was recorded without the part serves until the part is to run; then it is recorded anew, with the part, and
    what had been decided and called until then is not decided and called again."""
    recorded = Recorded()
    for one in (function, plain):
        one()
        one.x += 0.1
    y = recorded.record(function, capture)
    assert torch.equal(y, plain())
    for _ in range(3):
        for one in (function, plain):
            one.x += 0.1
        assert recorded.replay() is None
        assert torch.equal(y, plain())
    function.x += 7
    plain.x += 7
    made = recorded.replay()
    assert made is not None
    assert (len(made), recorded.has_parts) == (1, False)
    function.decided = function.decisions[-1]
    anew = Recorded()
    y = anew.record(function, capture, made)
    assert torch.equal(y, plain())
    assert function.decisions == plain.decisions == [False, True, True, True, True, False]
    assert function.called == plain.called
    assert ((recorded.graphs, recorded.calls), (anew.graphs, anew.calls)) == ((4, 1), (10, 7))
    check_replays_of_parts(anew, y, function, plain)


def test_a_run_that_leaves_a_part_out() -> None:
    check_hits_alone(Cached(), Cached(), FakeCapture())


def test_a_part_without_an_end_makes_no_recording() -> None:
    recorded = Recorded()
    y = recorded.record(lambda: torch.ones(2) + float(leave_out(lambda: False)), FakeCapture())
    assert torch.equal(y, torch.ones(2))
    assert not recorded.is_whole


def test_an_error_between_graphs_is_no_matter_of_recording() -> None:
    def fails() -> bool:
        raise RuntimeError("out of memory")

    recorded, capture = Recorded(), FakeCapture()
    with pytest.raises(RuntimeError, match="out of memory"):
        recorded.record(lambda: torch.ones(2) + float(leave_out(fails)), capture)
    assert not recorded.is_repeatable
    check_replays(Function(), capture)


def test_outside_of_a_recording_parts_are_plain_calls() -> None:
    seen: list[Any] = []
    x = torch.ones(3)
    assert leave_out(lambda y: y is x, x)
    assert instead(lambda streams: [streams[0]], [x])[0] is x
    rejoin(lambda *streams: seen.append(streams), pytest.fail, [x], [x])
    assert seen == [([x], [x])]


def test_nothing_records_on_a_cpu() -> None:
    assert capture_for(CPU) is None


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    check_replays(Function(device), CudaCapture(device))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [4, 1 << 18])
def test_parts_on_a_gpu(size: int) -> None:
    """Where memory is used again: the part's by what is made before it and behind it."""
    device = torch.device("cuda")
    check_parts(Cached(device, size), Cached(device, size), CudaCapture(device))


@pytest.mark.gpu
def test_parts_that_were_left_out_on_a_gpu() -> None:
    device = torch.device("cuda")
    capture = CudaCapture(device)
    check_hits_alone(Cached(device), Cached(device), capture)
    check_parts(Cached(device), Cached(device), capture)


@pytest.mark.gpu
def test_borrowed_memory_has_the_same_strides() -> None:
    capture = CudaCapture(torch.device("cuda"))
    x = torch.randn(3, 5, 7, device="cuda").transpose(0, 2)[1:, :, 1:]
    borrowed = capture.borrowed(x)
    assert torch.equal(borrowed, x)
    assert (borrowed.stride(), borrowed.data_ptr()) == (x.stride(), x.data_ptr())
    assert capture.borrowed(x[:0]).shape == x[:0].shape


@pytest.mark.gpu
def test_memory_that_is_let_go_of_is_used_again_in_the_same_order() -> None:
    """Many steps, each with memory of its own size that the next ones may take, across calls outside."""
    x = torch.randn(1 << 16, device="cuda")

    def function() -> Tensor:
        y = x
        for i in range(20):
            wide = torch.cat([y, y + 1])
            y = outside(lambda z, out: z * 1.5, wide[: y.numel()] + wide[y.numel() :], out=lambda like=y: like.clone())
            y = y * (0.25 if i % 2 else 0.3)
        return y

    expected = function()
    recorded = Recorded()
    y = recorded.record(function, CudaCapture(torch.device("cuda")))
    for _ in range(2):
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        x.copy_(torch.randn_like(x))
        expected = function()
        recorded.replay()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_device_usable() -> None:
    device = torch.device("cuda")
    capture = CudaCapture(device)
    with pytest.raises(RuntimeError):
        Recorded().record(lambda: torch.zeros(1, device=device) + torch.ones(1, device=device).item(), capture)
    assert torch.ones(1, device=device).item() == 1.0
    torch.cuda.empty_cache()
    check_replays(Function(device), CudaCapture(device))
