"""A transformer's forward as CUDA graphs: the device is given whole forwards, and no longer waits for Python.

What is recorded stands below every hook, in the place of the class's own forward. The first forward with shapes that
are new runs as always, the second is recorded, those after it are replays. Over ranks, attention and the gathering at
the end stay calls between the graphs (`para_kernels.graphs`). With a cache of steps, the blocks that it may skip are a
part that a replay may leave out. Where the recorded forward skipped them, the next one that does not is recorded anew.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from para_kernels.graphs import Capture, Recorded, capture_for
from para_kernels.parallel.failure import RankFailure

from .attention import AttentionLengths
from .own_forward import Forward, has_own_forward, replace_own_forward

_KEPT = 4  # recordings, each with memory of its own: the sizes and passes of one pipeline
_SEEN = 64  # calls that have run once
_IN_VAIN = 2  # recordings of which none was replayed, until no more are made
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)

logger = logging.getLogger(__name__)


_TENSOR = object()  # in the place of a tensor among plain arguments
_FAILED = object()  # in the place of an output


@dataclass
class _Arguments:
    """Of a forward: tensors, and all that the graphs of one forward have in common.

    Attributes:
        tensors: in the order in which they are found; the last one is the text's lengths, if there are any.
        plain: what is left, with `_TENSOR` in the tensors' places.
    """

    tensors: list[Tensor]
    plain: tuple[Any, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], of_text: Tensor | None) -> _Arguments:
        leaves, spec = pytree.tree_flatten((args, kwargs, of_text))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return _Arguments(tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    @property
    def key(self) -> Hashable:
        """The same for forwards that one recording serves. 1 and True are not."""
        plain = tuple((type(leaf), leaf) for leaf in self.plain)
        tensors = ((x.shape, x.stride(), x.dtype, x.device) for x in self.tensors)
        return (str(self.spec), plain, torch.is_inference_mode_enabled(), *tensors)

    @property
    def obstacle(self) -> str | None:
        """Why no graph can stand for a forward with these; None if one can."""
        unknown = next((leaf for leaf in self.plain if leaf is not _TENSOR and not isinstance(leaf, _PLAIN)), None)
        if unknown is not None:
            return f"an argument of the forward is a {type(unknown).__name__}"
        if len({x.device for x in self.tensors}) != 1:
            return "the forward's tensors are not all on one device"
        return None

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """args, kwargs and the text's lengths, with other tensors."""
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if leaf is _TENSOR else leaf for leaf in self.plain], self.spec)


@dataclass
class _Forward:
    """A recorded forward and the memory that it reads and writes."""

    recorded: Recorded
    capture: Capture
    inputs: list[Tensor]
    outputs: list[Any]
    spec: pytree.TreeSpec
    replays: int = 0

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Replay it: see `Recorded.replay`."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        made = self.recorded.replay()
        self.replays += made is None
        return made

    def output(self) -> Any:
        """The results, in memory of their own: the next replay overwrites the graph's."""
        return pytree.tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.outputs], self.spec)


