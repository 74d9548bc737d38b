"""A transformer's forward as graphs, by graphs that need no GPU: the same output, and Python runs no more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import accelerate as accelerate_library
import graph_ranks
import ranks
from compile_ranks import difference
from fake_graphs import fake_capture_for
from tiny_families import TINY, generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline, transformer_inputs

from para_kernels import FirstBlockCache
from para_kernels import graphs as recorded_graphs
from para_kernels.graphs import outside
from para_kernels.integrations.diffusers import accelerate, cli, graphs
from para_kernels.integrations.diffusers import generate as generate_module
from para_kernels.integrations.diffusers.generate import Acceleration

ranks.preload("graph_ranks")
pytestmark = pytest.mark.usefixtures("one_thread")

ERROR = 1e-5  # float32, of the largest latent
LONG: dict[str, Any] = {"height": 80, "width": 48, "max_sequence_length": 5}


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture_for", fake_capture_for)


class Counted:
    """A pipe, and how often its first block's forward runs in Python."""

    def __init__(self, **settings: Any) -> None:
        self.pipe = tiny_pipeline()
        self.runs = 0
        self.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(self._count)
        self.handle = accelerate(self.pipe, **settings)

    def _count(self, *_: Any) -> None:
        self.runs += 1

    @property
    def counts(self) -> list[tuple[int, int, int]]:
        (recorded,) = self.handle.graphs
        return [(one.recorded.graphs, one.recorded.calls, one.replays) for one in recorded.forwards.values()]


def expected(**arguments: Any) -> torch.Tensor:
    pipe = tiny_pipeline()
    accelerate(pipe)
    return generate(pipe, **arguments)


@pytest.mark.usefixtures("recording")
def test_the_second_forward_of_a_size_is_recorded_and_the_others_are_replays() -> None:
    counted = Counted(graphs=True)
    assert "none yet" in counted.handle.summary()
    assert torch.equal(generate(counted.pipe), expected())
    assert (counted.runs, counted.counts) == (2, [(1, 0, 2)])
    assert torch.equal(generate(counted.pipe, PROMPTS[::-1]), expected(prompts=PROMPTS[::-1]))
    assert (counted.runs, counted.counts) == (2, [(1, 0, 6)])
    assert torch.equal(generate(counted.pipe, **LONG), expected(**LONG))
    assert (counted.runs, counted.counts) == (4, [(1, 0, 6), (1, 0, 2)])
    assert torch.equal(generate(counted.pipe), expected())
    assert counted.runs == 4
    assert "graphs      2 forward(s) recorded: 1 graphs and 0 calls between" in counted.handle.summary()


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("name", TINY)
def test_every_family_but_one_can_be_recorded(name: str) -> None:
    pipe = tiny_family(name)
    handle = accelerate(pipe)
    want = generate_family(name, pipe, guided=True)
    accelerate(pipe, graphs=True)
    assert torch.equal(generate_family(name, pipe, guided=True), want)
    if name.startswith("HunyuanVideo 1.5"):  # Its forward picks the text's rows by a mask, whose sum the host reads.
        assert all("cannot be recorded" in str(known.obstacle) for known in handle.graphs)
    else:
        assert all(known.obstacle is None for known in handle.graphs)
        assert any(one.replays for known in handle.graphs for one in known.forwards.values())


@pytest.mark.usefixtures("recording")
def test_an_output_is_not_overwritten_by_the_next_forward() -> None:
    pipe = tiny_pipeline()
    accelerate(pipe, graphs=True)
    transformer: Any = pipe.transformer
    with torch.no_grad():
        for _ in range(2):
            transformer(**transformer_inputs())
        first = transformer(**transformer_inputs(), return_dict=False)[0]
        first = transformer(**transformer_inputs()).sample
        kept = first.clone()
        transformer(**transformer_inputs(seed=1))
    assert torch.equal(first, kept)


@pytest.mark.usefixtures("recording")
def test_lengths_of_the_text_are_those_of_the_call() -> None:
    counted = Counted(graphs=True)
    plain = tiny_pipeline()
    accelerate(plain)
    with torch.no_grad():
        for lengths in ((5, 11), (7, 3), (1, 1), (11, 11)):
            inputs = transformer_inputs(lengths=lengths)
            got, want = (x.transformer(**inputs).sample for x in (counted.pipe, plain))  # type: ignore[operator]
            assert torch.equal(got, want)
    assert counted.runs == 2


@pytest.mark.usefixtures("recording")
def test_beside_8_bits() -> None:
    pipe = tiny_pipeline()
    accelerate(pipe, attention="int8")
    want = generate(pipe)
    handle = accelerate(pipe, attention="int8", graphs=True)
    assert torch.equal(generate(pipe), want)
    assert [one.replays for one in handle.graphs[0].forwards.values()] == [2]


