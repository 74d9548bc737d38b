"""What the ranks of tests/test_diffusers_parallel.py do: every case of their world size, and what was seen of each."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from para_kernels import AdaCache, ContextParallel, FirstBlockCache, TeaCache
from para_kernels.cache import Policy, StepRecord
from para_kernels.integrations.diffusers import (
    accelerate,
    apply_cache_on_pipe,
    parallelize_pipe,
)
from para_kernels.integrations.diffusers.toy import TOY_PIPELINE
from para_kernels.parallel import RankFailure, transport

TIMEOUT = 60.0  # of a rank that waits for another: the machine may be busy
SEEN = dict[str, Any]


@dataclass(frozen=True)
class Equal:
    """The latents of all ranks against those of one process."""

    parallel: dict[str, int]
    prompts: int = 1
    cache: Policy | None = None
    order: str = "together"
    arguments: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)


LONG = {"height": 80, "width": 48, "num_frames": 13, "max_sequence_length": 23}  # 60 video tokens and 23 of text
SHORT = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 5}  # 1 video token and 5 of text
GUIDED = {"negative_prompt": ["down", "up and down"], "true_cfg_scale": 3.0}
CACHE = FirstBlockCache(0.35, warmup_steps=1)
TEACACHE = TeaCache(0.6, rescale=(1.0, 0.0), taylor_order=1)
ADACACHE = AdaCache(1.0, codebook=((0.3, 3), (1.0, 2)))
ENDS = FirstBlockCache(0.35, first_blocks=1, last_blocks=2, taylor_order=2)
TWO_HEADS = {"num_attention_heads": 2}

EQUAL: dict[int, dict[str, Equal]] = {
    2: {
        "ring": Equal({"ring": 2}),
        "ulysses": Equal({"ulysses": 2}),
        "batch": Equal({"batch": 2}, prompts=2),
        "uneven batch": Equal({"batch": 2}, prompts=3, cache=CACHE),
        "different prompts": Equal({"ring": 2}, prompts=3, arguments=LONG),
        "cache first": Equal({"ring": 2}, prompts=2, cache=CACHE, order="cache first"),
        "parallel first": Equal({"ulysses": 2}, prompts=2, cache=CACHE, order="parallel first"),
        "guided": Equal({"ring": 2}, prompts=2, cache=CACHE, arguments=GUIDED),
        "teacache": Equal({"ring": 2}, prompts=2, cache=TEACACHE, arguments=GUIDED),
        "adacache": Equal({"ulysses": 2}, prompts=2, cache=ADACACHE),
        "first and last blocks": Equal({"ring": 2}, prompts=2, cache=ENDS, arguments=LONG),
        "auto": Equal({}, prompts=1, arguments=LONG),
        "auto batch": Equal({}, prompts=2),
    },
    3: {
        "ring": Equal({"ring": 3}, prompts=2, arguments=LONG),
        "ulysses, two heads": Equal({"ulysses": 3}, prompts=2, arguments=LONG, transformer=TWO_HEADS),
        "batch": Equal({"batch": 3}, prompts=3),
        "no dual-stream block, cache": Equal({"ring": 3}, prompts=2, cache=CACHE, transformer={"num_layers": 0}),
        "teacache": Equal({"ring": 3}, prompts=2, cache=TEACACHE, arguments=LONG),
        "adacache, batch": Equal({"batch": 3}, prompts=3, cache=ADACACHE),
        "first and last blocks": Equal({"ulysses": 3}, prompts=2, cache=ENDS, arguments=LONG),
        "every third token compared": Equal(
            {"ring": 3}, prompts=2, cache=FirstBlockCache(0.35, downsample_factor=3), arguments=LONG
        ),
    },
    4: {
        "hybrid": Equal({"ring": 2, "ulysses": 2}, prompts=2, arguments=LONG),
        "hybrid, two heads, cache": Equal(
            {"ring": 2, "ulysses": 2}, prompts=2, cache=CACHE, arguments=LONG, transformer=TWO_HEADS
        ),
        "batch and ring, cache": Equal({"batch": 2, "ring": 2}, prompts=3, cache=CACHE, arguments=LONG),
        "batch and ulysses, cache first": Equal(
            {"batch": 2, "ulysses": 2}, prompts=2, cache=CACHE, order="cache first"
        ),
        "more ranks than heads": Equal({"ulysses": 4}, prompts=2),
        "hardly more tokens than ranks": Equal({"ring": 4}, prompts=2, arguments=SHORT),
    },
}


def install(pipe: Any, case: Equal) -> Any:
    """Put cache and parallelism on in the case's order."""
    parallel = ContextParallel(**case.parallel, timeout=TIMEOUT) if case.parallel else ContextParallel("auto")
    if case.order == "together":
        return accelerate(pipe, cache=case.cache, parallel=parallel)
    assert case.cache is not None
    mesh = parallel.mesh()
    if case.order == "cache first":
        apply_cache_on_pipe(pipe, case.cache.threshold, warmup_steps=case.cache.warmup_steps)
        return parallelize_pipe(pipe, mesh=mesh, timeout=TIMEOUT)
    parallelize_pipe(pipe, mesh=mesh, timeout=TIMEOUT)
    return apply_cache_on_pipe(pipe, case.cache.threshold, warmup_steps=case.cache.warmup_steps)


