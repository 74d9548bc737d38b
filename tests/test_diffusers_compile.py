"""Compiled blocks: one graph for every resolution, below every hook, whatever is put on in which order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import accelerate as accelerate_library
import pytest
import torch
import torch._dynamo

pytest.importorskip("diffusers")

import compile_ranks
import ranks
from accelerate.hooks import remove_hook_from_module
from compile_ranks import difference, graphs
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from tiny_families import generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import FirstBlockCache, flash_attention
from para_kernels.integrations.diffusers import accelerate, apply_cache_on_pipe, cli, compiled
from para_kernels.integrations.diffusers import generate as generate_module
from para_kernels.integrations.diffusers.compiled import CompiledForward
from para_kernels.integrations.diffusers.generate import Acceleration
from para_kernels.integrations.diffusers.outside import Outside
from para_kernels.preparation import Norm, Stream, unprepared
from para_kernels.sources import Unprepared, as_they_are

ranks.preload("compile_ranks")
pytestmark = pytest.mark.usefixtures("one_thread")

ERROR = 1e-5  # float32, of the largest latent
CPU = torch.device("cpu")
CACHE = FirstBlockCache(0.35, warmup_steps=1)
SIZES: list[dict[str, Any]] = [
    {"height": 80, "width": 48, "num_frames": 13},
    {"height": 64, "width": 48, "num_frames": 5, "max_sequence_length": 13},
    {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 17},
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def all_blocks(pipe: Any) -> list[Any]:
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_one_graph_for_each_kind_of_block_and_every_resolution() -> None:
    """Batches of two prompts with the cache and without, then of one and of four."""
    pipe = tiny_pipeline()
    handle = accelerate(pipe)
    calls: list[dict[str, Any]] = [{"cache": cache, **size} for size in ({}, *SIZES) for cache in (None, CACHE)]
    calls += [{"cache": None, "prompts": PROMPTS[:1], **size} for size in SIZES]
    calls += [{"cache": None, "prompts": PROMPTS[:2] * 2, **SIZES[0]}]

    def call(cache: Any, prompts: list[str] = PROMPTS[:2], **arguments: Any) -> torch.Tensor:
        accelerate(pipe, cache=cache)
        return generate(pipe, prompts, steps=3, **arguments)

    expected = [call(**arguments) for arguments in calls]
    accelerate(pipe, compile="eager")
    start, counts = graphs(), []
    for arguments, uncompiled in zip(calls, expected, strict=True):
        assert difference(call(**arguments), uncompiled) <= ERROR
        counts.append(graphs() - start)
    assert counts == [2] * 8 + [4] * 4  # a batch of one is another graph to torch.compile
    assert "compile     2 x HunyuanVideoTransformerBlock, 3 x HunyuanVideoSingleTransformerBlock;" in handle.summary()
    assert "; eager" in handle.summary()


FAMILIES = {  # One of those with the same blocks, and graphs: where the last block has no text left it is another kind.
    "FLUX.1-dev": 2,
    "FLUX.2-dev": 2,
    "HunyuanVideo image to video, as the first frame": 2,
    "HunyuanVideo 1.5": 1,
    "Wan 2.1": 1,
    "Wan 2.2 A14B": 2,  # one for each transformer
    "CogVideoX-2b": 1,
    "CogVideoX-5b": 1,
    "Mochi": 2,
    "Stable Diffusion 3": 2,
    "Stable Diffusion 3.5 medium": 2,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_compiles_without_breaks(name: str) -> None:
    pipe = tiny_family(name)
    accelerate(pipe)
    expected = [generate_family(name, pipe, guided=True, steps=2, prompts=prompts) for prompts in (2, 3)]
    handle = accelerate(pipe, compile="eager")
    start = graphs()
    for prompts, uncompiled in zip((2, 3), expected, strict=True):
        got = generate_family(name, pipe, guided=True, steps=2, prompts=prompts)
        assert difference(got, uncompiled) <= ERROR
    assert graphs() - start == FAMILIES[name]
    handle.remove()
    assert not any(isinstance(module.forward, CompiledForward) for module in pipe.transformer.modules())


@pytest.mark.slow
def test_inductor() -> None:
    pipe = tiny_pipeline(num_layers=0, num_single_layers=2)
    accelerate(pipe)
    expected = generate(pipe, PROMPTS[:2], steps=2)
    accelerate(pipe, compile=True)
    assert difference(generate(pipe, PROMPTS[:2], steps=2), expected) <= ERROR


def test_the_operator_of_attention_outside() -> None:
    called = []

    def attend(streams: Unprepared, lens: torch.Tensor | None) -> torch.Tensor:
        called.append(lens)
        return flash_attention(*streams.prepared(), kv_lens=lens).transpose(1, 2).contiguous().transpose(1, 2)

    outside = Outside(joint=attend, video=flash_attention_alone)
    text, image = torch.randn(3, 2, 2, 3, 16).unbind(), torch.randn(3, 2, 3, 3, 16).unbind()
    norm = Norm("rms", torch.randn(16))
    lens = torch.tensor([2, 3], dtype=torch.int32)
    op: Any = torch.ops.para_kernels.attend_outside.default
    rotary = (torch.rand(3, 16), torch.rand(3, 16))
    parted = unprepared([Stream(*text, norm, None), Stream(*image, None, norm, rotary)])
    joined = unprepared([Stream(*image[:2], None, norm)], value=image[2])
    for streams in (parted, joined, as_they_are(*image)):
        torch.library.opcheck(op, (outside.ticket, False, *streams, lens))
        assert all(seen is not None for seen in called)
        assert torch.equal(op(outside.ticket, False, *streams, lens), outside.joint.unprepared(streams, lens))
        assert torch.equal(op(outside.ticket, True, *streams, None), flash_attention(*streams.prepared()))
        called.clear()
    assert torch.equal(outside.video(*image, None), flash_attention(*image))


def flash_attention_alone(streams: Unprepared, lens: torch.Tensor | None) -> torch.Tensor:
    return flash_attention(*streams.prepared())


# --- hooks ------------------------------------------------------------------------------------------------------------


class Watched:
    """Stands in for torch.compile: knows how often compiled code and foreign hooks have run, and whether it is
    running.
    """

    def __init__(self) -> None:
        self.calls = self.foreign = 0
        self.running = False
        self.options: list[dict[str, Any]] = []

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        self.options.append(options)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.running = True
            try:
                return function(*args, **kwargs)
            finally:
                self.running = False

        return run


class Foreign(ModelHook):
    """Somebody else's hook on a block: it must run for every block that is called, and never in compiled code."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert not self.watched.running
        self.watched.foreign += 1
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        assert not self.watched.running
        return output