# --- weights ----------------------------------------------------------------------------------------------------------


def moved(pipe: Any) -> None:
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.usefixtures("recording")
def test_weights_that_have_moved_are_recorded_anew() -> None:
    counted = Counted(graphs=True)
    generate(counted.pipe)
    moved(counted.pipe)
    with torch.no_grad():
        counted.pipe.transformer.proj_out.weight.mul_(2)  # type: ignore[union-attr]
    other = tiny_pipeline()
    accelerate(other)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(generate(counted.pipe), generate(other))
    assert (counted.runs, counted.counts) == (4, [(1, 0, 2)])


@pytest.mark.usefixtures("recording")
def test_weights_that_keep_moving_end_it(caplog: pytest.LogCaptureFixture) -> None:
    counted = Counted(graphs=True)
    counted.pipe.transformer.register_forward_pre_hook(lambda *_: moved(counted.pipe))  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(counted.pipe, steps=8), expected(steps=8))
    assert [record.message for record in caplog.records if "graphs" in record.message] == [
        "graphs: the weights move from one forward to the next, as they do when they are offloaded; it runs without"
    ]
    assert "graphs      none now: the weights move" in counted.handle.summary()
    assert counted.counts == []


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading_of_the_whole_model(offload_first: bool) -> None:
    """After every call it unwraps the transformer's forward, and wraps it anew."""
    counted = Counted()
    put_on: list[Callable[[], Any]] = [
        lambda: accelerate_library.cpu_offload_with_hook(counted.pipe.transformer, torch.device("cpu")),  # type: ignore[arg-type]
        lambda: accelerate(counted.pipe, graphs=True),
    ]
    for put in put_on if offload_first else put_on[::-1]:
        put()
    assert torch.equal(generate(counted.pipe), expected())
    assert counted.runs == 2


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recording")
def test_a_forward_that_waits_for_the_device_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    counted = Counted(graphs=True)
    block: Any = counted.pipe.transformer.single_transformer_blocks[0]  # type: ignore[union-attr]
    block.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(counted.pipe), expected())
    messages = [record.message for record in caplog.records if "graphs" in record.message]
    reason = "the forward cannot be recorded: operation not permitted when stream is capturing"
    assert messages == [f"graphs: {reason}; it runs without"]
    assert f"graphs      none now: {reason}" in counted.handle.summary()
    accelerate(counted.pipe)
    assert "none yet" in counted.handle.summary()


@contextmanager
def with_adapters(pipe: Any) -> Iterator[None]:
    pipe.transformer._hf_peft_config_loaded = True
    with torch.no_grad():
        yield
    del pipe.transformer._hf_peft_config_loaded


@contextmanager
def under_autocast(pipe: Any) -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def with_gradients(pipe: Any) -> Iterator[None]:
    pipe.transformer.requires_grad_(False)
    with torch.enable_grad():
        yield


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize(
    ("way", "obstacle"),
    [(with_adapters, "LoRA adapters"), (under_autocast, "autocast is on"), (with_gradients, "gradients are on")],
)
def test_what_no_graph_would_follow_runs_as_always(way: Callable[[Any], Any], obstacle: str) -> None:
    counted = Counted(graphs=True)
    with way(counted.pipe):
        for _ in range(3):
            counted.pipe.transformer(**transformer_inputs())  # type: ignore[operator]
        assert (counted.runs, counted.counts) == (3, [])
        assert obstacle in counted.handle.summary()
    with torch.no_grad():
        for _ in range(3):
            counted.pipe.transformer(**transformer_inputs())  # type: ignore[operator]
    assert (counted.runs, counted.counts) == (5, [(1, 0, 1)])
    assert "none now" not in counted.handle.summary()


@pytest.mark.usefixtures("recording")
def test_plain_arguments_that_are_equal_and_not_the_same() -> None:
    counted = Counted(graphs=True)
    with torch.no_grad():
        for value in (False, False, False, 0, 0):
            counted.pipe.transformer(**transformer_inputs(), return_dict=value)  # type: ignore[operator]
    assert counted.runs == 4


@pytest.mark.usefixtures("recording")
def test_inference_mode_has_recordings_of_its_own() -> None:
    counted = Counted(graphs=True)
    want = expected()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(generate(counted.pipe), want)
    assert len(counted.counts) == 2


@pytest.mark.usefixtures("recording")
def test_arguments_that_are_not_plain() -> None:
    counted = Counted(graphs=True)
    with torch.no_grad():
        for _ in range(3):
            counted.pipe.transformer(**transformer_inputs(), attention_kwargs={"what": object()})  # type: ignore[operator]
    assert (counted.runs, counted.counts) == (3, [])
    assert "graphs      none now: an argument of the forward is a object" in counted.handle.summary()