def equal(case: Equal) -> SEEN:
    pipe = tiny_pipeline(**case.transformer)
    prompts = PROMPTS[: case.prompts]
    alone = accelerate(pipe, cache=case.cache)
    expected = generate(pipe, prompts, steps=6, **case.arguments)
    decided = decisions(alone.records)
    alone.remove()
    handle = install(pipe, case)
    got = generate(pipe, prompts, steps=6, **case.arguments)
    return {
        "difference": float((got - expected).abs().max() / expected.abs().max()),
        "output": digest(got),
        "decisions": decisions(handle.records),
        "alone": decided,
        "summary": handle.summary(),
    }


# --- cases of their own -----------------------------------------------------------------------------------------------


STRADDLED: dict[str, Callable[[float], Policy]] = {
    "straddle": FirstBlockCache,
    "straddle, teacache": partial(TeaCache, rescale=(1.0, 0.0)),
    "straddle, adacache": partial(AdaCache, codebook=((1.0, 3),)),
}


def straddle(make: Callable[[float], Policy]) -> SEEN:
    """A threshold that lies between what the ranks alone would have measured."""
    pipe = tiny_pipeline()
    world = dist.get_world_size()
    everyone = {"prompts": PROMPTS[:2], "steps": 4, **LONG}
    handle = accelerate(pipe, cache=make(1e-9), parallel=ContextParallel(ring=world, timeout=TIMEOUT))
    local = watched_diffs(handle)
    generate(pipe, **everyone)
    diffs = torch.tensor(local)
    pieces = [torch.empty_like(diffs) for _ in range(world)]
    dist.all_gather(pieces, diffs)
    first = [float(piece[0]) for piece in pieces]
    low, *_, high = sorted(first)
    threshold = (low + high) / 2
    local.clear()
    accelerate(pipe, cache=make(threshold))
    got = generate(pipe, **everyone)
    records = decisions(handle.records)
    handle.remove()
    alone = accelerate(pipe, cache=make(threshold))
    expected = generate(pipe, **everyone)
    return {
        "would have reused": first[dist.get_rank()] < threshold,
        "decisions": records,
        "alone": decisions(alone.records),
        "output": digest(got),
        "difference": float((got - expected).abs().max() / expected.abs().max()),
    }


def watched_diffs(handle: Any) -> list[float]:
    """The diffs of this rank's own rows, as they come."""
    spread, diffs = handle.spread, []
    reduce = spread.reduce

    def watched(sums: Tensor) -> Tensor:
        diffs.append(float(sums[0] / sums[1]) if sums[1] else -1.0)
        return reduce(sums)

    spread.reduce = watched
    return diffs


