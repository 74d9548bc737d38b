"""How benchmarks time, the inputs that they make, and the peers that they run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import inputs, peers, timing
from para_kernels import flash_attention, merge_states, residual_diff

CPU = torch.device("cpu")


# --- timing -----------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_none_is_timed_less_than_three_times() -> None:
    calls: list[str] = []
    times = timing.medians_ms(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, seconds=0.0, warmup=2
    )
    # Another one begins each round: none always follows the same other.
    assert calls == ["a"] * 2 + ["b"] * 2 + ["a", "b"] + ["b", "a"] + ["a", "b"]
    assert set(times) == {"a", "b"}


def test_no_more_rounds_than_asked_for() -> None:
    calls: list[int] = []
    timing.medians_ms({"a": lambda: calls.append(1)}, CPU, rounds=5, seconds=60.0, warmup=0)
    assert len(calls) == 5


def test_small_calls_are_timed_together_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def eight_ms(together: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
        for run in together.values():
            run()
        return dict.fromkeys(together, 8.0)

    monkeypatch.setattr(timing, "_host_medians", eight_ms)
    calls = [lambda i=i: seen.append(i) for i in range(4)]
    assert timing.graph_medians_ms({"four": calls, "one": calls[:1]}, CPU) == {"four": 2.0, "one": 8.0}
    assert seen == [0, 1, 2, 3, 0]


@pytest.mark.gpu
def test_a_graph_times_the_device_alone() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(1 << 20, device=device)
    out = [torch.zeros_like(x) for _ in range(3)]
    times = timing.graph_medians_ms({"exp": [lambda y=y: torch.exp(x, out=y) for y in out]}, device, rounds=3)
    assert times["exp"] > 0
    for y in out:
        torch.testing.assert_close(y, x.exp())


def test_the_hosts_time_is_per_call() -> None:
    calls: list[int] = []
    assert timing.host_microseconds(lambda: calls.append(1), CPU, calls=10, samples=3) > 0
    assert len(calls) == 20 + 30  # twenty to warm up


# --- inputs and peers -------------------------------------------------------------------------------------------------


def test_lengths_as_masks_offsets_and_work() -> None:
    lens = (3, 0, 5)
    assert inputs.key_mask(lens, 5, CPU).shape == (3, 1, 1, 5)
    assert inputs.key_mask(lens, 5, CPU).sum(-1).flatten().tolist() == list(lens)
    assert inputs.cu_seqlens(lens, CPU).tolist() == [0, 3, 3, 8]
    # Two products of (q, d) x (d, k) and (q, k) x (k, d) per head, a multiplication and an addition each.
    assert inputs.attention_flops([2, 3], [5, 7], heads=4, head_dim=8) == 2 * 2 * 4 * 8 * (2 * 5 + 3 * 7)


def test_peers_compute_what_this_package_computes() -> None:
    q, k, v = inputs.attention_inputs(2, 33, 4, 16, torch.float32, CPU)
    lens = (33, 20)
    ours = flash_attention(q, k, v, kv_lens=inputs.lens_tensor(lens, CPU))
    torch.testing.assert_close(peers.sdpa(q, k, v, inputs.key_mask(lens, 33, CPU)), ours, atol=1e-5, rtol=1e-5)

    lse = [torch.randn(2, 4, 33) for _ in range(2)]
    eager = peers.eager_merge_states(q, lse[0], k, lse[1])
    torch.testing.assert_close(eager, merge_states(q, lse[0], k, lse[1]), atol=1e-5, rtol=1e-5)

    residual, change, size = peers.eager_residual_diff(q, k, v)
    ours_residual, sums = residual_diff(q, k, v)
    torch.testing.assert_close(residual, ours_residual)
    torch.testing.assert_close(torch.stack([change, size]) * q.numel(), sums, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in peers.ATTENTION_PEERS if name != "SDPA"])
def test_a_peer_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(peers.PeerUnavailableError, match=name):
        peers.attention_peer(name, CPU)


def test_a_peer_that_refuses_an_input_says_why() -> None:
    def refuses() -> None:
        raise RuntimeError("FP16 is not in this build\nat line 5")

    assert peers.runs(refuses) == "FP16 is not in this build"
    assert peers.runs(lambda: None) is None


@pytest.mark.parametrize("make", [peers.fa3_packed, peers.fa3_padded])
def test_flash_attention_3_with_lengths_needs_cuda(make: Callable[[torch.device], object]) -> None:
    with pytest.raises(peers.PeerUnavailableError, match="FlashAttention-3"):
        make(CPU)