class ForeignAround(Foreign):
    """The other kind of hook, which calls the block itself."""

    fn_ref: Any

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert not self.watched.running
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(torch, "compile", watched)
    return watched


@pytest.mark.parametrize("kind", [Foreign, ForeignAround])
@pytest.mark.parametrize("order", list(itertools.permutations(["compile", "cache", "foreign"])), ids=" ".join)
def test_hooks_stay_outside_in_every_order(watched: Watched, order: tuple[str, ...], kind: type[Foreign]) -> None:
    pipe = tiny_pipeline()
    stock = generate(pipe)
    handle = accelerate(pipe, cache=CACHE)
    expected = generate(pipe)
    computed = sum(not record.reused for record in handle.records)
    assert 0 < computed < len(handle.records)
    handle.remove()
    install: dict[str, Callable[[], Any]] = {
        "compile": lambda: accelerate(pipe, compile=True),
        "cache": lambda: apply_cache_on_pipe(pipe, CACHE.threshold, warmup_steps=CACHE.warmup_steps),
        "foreign": lambda: [
            HookRegistry.check_if_exists_or_initialize(block).register_hook(kind(watched), "foreign")
            for block in all_blocks(pipe)
        ],
    }
    for name in order:
        install[name]()
    handle = accelerate(pipe)
    assert torch.equal(generate(pipe), expected)
    # A reused step runs the first block alone.
    assert watched.calls == 5 * computed + (len(handle.records) - computed)
    assert watched.foreign >= watched.calls
    assert all(options["fullgraph"] and options["dynamic"] for options in watched.options)
    assert len(watched.options) == 2

    accelerate(pipe, compile=False)
    watched.calls = 0
    assert torch.equal(generate(pipe), expected)
    handle.remove()
    watched.foreign = 0
    assert torch.equal(generate(pipe), stock)
    assert watched.calls == 0
    assert watched.foreign == 4 * 5


