"""Context parallelism under a transformer: who computes which rows of the joint sequence, and what is sent when.

Outside attention the blocks of a diffusion transformer work on every row by itself. So the ranks cut the joint sequence
after the embedders, run the blocks on their own rows, and gather what the last projection makes of them; only attention
looks at the rows of the others (ring: Liu et al. 2023, arXiv 2310.01889; Ulysses: Jacobs et al. 2023, arXiv
2309.14509). A batch can be split first: each group of ranks takes some of the samples.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from para_kernels.graphs import outside
from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.attention import context_parallel_attention
from para_kernels.parallel.collective import gather_rows
from para_kernels.parallel.failure import deadline, set_layer
from para_kernels.parallel.progress import raise_on_failure
from para_kernels.parallel.sharding import Shards
from para_kernels.sources import Unprepared

from .agreement import agree
from .attention import ATTEND, AttentionLengths, Shard
from .hooks import Argument
from .models import Family
from .outside import Outside
from .places import Place, Places

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

NOT_YET = "chosen at the first step"


@dataclass
class _Forward:
    """The running forward: where this rank stands, and from the first block on which rows are its own."""

    place: Place
    samples: Shards
    shards: Shards | None = None
    layers: int = 0
    streams: dict[str, Shards] = field(default_factory=dict)

    def own(self, stream: str) -> slice:
        """Which of a stream's rows are here."""
        return self.streams[stream].piece(self.place.piece)