def remove() -> SEEN:
    pipe = tiny_pipeline()
    stock = generate(pipe)
    pipe.set_progress_bar_config(disable=True, desc="mine")
    before = traces(pipe)
    handle = parallelize_pipe(pipe, timeout=TIMEOUT)
    apply_cache_on_pipe(pipe, 0.2)
    generate(pipe)
    accelerate(pipe, cache=None, parallel=None)
    without = generate(pipe)
    apply_cache_on_pipe(pipe, 0.0)
    parallelize_pipe(pipe, timeout=TIMEOUT)
    first = generate(pipe)
    groups = ring_groups(handle)
    kept = [group in transport._selected for group in groups]
    handle.remove()
    after = traces(pipe)
    equal = torch.equal(generate(pipe), stock)
    given_back = [group not in transport._selected for group in groups]
    again = parallelize_pipe(pipe, timeout=TIMEOUT)
    second = generate(pipe)
    again.remove()
    return {
        "same": after == before,
        "equal": equal,
        "without": digest(without),
        "given back": given_back,
        "kept": kept,
        "again": torch.equal(first, second),
    }


def ring_groups(handle: Any) -> list[dist.ProcessGroup]:
    """The groups that keys and values have gone round."""
    places = handle.settings.parallel
    found = [place.ring_group for place in (places.fixed, *places._chosen.values()) if place is not None]
    return [group for group in found if group.size() > 1]


def buffers(rank: int, world: int, library: str) -> SEEN:
    """The pipeline over `peer` on a driver without a GPU, taken off and put on again. For a world of its own."""
    from fake_ring import CPU, FakePeer

    class Peer(FakePeer):
        def ring(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            results = super().ring(*args, **kwargs)
            self._synchronize()  # what comes next is computed by the host
            return results

    pipe = tiny_pipeline()
    stock = generate(pipe, PROMPTS[:2])
    alone = accelerate(pipe)
    expected = generate(pipe, PROMPTS[:2])
    alone.remove()
    held, differences = [], []
    for _ in range(2):
        handle = accelerate(pipe, parallel=ContextParallel(ring=world, timeout=TIMEOUT))
        (group,) = ring_groups(handle)
        peer = Peer(group, library)
        transport._selected[group] = {(CPU, "auto"): transport.Selection(peer, "a test")}
        differences.append(float((generate(pipe, PROMPTS[:2]) - expected).abs().max() / expected.abs().max()))
        held.append(peer.memory_bytes)
        accelerate(pipe, cache=0.1)
        handle.remove()
        held.append(peer.memory_bytes)
    return {
        "differences": differences,
        "held": held,
        "registered": ctypes.c_uint.in_dll(ctypes.CDLL(library), "registered").value,
        "watches": [thread.name for thread in threading.enumerate() if thread.name.endswith(" watch")],
        "equal": torch.equal(generate(pipe, PROMPTS[:2]), stock),
    }


def traces(pipe: Any) -> list[Any]:
    modules = pipe.transformer.named_modules()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return [
        sorted((name, str(value)) for name, value in vars(pipe).items() if name != "transformer" and name[0] == "_"),
        "prepare_latents" in vars(pipe),
        [
            (name, sorted(vars(module)), [len(vars(module)[kind]) for kind in hooks if kind in vars(module)])
            for name, module in modules
        ],
    ]


def retune() -> SEEN:
    """From ring to ulysses to one rank, by calling again."""
    pipe = tiny_pipeline()
    world = dist.get_world_size()
    handle = accelerate(pipe)
    expected = generate(pipe)
    differences = []
    for parallel in (ContextParallel(ring=world), ContextParallel(ulysses=world), None):
        assert accelerate(pipe, parallel=parallel) is handle
        differences.append(float((generate(pipe) - expected).abs().max()))
    return {"differences": differences, "summary": handle.summary()}


def shapes() -> SEEN:
    """Calls of other shapes, the cache on: also one where the shards of some ranks only change their shape."""
    pipe = tiny_pipeline()
    handle = parallelize_pipe(pipe, timeout=TIMEOUT)
    apply_cache_on_pipe(pipe, 0.3)
    differences = []
    for arguments in (LONG, SHORT, LONG | {"max_sequence_length": 24}, LONG):
        got = generate(pipe, PROMPTS[:2], **arguments)
        alone = tiny_pipeline()
        accelerate(alone, cache=0.3)
        differences.append(float((got - generate(alone, PROMPTS[:2], **arguments)).abs().max() / got.abs().max()))
    # The same without a scheduler to tell one call from another.
    transformer = pipe.transformer
    outputs = []
    for text_tokens in (24, 25, 23, 24):
        torch.manual_seed(text_tokens)
        with torch.no_grad():
            outputs.append(
                transformer(
                    hidden_states=torch.randn(2, 4, 3, 6, 4),
                    timestep=torch.full((2,), 500.0),
                    encoder_hidden_states=torch.randn(2, text_tokens, 16),
                    encoder_attention_mask=torch.ones(2, text_tokens),
                    pooled_projections=torch.randn(2, 8),
                    guidance=torch.full((2,), 6000.0),
                ).sample
            )
    return {"differences": differences, "outputs": [digest(output) for output in outputs], "steps": len(handle.records)}


def noise() -> SEEN:
    """Nobody has given a generator, and every rank has another state of the global one."""
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    expected = generate(pipe, PROMPTS[:1], generator=None)
    parallelize_pipe(pipe, timeout=TIMEOUT)
    torch.manual_seed(dist.get_rank())
    got = generate(pipe, PROMPTS[:1], generator=None)
    given = torch.full((1, 4, 3, 6, 4), float(dist.get_rank()))
    generate(pipe, PROMPTS[:1], latents=given)
    return {
        "output": digest(got),
        "difference": float((got - expected).abs().max() / expected.abs().max()),
        "given": float(given.max()),
        "quiet": bool(pipe._progress_bar_config.get("disable")),
    }


def progress() -> SEEN:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=False)
    handle = parallelize_pipe(pipe, timeout=TIMEOUT)
    quiet = pipe._progress_bar_config["disable"]
    handle.remove()
    return {"quiet": quiet, "after": pipe._progress_bar_config["disable"]}