class ForwardGraphs:
    """The recordings of one transformer's forward.

    Args:
        lengths: what the attention processors read.
        place: on which ranks the running forward runs, and with what beside its arguments.

    Attributes:
        forwards: the recorded ones, the one used last at the end.
        obstacle: why the last forward was no recording and will not become one; None if it was or may.
    """

    def __init__(self, transformer: nn.Module, lengths: AttentionLengths, place: Callable[[], Hashable]) -> None:
        self.forwards: OrderedDict[Hashable, _Forward] = OrderedDict()
        self.obstacle: str | None = None
        self._transformer = transformer
        self._lengths = lengths
        self._place = place
        self._seen: OrderedDict[Hashable, Capture | None] = OrderedDict()  # None: runs as always
        self._weights: list[int] = []
        self._has_replayed = False
        self._in_vain = 0
        self._given_up = False

    def add_to(self, undo: ExitStack) -> None:
        """Put the graphs in the place of the transformer's own forward; closing `undo` takes them off again."""
        undo.callback(self.clear)
        replace_own_forward(undo, self._transformer, functools.partial(GraphedForward, self))

    def clear(self) -> None:
        """Forget everything: what is recorded holds for settings and weights of its time."""
        self.forwards.clear()
        self._seen.clear()
        self.obstacle = None
        self._has_replayed = False
        self._in_vain = 0
        self._given_up = False

    @torch._disable_dynamo  # Somebody may have compiled what calls this.
    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward, as graphs if it can be."""
        if self._given_up:
            return forward(*args, **kwargs)
        given = _Arguments.of(args, kwargs, self._lengths.of_text)
        self.obstacle = _obstacle(self._transformer) or given.obstacle
        if not self.obstacle:
            self._forget_moved_weights()
        if self.obstacle:
            return forward(*args, **kwargs)
        key = (self._place(), given.key)
        made: list[Tensor] = []
        if key in self.forwards:
            replayed = self._replayed(key, given.tensors)
            if replayed is None:
                return self.forwards[key].output()
            made, self._seen[key] = replayed, self.forwards.pop(key).capture
        as_always = functools.partial(forward, *args, **kwargs)
        if key not in self._seen:
            return self._warmed_up(key, given.tensors[0].device, as_always)
        capture = self._seen[key]
        if capture is None:
            return as_always()
        of_text = self._lengths.of_text
        output = self._recorded(key, capture, forward, given, made)
        if output is not _FAILED:
            return output
        self._lengths.replace(of_text)
        return as_always()

    def _replayed(self, key: Hashable, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """None, or what calls have made until the recording did not serve any more."""
        self.forwards.move_to_end(key)
        made = self.forwards[key].run(tensors)
        self._has_replayed |= made is None
        return made

    def _warmed_up(self, key: Hashable, device: torch.device, forward: Callable[[], Any]) -> Any:
        """Compiling, choices that are made once and the workspaces of libraries do not belong into a graph."""
        capture = capture_for(device)
        if capture is None:
            return forward()
        with capture.around():
            output = forward()
        self._seen[key] = capture
        _keep(self._seen, _SEEN)
        return output

    def _recorded(
        self, key: Hashable, capture: Capture, forward: Forward, given: _Arguments, made: Sequence[Tensor]
    ) -> Any:
        """The output of a forward that is recorded; `_FAILED` if it has to run once more, as always."""
        _keep(self.forwards, _KEPT - 1)
        self._seen[key] = None
        recorded, inputs = Recorded(), [x.clone() for x in given.tensors]
        args, kwargs, of_text = given.with_tensors(inputs)
        self._lengths.replace(of_text)
        try:
            _free_memory(inputs[0].device)
            output = recorded.record(lambda: forward(*args, **kwargs), capture, made)
        except RankFailure:
            raise
        except RuntimeError as error:
            self._give_up(f"the forward cannot be recorded: {str(error).splitlines()[0]}")
            if not recorded.is_repeatable:
                raise  # What was made would be made a second time, and other ranks made it once.
            return _FAILED
        if not recorded.is_whole:  # The model has left out the block behind which the cache remembers.
            return output
        del self._seen[key]
        self._weights = _addresses(self._transformer)
        self.forwards[key] = _Forward(recorded, capture, inputs, *pytree.tree_flatten(output))
        return self.forwards[key].output()

    def _forget_moved_weights(self) -> None:
        """Graphs hold the addresses of the weights."""
        if not self.forwards or _addresses(self._transformer) == self._weights:
            return
        in_vain = 0 if self._has_replayed else self._in_vain + 1
        self.clear()
        self._in_vain = in_vain
        if in_vain >= _IN_VAIN:
            self._give_up("the weights move from one forward to the next, as they do when they are offloaded")

    def _give_up(self, obstacle: str) -> None:
        """Until settings change."""
        self.clear()
        self.obstacle, self._given_up = obstacle, True
        logger.warning("graphs: %s; it runs without", obstacle)


def check_recordable(transformer: nn.Module, installed: bool) -> None:
    """Find out whether the transformer's forward can be recorded, on which this has been `installed` already or not.

    Raises:
        ValueError: if the transformer has a forward of its own, or another cache is enabled.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "graphs: diffusers' own cache is enabled on this transformer, which decides on the host in the middle of a"
            " forward; allowed is none; call pipe.transformer.disable_cache() first"
        )
    if not installed and not has_own_forward(transformer):
        raise ValueError(
            f"graphs: the forward of the {type(transformer).__name__} has been replaced, allowed is that of its class"
        )


def _obstacle(transformer: nn.Module) -> str | None:
    """What, at the moment, would be in no graph or would stay in one."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if getattr(transformer, "_hf_peft_config_loaded", False):
        return "LoRA adapters are loaded, whose scales a graph would keep; fuse them and unload them"
    if getattr(transformer, "is_cache_enabled", False):
        return "diffusers' own cache is enabled"
    return None


class GraphedForward:
    """In the place of a transformer's own forward, `original`."""

    def __init__(self, graphs: ForwardGraphs, original: Forward) -> None:
        functools.update_wrapper(self, original)  # hooks ask a forward for its signature
        self._graphs = graphs
        self._original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphs.run(self._original, args, kwargs)


def _addresses(module: nn.Module) -> list[int]:
    """Where all weights lie, also those of tensors that are made of others.

    `parameters()` and `buffers()` put together the name of each: 2.0 ms of the host for FLUX.1's, this takes 0.5. With
    a cache, which waits for the device in every step, the device has nothing to do meanwhile.
    """
    modules, found = [module], []
    while modules:
        module = modules.pop()
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if type(tensor) in _OF_ONE_PIECE:
                    found.append(tensor.data_ptr())  # type: ignore[union-attr]
                elif tensor is not None:
                    found += _addresses_of(tensor)
    return found


_OF_ONE_PIECE = (nn.Parameter, Tensor)


def _addresses_of(tensor: Any) -> list[int]:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return [tensor.data_ptr()]
    return [address for name in inner()[0] for address in _addresses_of(getattr(tensor, name))]


def _free_memory(device: torch.device) -> None:
    """Graphs have memory of their own: what the forward before it left in the allocator's hands is needed there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _keep(entries: OrderedDict[Hashable, Any], count: int) -> None:
    """The newest ones."""
    while len(entries) > count:
        entries.popitem(last=False)