class Spread:
    """Spreads the forwards of one transformer over ranks; every rank is given everything and returns everything.

    Attributes:
        places: where forwards run.
        attention: one of `ATTEND`.
        last_place: where the last one ran, None before.
        transport: how keys and values travelled, and why.
        can_share: whether this rank could share out what the timestep alone decides; None where nobody wants to.
        shares: whether all ranks could, when a call began.

    The hooks are torch's own, on the first block, the last block, and the module at whose output the rows are gathered:
    they run around whatever other hooks stand on these modules, in whatever order all of them came, and around
    compiled blocks. Inside a block compiled code calls attention over ranks as an operator, see outside.py; code that
    was compiled across blocks breaks where ranks talk.
    """

    def __init__(
        self, transformer: Any, family: Family, lengths: AttentionLengths, places: Places, attention: str
    ) -> None:
        self.places = places
        self.attention = attention
        self.last_place: Place | None = None
        self.transport = NOT_YET
        self.can_share: Callable[[], bool] | None = None
        self.shares = False
        self._deadline = ExitStack()
        self._transformer = transformer
        self._plan = family.shards
        self._blocks = family.block_lists
        self._returns = family.block_returns
        self._joined = self._blocks[-1] in family.joined
        self._video = family.block_arguments[0]
        self._head_dim = family.head_dim
        self._lengths = lengths
        self._samples = [Argument.of(transformer, name) for name in self._plan.samples]
        self._rows = [Argument.of(transformer, name) for name in self._plan.rows]
        self._text = None if self._plan.text is None else Argument.of(transformer, self._plan.text)
        self._forward: _Forward | None = None
        self._agreed: set[str] = set()
        self._outside = Outside(joint=self._attend_joint, video=self._attend_video)

    def retune(self, places: Places, attention: str) -> None:
        """Go on with another mesh, or another attention."""
        self.attention = attention
        before, self.places = self.places, places
        self._agreed.clear()
        if before is not places:
            self.last_place = None
            self.transport = NOT_YET
            before.close()

    @property
    def place(self) -> Place | None:
        """Where the running forward runs; None while none does."""
        return None if self._forward is None else self._forward.place

    def close(self) -> None:
        """Give back what the ranks' buffers for keys and values hold: see `Places.close`."""
        self.places.close()

    def add_hooks(self, undo: ExitStack) -> None:
        """Put the hooks on the transformer's modules; closing `undo` takes them off again."""
        blocks = [block for name in self._blocks for block in getattr(self._transformer, name)]
        first, last = blocks[0], blocks[-1]
        self._streams = {name: Argument.of(first, name) for name in self._plan.sequence}
        undo.callback(first.register_forward_pre_hook(self._cut, with_kwargs=True).remove)
        for block in blocks:
            self._add_prefix_hook(undo, block)
        undo.callback(last.register_forward_hook(self._after_last_block).remove)
        gatherer = self._transformer.get_submodule(self._plan.gathered_at)
        undo.callback(gatherer.register_forward_hook(self._gather).remove)

    def _add_prefix_hook(self, undo: ExitStack, block: nn.Module) -> None:
        name = self._plan.prefix
        if name is not None and name in inspect.signature(type(block).forward).parameters:
            hook = partial(self._count_prefix, Argument.of(block, name))
            undo.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)

    # --- around the transformer's forward ---------------------------------------------------------------------------

    def end_call(self) -> None:
        """A call of the pipeline begins or ends: inputs have to be compared anew.

        Raises:
            RankFailure: if a device has waited for a rank in vain. What the call has computed is worthless then.
        """
        self._agreed.clear()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a rank that dies in the last step is known only then
        raise_on_failure()

    @torch._disable_dynamo
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], branch: str, cache: str) -> Arguments:
        """Choose the mesh, find out before any work whether all ranks were given the same, take this rank's samples.

        Raises:
            ValueError: on every rank, if the ranks were given different inputs or settings, or fewer samples than the
                mesh splits a batch into.
        """
        raise_on_failure()
        self._deadline.enter_context(deadline(self.places.wanted.timeout))
        inputs = {argument.name: argument.get(args, kwargs) for argument in self._samples}
        if branch not in self._agreed:
            settings = {"parallel": str(self.places.wanted), "cache": cache, "attention": self.attention}
            agree(self.places.everyone, settings, inputs)
            if self.can_share is not None:
                self.shares = all(exchange(self.places.everyone, self.can_share(), "conditioning"))
            self._agreed.add(branch)
        latents = inputs[self._plan.samples[0]]
        text = None if self._text is None else self._text.get(args, kwargs)
        tokens = self._video_tokens(latents) + (0 if text is None else text.shape[1])
        place = self.places.of(latents.shape[0], tokens, *self._heads(), like=latents if text is None else text)
        if latents.shape[0] < place.batch:
            raise ValueError(
                f"parallel: the mesh splits a batch over {place.batch} groups of ranks, but the batch has"
                f" {latents.shape[0]} sample(s), allowed is batch <= samples"
            )
        if place is not self.last_place:
            self.last_place, self.transport = place, NOT_YET
        self._forward = _Forward(place, Shards.of(latents.shape[0], place.batch))
        samples = self._forward.samples.piece(place.batch_rank)
        for argument in self._samples:
            value = inputs[argument.name]
            each = 0 if value is None else value.shape[0] // latents.shape[0]
            if value is not None and each:  # Else there is one for all samples.
                args, kwargs = argument.replaced(args, kwargs, value[samples.start * each : samples.stop * each])
        rows = Shards.of(tokens, place.pieces).piece(place.piece)
        for argument in self._rows:
            if (value := argument.get(args, kwargs)) is not None and value.ndim > 1:
                args, kwargs = argument.replaced(args, kwargs, value[:, rows])
        return args, kwargs

    @torch._disable_dynamo
    def finish(self, output: Any) -> Any:
        """The forward is over: its output with the samples of all ranks; None, of a forward that has failed, stays.

        A block that is called by itself from here on works on what it is given.
        """
        forward, self._forward = self._forward, None
        with self._deadline.pop_all():
            set_layer(None)
            if forward is None or output is None or forward.place.batch_group is None:
                return output
            group = forward.place.batch_group
            samples = gather_rows(output[0], forward.samples, group, dim=0, what="what the samples have become")
        if isinstance(output, dict):  # diffusers' outputs are dictionaries; a tuple has the values alone.
            return type(output)(**{**output, self._plan.output: samples})
        return (samples, *output[1:])

    def _video_tokens(self, latents: Tensor) -> int:
        return math.prod(latents.shape[dim] // self._patch(entry) for dim, entry in self._plan.patch)

    def _patch(self, entry: str | tuple[str, int] | int) -> int:
        if isinstance(entry, int):
            return entry
        config = self._transformer.config
        return getattr(config, entry) or 1 if isinstance(entry, str) else getattr(config, entry[0])[entry[1]]

    def _heads(self) -> tuple[int, int]:
        """Number and width of the attention heads."""
        config = self._transformer.config
        return getattr(config, self._plan.heads), getattr(config, self._head_dim)

    # --- around the blocks ------------------------------------------------------------------------------------------

    def _cut(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before the first block: every stream is cut to the rows that are this rank's."""
        forward = self._forward
        if forward is None:
            return None
        streams = {name: argument.get(args, kwargs) for name, argument in self._streams.items()}
        costs = [(stream.shape[1], self._cost(name)) for name, stream in streams.items()]
        forward.shards = Shards.of_equal_cost(costs, forward.place.pieces)
        start = 0
        for name, stream in streams.items():
            forward.streams[name] = forward.shards.stream(start, stream.shape[1])
            start += stream.shape[1]
            args, kwargs = self._streams[name].replaced(args, kwargs, stream[:, forward.own(name)])
        video = forward.streams[self._video]
        self._lengths.shard = Shard(
            video.total,
            forward.own(self._video),
            self._outside.joint,
            forward.shards.piece(forward.place.piece),
            self._outside.video,
        )
        return args, kwargs

    def _cost(self, stream: str) -> float:
        """Of one of its rows, in rows of the video."""
        return 1.0 if stream == self._video else self._plan.text_cost

    def _attend_joint(self, streams: Unprepared, lens: Tensor | None) -> Tensor:
        assert self._forward is not None
        assert self._forward.shards is not None
        return self._attend(self._forward.shards, streams, lens)

    def _attend_video(self, streams: Unprepared, lens: Tensor | None) -> Tensor:
        assert self._forward is not None
        return self._attend(self._forward.streams[self._video], streams, lens)

    def _count_prefix(
        self, argument: Argument, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Before every block: how many of the video's first tokens are among this rank's."""
        forward, count = self._forward, argument.get(args, kwargs)
        if forward is None or count is None:
            return None
        own = forward.own(self._video)
        return argument.replaced(args, kwargs, min(max(count - own.start, 0), own.stop - own.start))

    @torch._disable_dynamo
    def _attend(self, shards: Shards, streams: Unprepared, lens: Tensor | None) -> Tensor:
        """This rank's rows of attention over all that `shards` shares out, whose lengths are `lens`."""
        forward = self._forward
        assert forward is not None
        if forward.place.pieces == 1:
            set_layer(forward.layers)
            forward.layers += 1
            return ATTEND[self.attention](*streams.prepared(), lens)

        attend = partial(self._attend_outside, shards, streams.without_tensors())
        return outside(attend, *streams.tensors, lens, out=streams.new_result)

    def _attend_outside(self, shards: Shards, streams: Unprepared, *tensors: Tensor | None) -> Tensor:
        *of_streams, lens, out = tensors
        return self._attend_over_ranks(shards, streams.with_tensors(of_streams), lens, out)

    def _attend_over_ranks(
        self, shards: Shards, streams: Unprepared, lens: Tensor | None, out: Tensor | None
    ) -> Tensor:
        forward = self._forward
        assert forward is not None
        set_layer(forward.layers)
        forward.layers += 1
        wanted = self.places.wanted.transport
        query, key, value = streams.prepared() if streams.is_prepared else (streams.outline,) * 3
        result = context_parallel_attention(
            query,
            key,
            value,
            mesh=forward.place.mesh,
            lengths=shards.sizes,
            kv_lens=lens,
            q_lens=lens,
            transport=wanted,
            attention=self.attention,
            out=out,
            source=None if streams.is_prepared else streams,
        )
        if self.transport == NOT_YET:
            self.transport = forward.place.transport(query.device, wanted)
        return result

    def recut(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give every stream of a block's output its own rows again.

        A block that parts the streams by `x[:, :-text_rows]` and `x[:, -text_rows:]` returns all rows as text on a
        rank that has no text. The next block joins them again, in the same order; but who looks at a stream by its
        name, the cache and the last projection, must find it there.
        """
        forward = self._forward
        if forward is None or forward.shards is None:
            return streams
        rows = {name: shards.sizes[forward.place.piece] for name, shards in forward.streams.items()}
        if all(streams[name] is None or streams[name].shape[1] == count for name, count in rows.items()):
            return streams
        joint = torch.cat([streams[name] for name in rows], dim=1)
        return streams | dict(zip(rows, joint.split(list(rows.values()), dim=1), strict=True))

    def _after_last_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Before anything after the blocks looks at the video."""
        if self._forward is None:
            return None
        if self._joined:
            return self._behind_whole_text(output)
        if isinstance(output, Tensor):
            return self.recut({self._returns[0]: output})[self._returns[0]]
        streams = self.recut(dict(zip(self._returns, output, strict=True)))
        return tuple(streams[name] for name in self._returns)

    def _behind_whole_text(self, joint: Tensor) -> Tensor:
        """The transformer is about to cut off as many rows as the whole text has, whatever of it is here."""
        forward = self._forward
        assert forward is not None
        video = forward.streams[self._video]
        text_rows = sum(rows.total for rows in forward.streams.values()) - video.total
        own = joint[:, joint.shape[1] - video.sizes[forward.place.piece] :]
        return nn.functional.pad(own, (0, 0, text_rows, 0))

    @torch._disable_dynamo
    def _gather(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After the last projection: the video's rows of all ranks."""
        forward = self._forward
        if forward is None:
            return None
        rows, group = forward.streams[self._video], forward.place.sequence_group

        def gather(own: Tensor, out: Tensor | None) -> Tensor:
            return gather_rows(own, rows, group, what="what the rows have become")

        shape = (output.shape[0], rows.total, *output.shape[2:])
        return outside(gather, output, out=partial(output.new_empty, shape))

    # --- for the cache ----------------------------------------------------------------------------------------------

    @property
    def first_token(self) -> int:
        """Where this rank's part of the video begins."""
        forward = self._forward
        return 0 if forward is None else forward.own(self._video).start

    @property
    def situation(self) -> Hashable:
        """What tells the running forward from one with the same arguments on this rank: the ranks, and all samples."""
        forward = self._forward
        return None if forward is None else (id(forward.place), forward.samples.total)

    @property
    def whole(self) -> tuple[int, ...] | None:
        """What is equal on all ranks and fixes the shapes on each: samples, rows of every stream."""
        forward = self._forward
        return None if forward is None else (forward.samples.total, *(rows.total for rows in forward.streams.values()))

    @torch._disable_dynamo
    def reduce(self, sums: Tensor) -> Tensor:
        """The cache's sums (2,) of all ranks, in one collective, and to the bit the same on all of them.

        Over the batch's groups too, although no attention crosses them: they wait for each other at the end of the
        forward anyway, and so the decisions are those of one process, however the ranks are laid out. Gathered and then
        added in rank order: how a backend orders the additions of an all-reduce may differ from rank to rank.
        """
        if self._forward is None:
            return sums
        everyone = self.places.everyone
        pieces = gather_rows(sums, Shards((2,) * everyone.size()), everyone, dim=0, what="sums of the cache")
        return pieces.view(-1, 2).double().sum(dim=0).to(sums.dtype)