def refused() -> SEEN:
    """What is refused, by message; then the pipe as it was."""
    pipe = tiny_pipeline()
    stock = generate(pipe)
    rank, world = dist.get_rank(), dist.get_world_size()
    other_mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    before = traces(pipe)
    calls: dict[str, Callable[[], Any]] = {
        "sizes": lambda: accelerate(pipe, parallel=ContextParallel(ring=world + 1)),
        "mesh": lambda: parallelize_pipe(pipe, mesh=other_mesh),
        "type": lambda: accelerate(pipe, parallel=2),  # type: ignore[arg-type]
        "transport": lambda: parallelize_pipe(pipe, transport="pigeon"),
        "timeout": lambda: parallelize_pipe(pipe, timeout=0),
        "pipe": lambda: parallelize_pipe(object()),
        "other sizes": lambda: accelerate(pipe, parallel=ContextParallel(**{("ring", "ulysses")[rank % 2]: world})),
    }
    messages = {name: message_of(call) for name, call in calls.items()}
    unchanged = traces(pipe) == before and torch.equal(generate(pipe), stock)

    handle = accelerate(pipe, parallel=ContextParallel(batch=world, timeout=TIMEOUT))
    late: dict[str, Callable[[], Any]] = {
        "too few samples": lambda: generate(pipe, PROMPTS[:1]),
        "stochastic": lambda: generate(stochastic(pipe), [PROMPTS[0]] * world),
        "other prompts": lambda: generate(pipe, [PROMPTS[rank % 2]] * world),
        "other shapes": lambda: generate(pipe, [PROMPTS[0]] * world, height=48 + 16 * rank),
        "other cache": lambda: (accelerate(pipe, cache=0.1 * (rank + 1)), generate(pipe, [PROMPTS[0]] * world)),
    }
    messages |= {name: message_of(call) for name, call in late.items()}
    accelerate(pipe, cache=None)
    prompts = [*PROMPTS, PROMPTS[0]][:world]
    works = digest(generate(pipe, prompts))
    handle.remove()
    return {"messages": messages, "unchanged": unchanged, "works": works, "same": traces(pipe) == before}