def test_remove_leaves_nothing_behind(watched: Watched) -> None:
    pipe = tiny_pipeline()
    before = [dict(block.__dict__) for block in all_blocks(pipe)]
    accelerate(pipe, compile=True, cache=CACHE).remove()
    assert [dict(block.__dict__) for block in all_blocks(pipe)] == before
    handle = accelerate(pipe, compile=True)
    apply_cache_on_pipe(pipe, 0.2)
    generate(pipe, steps=1)
    accelerate(pipe, compile=None)
    apply_cache_on_pipe(pipe, 0.0)
    assert [dict(block.__dict__) for block in all_blocks(pipe)] == before
    handle.remove()


def test_the_setting_stays_until_it_is_changed(watched: Watched) -> None:
    pipe = tiny_pipeline()
    assert accelerate(pipe).settings.compile is None
    assert accelerate(pipe, compile=True).settings.compile == "inductor"
    forwards = [block.forward for block in all_blocks(pipe)]
    assert apply_cache_on_pipe(pipe, 0.2).settings.compile == "inductor"
    assert accelerate(pipe, cache=None, compile=True).settings.compile == "inductor"
    assert all(block.forward is forward for block, forward in zip(all_blocks(pipe), forwards, strict=True))
    assert accelerate(pipe, compile="aot_eager").settings.compile == "aot_eager"
    generate(pipe, steps=1)
    assert [options["backend"] for options in watched.options] == ["aot_eager"] * 2
    assert accelerate(pipe, compile=True).settings.compile == "inductor"
    generate(pipe, steps=1)
    assert [options["backend"] for options in watched.options] == ["aot_eager"] * 2 + ["inductor"] * 2
    assert "; inductor" in accelerate(pipe).summary()
    assert accelerate(pipe, compile=False).settings.compile is None
    assert "compile" not in accelerate(pipe).summary()


def test_a_failed_installation_leaves_the_pipe_untouched(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    before = [dict(block.__dict__) for block in all_blocks(pipe)]
    made = itertools.count()
    laid = CompiledForward.__init__

    def fail_at_the_third(*arguments: Any) -> None:
        assert next(made) < 2, "injected"
        laid(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledForward, "__init__", fail_at_the_third)
        with pytest.raises(AssertionError, match="injected"):
            accelerate(pipe, compile=True)
    assert [dict(block.__dict__) for block in all_blocks(pipe)] == before


# --- offload ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_cpu_offload(watched: Watched, offload_first: bool) -> None:
    """After every call it unwraps the transformer's forward, and wraps it anew."""

    def offload() -> None:
        remove_hook_from_module(pipe.transformer, recurse=True)
        accelerate_library.cpu_offload_with_hook(pipe.transformer, CPU)

    pipe = tiny_pipeline()
    stock = generate(pipe)
    expected = uncompiled()
    if offload_first:
        offload()
    handle = accelerate(pipe, compile=True, cache=CACHE)
    for _ in range(2):
        offload()
        before = watched.calls
        assert torch.equal(generate(pipe), expected)
        assert watched.calls > before
    handle.remove()
    assert torch.equal(generate(pipe), stock)


def group_offload(transformer: Any, offload_type: str, blocks: int | None = None) -> None:
    # diffusers 0.36 asks for the accelerator, of which there is none, for streams that are not used.
    with patch.object(torch.accelerator, "current_accelerator", return_value=CPU):
        apply_group_offloading(transformer, CPU, offload_type=offload_type, num_blocks_per_group=blocks)


@pytest.mark.parametrize("offload_first", [True, False])
def test_block_level_group_offload(watched: Watched, offload_first: bool) -> None:
    pipe = tiny_pipeline()
    stock, expected = generate(pipe), uncompiled()
    install: list[Callable[[], Any]] = [
        lambda: accelerate(pipe, compile=True, cache=CACHE),
        lambda: group_offload(pipe.transformer, "block_level", 1),
    ]
    for part in reversed(install) if offload_first else install:
        part()
    assert torch.equal(generate(pipe), expected)
    assert watched.calls > 0
    accelerate(pipe).remove()
    assert torch.equal(generate(pipe), stock)


INSIDE: dict[str, Callable[[Any], Any]] = {
    "GroupOffloadingHook": lambda transformer: group_offload(transformer, "leaf_level"),
    "AlignDevicesHook": lambda transformer: accelerate_library.cpu_offload(transformer, CPU),
}


@pytest.mark.parametrize("hook", INSIDE)
@pytest.mark.parametrize("offload_first", [True, False])
def test_hooks_inside_of_blocks_are_refused(watched: Watched, hook: str, offload_first: bool) -> None:
    pipe = tiny_pipeline()
    message = rf"compile: a {hook} stands on '[a-z0-9_.]+', inside of a HunyuanVideoTransformerBlock; allowed are hooks"
    if offload_first:
        INSIDE[hook](pipe.transformer)
        with pytest.raises(ValueError, match=message):
            accelerate(pipe, compile=True)
        assert not pipe.transformer._forward_pre_hooks
        return
    accelerate(pipe, compile=True)
    INSIDE[hook](pipe.transformer)
    with pytest.raises(ValueError, match=message):
        generate(pipe)
    assert watched.calls == 0


def uncompiled() -> torch.Tensor:
    pipe = tiny_pipeline()
    accelerate(pipe, cache=CACHE)
    return generate(pipe)


# --- what is refused --------------------------------------------------------------------------------------------------


def compiled_already(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].compile(backend="eager")


def forward_replaced(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[1].forward = lambda *args, **kwargs: None


def nothing(pipe: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "wanted", "message"),
    [
        (nothing, "fast", r"compile: got the backend 'fast', allowed is one of \[.*'inductor'"),
        (nothing, 3, r"compile: got 3, allowed is True, False, None or the name of a backend"),
        (compiled_already, True, r"compile: a HunyuanVideoTransformerBlock is compiled already"),
        (forward_replaced, True, r"compile: the forward of a HunyuanVideoSingleTransformerBlock has been replaced"),
    ],
)
def test_refused(prepare: Callable[[Any], None], wanted: Any, message: str) -> None:
    pipe = tiny_pipeline()
    prepare(pipe)
    before = [dict(block.__dict__) for block in all_blocks(pipe)]
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, compile=wanted)
    assert [dict(block.__dict__) for block in all_blocks(pipe)] == before
    assert not pipe.transformer._forward_pre_hooks


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "wanted"), [([], None), (["--compile"], "inductor")])
def test_the_option(monkeypatch: pytest.MonkeyPatch, options: list[str], wanted: str | None) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(generate_module, "run", jobs.append)
    assert cli.main(["generate", "a 7", "--device", "cpu", "--cache", "0.1", *options]) == 0
    assert jobs[0].acceleration.install(tiny_pipeline()).settings.compile == wanted