class FailsOutside:
    """In the place of `outside`'s function: the first call in a recording fails."""

    def __call__(self, function: Any, *inputs: Any, out: Any) -> torch.Tensor:
        def fail(*inputs: Any) -> torch.Tensor:
            raise RuntimeError("out of memory")

        recording = getattr(recorded_graphs._here, "recording", None)
        return outside(function if recording is None else fail, *inputs, out=out)


@pytest.mark.usefixtures("recording")
def test_a_failure_behind_a_call_outside_is_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On several ranks: what is made once more there would be made once less elsewhere."""
    counted = Counted(graphs=True)
    block: Any = counted.pipe.transformer.single_transformer_blocks[0]  # type: ignore[union-attr]
    fails = FailsOutside()
    block.register_forward_hook(
        lambda module, args, output: (fails(lambda x, out: x.clone(), output[0], out=output[0].clone), output[1])
    )
    with torch.no_grad():
        counted.pipe.transformer(**transformer_inputs())  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="out of memory"):
            counted.pipe.transformer(**transformer_inputs())  # type: ignore[operator]
        for _ in range(3):
            counted.pipe.transformer(**transformer_inputs())  # type: ignore[operator]
    assert "graphs      none now: the forward cannot be recorded: out of memory" in counted.handle.summary()


def test_a_cpu_runs_as_always() -> None:
    counted = Counted(graphs=True)
    assert torch.equal(generate(counted.pipe), expected())
    assert (counted.runs, counted.counts) == (4, [])


def test_refused() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="graphs: got 1, allowed is True or False"):
        accelerate(pipe, graphs=1)  # type: ignore[arg-type]
    assert "forward" not in pipe.transformer.__dict__
    pipe.transformer.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="graphs: the forward of the HunyuanVideoTransformer3DModel has been replaced"):
        accelerate(pipe, graphs=True)
    del pipe.transformer.forward
    pipe.transformer._cache_config = object()
    with pytest.raises(ValueError, match="graphs: diffusers' own cache is enabled"):
        accelerate(pipe, graphs=True)
    pipe.transformer._cache_config = None


@pytest.mark.usefixtures("recording")
def test_remove_leaves_nothing_behind() -> None:
    pipe = tiny_pipeline()
    generate(pipe, steps=1)  # which gives the transformer an empty registry of diffusers' hooks
    before = dict(pipe.transformer.__dict__)
    want = expected()
    handle = accelerate(pipe, graphs=True)
    generate(pipe)
    handle.remove()
    assert dict(pipe.transformer.__dict__) == before
    assert handle.graphs == []
    accelerate(pipe, graphs=True)
    generate(pipe)
    assert not accelerate(pipe, graphs=False).graphs
    assert torch.equal(generate(pipe), want)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "wanted"), [([], False), (["--graphs"], True)])
def test_the_option(monkeypatch: pytest.MonkeyPatch, options: list[str], wanted: bool) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(generate_module, "run", jobs.append)
    assert cli.main(["generate", "a 7", "--device", "cpu", *options]) == 0
    assert jobs[0].acceleration.install(tiny_pipeline()).settings.graphs is wanted


def test_the_option_and_others() -> None:
    with pytest.raises(ValueError, match="attention: 'stock'; must be exact or int8 with graphs"):
        Acceleration(attention="stock", graphs=True).check()
    settings = Acceleration(graphs=True, cache=0.1).install(tiny_pipeline()).settings
    assert (settings.graphs, settings.cache) == (True, FirstBlockCache(0.1))


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=[2, 3])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    own, world = tmp_path_factory.getbasetemp(), request.param
    return ranks.results_of_all(own, f"graphs-{world}", world, graph_ranks.run, timeout=240.0)


def test_ranks_replay_and_call_attention_between(spread: list[Any]) -> None:
    """A warm-up, a recording and two replays of each size, then four replays; attention of five blocks, a gathering."""
    for seen in spread:
        for way, found in seen["hunyuan"].items():
            assert found["worst"] <= ERROR
            calls = 1 if way == "batch" else 6
            assert found["counts"] == [(calls + 1, calls, 6)] * 2
        assert "graphs      2 forward(s) recorded: 7 graphs and 6 calls between" in seen["hunyuan"]["ring"]["summary"]


def test_other_families_over_ranks(spread: list[Any]) -> None:
    assert all(error <= ERROR for seen in spread for error in seen["families"].values())


def test_the_difference_can_be_seen() -> None:
    assert difference(expected(), expected(prompts=PROMPTS[::-1])) > 100 * ERROR