def stochastic(pipe: Any) -> Any:
    """Another pipe of the same parts, but for the scheduler."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    other = type(pipe)(**(pipe.components | {"scheduler": scheduler}))
    other.set_progress_bar_config(disable=True)
    accelerate(other)
    return other


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def after_failure() -> SEEN:
    """A second pipe on the same transformer, and a forward that fails in the middle, leave nothing behind."""
    pipe = tiny_pipeline()
    expected = generate(pipe, PROMPTS[:2])
    handle = parallelize_pipe(pipe, timeout=TIMEOUT)
    hook = pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(fail)
    with suppress(KeyError):
        generate(pipe, PROMPTS[:2])
    hook.remove()
    twin = type(pipe)(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    parallelize_pipe(twin, timeout=TIMEOUT)
    results = [float((generate(one, PROMPTS[:2]) - expected).abs().max()) for one in (pipe, twin)]
    handle.remove()
    return {"differences": results, "clean": all("prepare_latents" not in vars(one) for one in (pipe, twin))}


def fail(*_: Any) -> None:
    raise KeyError("in the middle of a forward")


def toy() -> SEEN:
    """The shipped pipeline: the video itself, cached, against one process."""
    from para_kernels.integrations.diffusers.generate import Acceleration, Request, generate
    from para_kernels.integrations.diffusers.loading import load_pipeline

    pipe = load_pipeline(str(TOY_PIPELINE), torch.device("cpu"), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    request = Request(("a handwritten 7 moving to the left", "seven, up"), 64, 64, 9, 5, 6.0)
    alone = Acceleration(cache=0.6).install(pipe)
    expected = generate(pipe, request).videos
    reused = decisions(alone.records)
    alone.remove()
    handle = Acceleration(cache=0.6, parallel=ContextParallel(ring=2, timeout=TIMEOUT)).install(pipe)
    got = generate(pipe, request).videos
    return {
        "difference": float(abs(got - expected).max()),
        "decisions": decisions(handle.records),
        "alone": reused,
        "output": digest(torch.from_numpy(got)),
    }


def death(rank: int, world: int) -> str:
    """Rank 1 dies in the third step; what the others say. For a world of its own."""
    pipe = tiny_pipeline()
    parallelize_pipe(pipe, timeout=TIMEOUT)
    steps = iter(range(10))

    def die(*_: Any) -> None:
        if rank == 1 and next(steps) == 2:
            os._exit(0)

    pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(die)
    try:
        generate(pipe, PROMPTS[:1])
    except RankFailure as error:
        return str(error)
    return "nobody noticed"


STRADDLING = (2, 3)  # worlds
OTHERS: dict[int, list[Callable[[], SEEN]]] = {
    2: [remove, retune, noise, progress, refused, after_failure, toy],
    3: [shapes, noise],
    4: [remove],
}


# --- the process ------------------------------------------------------------------------------------------------------


def decisions(records: list[StepRecord]) -> list[Any]:
    return [[record.branch, record.step, record.reused, record.diff] for record in records]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def run(rank: int, world: int) -> dict[str, SEEN]:
    """All cases of a world size. After one that fails the ranks may stand at different places: it is the last."""
    cases: dict[str, Callable[[], SEEN]] = {name: partial(equal, case) for name, case in EQUAL[world].items()}
    if world in STRADDLING:
        cases |= {name: partial(straddle, make) for name, make in STRADDLED.items()}
    cases |= {case.__name__: case for case in OTHERS[world]}
    seen: dict[str, SEEN] = {}
    for name, case in cases.items():
        try:
            seen[name] = case()
        except Exception:
            seen[name] = {"error": traceback.format_exc()}
            break
    return seen