def test_the_option_needs_this_packages_attention() -> None:
    with pytest.raises(ValueError, match="attention: 'stock'; must be exact or int8 with compile"):
        Acceleration(attention="stock", compile=True).check()


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def spread(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ranks.results_of_all(tmp_path_factory.getbasetemp(), "compiled", 2, compile_ranks.run, timeout=480.0)


def test_ranks_added_and_removed_after_compiling(spread: list[Any]) -> None:
    for seen in spread:
        steps = seen["added_and_removed"]["steps"]
        assert max(error for error, _ in steps.values()) <= ERROR
        assert "compile     3 x HunyuanVideoSingleTransformerBlock" in seen["added_and_removed"]["summary"]


def test_other_resolutions_on_several_ranks_compile_nothing(spread: list[Any]) -> None:
    for seen in spread:
        counts = {name: count for name, (_, count) in seen["added_and_removed"]["steps"].items()}
        assert counts.pop("alone") == 1
        # A rank whose rows are all of the video gets them as text from the second block on.
        assert counts.pop("ring") in (1, 2)
        assert set(counts.values()) == {0}


@pytest.mark.parametrize("order", compile_ranks.ORDERS, ids=", ".join)
def test_ranks_in_every_order(spread: list[Any], order: tuple[str, ...]) -> None:
    assert all(seen["orders"][order] <= ERROR for seen in spread)


def test_two_attentions_over_ranks_in_one_graph(spread: list[Any]) -> None:
    assert all(seen["dual_attention"] <= ERROR for seen in spread)


def test_code_objects_are_apart() -> None:
    """Kinds of blocks and installations must not share the eight graphs that a code object may have."""
    kinds = {type(block) for block in all_blocks(tiny_pipeline())}
    codes = [compiled._compiled(kind, "eager").__wrapped__.__code__ for kind in [*kinds, *kinds]]  # type: ignore[attr-defined]
    assert len({id(code) for code in codes}) == 4
    assert len({code.co_name for code in codes}) == 2
