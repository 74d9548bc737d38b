"""Variable-length attention under a diffusers `Attention` module, and the lengths that it reads."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.attention8 import flash_attention_int8
from para_kernels.integrations.diffusers.norms import left_to_norm
from para_kernels.integrations.diffusers.outside import Attend, AttendOutside
from para_kernels.preparation import Rotary, Stream, unprepared
from para_kernels.sources import Unprepared, as_they_are


@dataclass(frozen=True)
class Shard:
    """This rank's part of a joint sequence that is spread over ranks.

    Attributes:
        video_tokens: of the whole video, on all ranks.
        rows: which of them are here.
        attend: attention of the rows that are here over those of all ranks.
        joint_rows: which rows of the joint sequence are here.
        attend_video: as `attend`, of the video alone.
    """

    video_tokens: int
    rows: slice
    attend: Attend
    joint_rows: slice
    attend_video: Attend

    def attend_unprepared(self, streams: Unprepared, lens: Tensor | None) -> Tensor:
        """As `attend`, of what queries, keys and values are still to be made of: over ranks, in the ring's buffer."""
        return _attend_unprepared(self.attend, streams, lens)

    def attend_video_unprepared(self, streams: Unprepared, lens: Tensor | None) -> Tensor:
        """The same of the video alone."""
        return _attend_unprepared(self.attend_video, streams, lens)


def _attend_unprepared(attend: Attend, streams: Unprepared, lens: Tensor | None) -> Tensor:
    if isinstance(attend, AttendOutside):
        return attend.unprepared(streams, lens)
    return attend(*streams.prepared(), lens)


def attend_here(query: Tensor, key: Tensor, value: Tensor, lens: Tensor | None) -> Tensor:
    """Queries past the length are padding as much as the keys are: they cost nothing."""
    return flash_attention(query, key, value, kv_lens=lens, q_lens=lens)


def attend_in_8_bits(query: Tensor, key: Tensor, value: Tensor, lens: Tensor | None) -> Tensor:
    """As `attend_here`, within a few percent of it."""
    return flash_attention_int8(query, key, value, kv_lens=lens, q_lens=lens)


ALL_ROWS = slice(None)

# What `accelerate` takes as its `attention`. 8 bits are for the joint sequence, or the video alone: attention over the
# text, in refiners and to its tokens, is cheap and stays exact.
ATTEND: dict[str, Attend] = {"exact": attend_here, "int8": attend_in_8_bits}


class AttentionLengths:
    """The true lengths of the running forward, int32 (B,) on the device; never read on the host. And what else blocks
    read of it.

    Inside `begin` ... `end` they come from the text's key mask. Outside they are derived from the mask that the model
    hands to attention, once per mask object: all blocks of a forward are given the same one.

    Attributes:
        of_text: lengths of the text, None where it has no padding.
        shard: while the blocks see a part of the joint sequence only, which part it is.
        attend: attention of the joint sequence where all of it is here.
        modulations: of the running block, by the paths of the linears that would make them; {}: they make them; None:
            so it is always.
    """

    def __init__(self) -> None:
        self.shard: Shard | None = None
        self.attend: Attend = attend_here
        self.of_text: Tensor | None = None
        self.modulations: dict[str, Tensor] | None = None
        self._joint: tuple[int, Tensor] | None = None
        self._mask: tuple[weakref.ref[Tensor], Tensor] | None = None

    def begin(self, text_mask: Tensor | None) -> None:
        """Start a forward whose text has the key mask (B, T), of any dtype, ones before zeros; None: no padding."""
        self.of_text = None if text_mask is None else text_mask.sum(dim=1, dtype=torch.int32)
        self._joint = None

    def replace(self, of_text: Tensor | None) -> None:
        """Go on with the same lengths in other memory."""
        self.of_text, self._joint = of_text, None

    def forget(self) -> None:
        """Behind the last block that a cache may skip: what it has derived is not there where a replay of graphs skips
        it."""
        self._joint = self._mask = None

    def end(self) -> None:
        """The forward is over: what is called from here on belongs to another one."""
        self.of_text = self._joint = self.shard = None

    def here(self, video_tokens: int) -> Shard:
        """Which rows are here: all of them, with so many of video, where nothing is spread over ranks."""
        return self.shard or Shard(video_tokens, ALL_ROWS, self.attend, ALL_ROWS, self.attend)

    def text(self, mask: Tensor | None) -> Tensor | None:
        """Lengths of the text alone. None: every token is real."""
        return self._from_mask(mask) if self.of_text is None else self.of_text

    def joint(self, video_tokens: int, mask: Tensor | None) -> Tensor | None:
        """Lengths of the video with the text behind it. None: every token is real."""
        if self.of_text is None:
            return self._from_mask(mask)
        if torch.compiler.is_compiling():  # What a graph keeps here it would want to find here the next time.
            return self.of_text + video_tokens
        if self._joint is None or self._joint[0] != video_tokens:
            self._joint = (video_tokens, self.of_text + video_tokens)
        return self._joint[1]

    def behind(self, video_tokens: int, text_mask: Tensor) -> Tensor:
        """Lengths of the video with several texts behind it, whose common mask (B, T) the model hands to attention."""
        if torch.compiler.is_compiling():
            return text_mask.sum(dim=1, dtype=torch.int32) + video_tokens
        if self._mask is None or self._mask[0]() is not text_mask:
            self._mask = (weakref.ref(text_mask), text_mask.sum(dim=1, dtype=torch.int32) + video_tokens)
        return self._mask[1]

    def _from_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if torch.compiler.is_compiling():
            return _key_lengths(mask)
        if self._mask is None or self._mask[0]() is not mask:
            self._mask = (weakref.ref(mask), _key_lengths(mask))
        return self._mask[1]


class Signed:
    """Keeps the signature of `__call__`, which diffusers' attention modules ask for at every call: it would be put
    together anew each time, 25 microseconds of the host.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        call: Any = cls.__dict__.get("__call__")
        if call is not None:
            call.__signature__ = inspect.signature(call)


class ParaAttnProcessor(Signed):
    """Exact attention for HunyuanVideo's joint, single-stream and refiner attention, without a mask.

    `pipe.transformer.set_attn_processor(ParaAttnProcessor())` is enough. Keys at or past a sample's length are never
    computed; its padded text rows, which no real row ever reads, are not either and come back as the output
    projection of zero. Everything else is computed as diffusers does it, in the same order and dtypes. Masks must be
    right-padded (ones before zeros), as the pipeline makes them; only their lengths are used. For inference: there is
    no backward.

    Args:
        lengths: where the lengths come from; `accelerate` passes one per transformer. By default they are derived
            from the mask that the model passes to attention, boolean (B, 1, 1, N) or (B, 1, S, S).
    """

    def __init__(self, lengths: AttentionLengths | None = None) -> None:
        self.lengths = AttentionLengths() if lengths is None else lengths

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over video `hidden_states` (B, S, C) and text `encoder_hidden_states` (B, T, C), or over the first
        alone.

        Returns:
            The video's and the text's new states, or for self attention (no `encoder_hidden_states`) one tensor.

        Raises:
            ValueError: if a mask is needed and is not boolean (B, 1, 1, N) or (B, 1, S, S).
        """
        if encoder_hidden_states is None:
            lens = self.lengths.text(attention_mask)
            query, key, value = self_attention(attn, hidden_states, image_rotary_emb).prepared()
            return video_out(attn, attend_here(query, key, value, lens).flatten(2))

        cut = hidden_states.shape[1]
        shard = self.lengths.here(cut)
        lens = self._joint_lengths(shard.video_tokens, attention_mask)
        rotary = None if image_rotary_emb is None else rotary_rows(image_rotary_emb, shard.rows)
        streams = _single_stream if attn.add_q_proj is None else _dual_stream
        joint = streams(attn, hidden_states, encoder_hidden_states, rotary)
        out = shard.attend_unprepared(joint, lens).flatten(2)
        return video_out(attn, out[:, :cut]), text_out(attn, out[:, cut:])

    def _joint_lengths(self, video_tokens: int, mask: Tensor | None) -> Tensor | None:
        return self.lengths.joint(video_tokens, mask)


class SeveralTextsProcessor(ParaAttnProcessor):
    """The same for HunyuanVideo 1.5, which joins several texts and an image's tokens into one, padding last, and hands
    the mask of all, (B, T), to every block.
    """

    def _joint_lengths(self, video_tokens: int, mask: Tensor | None) -> Tensor | None:
        assert mask is not None
        return self.lengths.behind(video_tokens, mask)


def rotary_rows(rotary: Rotary, rows: slice) -> Rotary:
    # Not `rows == ALL_ROWS`: torch 2.11 would compile the numbers that it compares, and with them the lengths, into the
    # block.
    if rows.start is None and rows.stop is None:
        return rotary
    cos, sin = rotary
    return cos[rows], sin[rows]


def self_attention(attn: Any, states: Tensor, rotary: Rotary | None) -> Unprepared:
    """One stream, which needs no joining: what is neither normed nor rotated stays where it is."""
    stream = projected(attn, states, rotary)
    assert stream.value is not None
    if stream.norm_query is None and stream.norm_key is None and rotary is None:
        return as_they_are(stream.query, stream.key, stream.value)
    return unprepared([stream._replace(value=None)], value=stream.value)


def _single_stream(attn: Any, video: Tensor, text: Tensor, rotary: Rotary | None) -> Unprepared:
    """One set of projections for both streams, of which the values are joined already; RoPE is for the video's rows.

    The angles say which rows those are: on a rank without text the block takes the video for the text (`x[:, -0:]` is
    all of x).
    """
    both = torch.cat([video, text], dim=1)
    if rotary is None:
        return self_attention(attn, both, None)
    rows = rotary[0].shape[0]
    joint = projected(attn, both, None)
    query, key = joint.query, joint.key
    streams = [
        joint._replace(query=query[:, :rows], key=key[:, :rows], value=None, rotary=on_device_of(rotary, query)),
        joint._replace(query=query[:, rows:], key=key[:, rows:], value=None),
    ]
    return unprepared(streams, value=joint.value)


def _dual_stream(attn: Any, video: Tensor, text: Tensor, rotary: Rotary | None) -> Unprepared:
    """Projections of their own for each stream, joined with the text behind the video."""
    return unprepared([projected(attn, video, rotary), text_projected(attn, text, None)])


def projected(attn: Any, states: Tensor, rotary: Rotary | None) -> Stream:
    """Query, key and value (B, S, H, D), and what is left to do to them."""
    query, norm_query = left_to_norm(attn.norm_q, heads_of(attn, attn.to_q(states)))
    key, norm_key = left_to_norm(attn.norm_k, heads_of(attn, attn.to_k(states)))
    value = heads_of(attn, attn.to_v(states))
    return Stream(query, key, value, norm_query, norm_key, None if rotary is None else on_device_of(rotary, query))


def text_projected(attn: Any, text: Tensor, rotary: Rotary | None) -> Stream:
    """As `projected`, by the projections that joint attention has for the text."""
    query, norm_query = left_to_norm(attn.norm_added_q, heads_of(attn, attn.add_q_proj(text)))
    key, norm_key = left_to_norm(attn.norm_added_k, heads_of(attn, attn.add_k_proj(text)))
    value = heads_of(attn, attn.add_v_proj(text))
    return Stream(query, key, value, norm_query, norm_key, None if rotary is None else on_device_of(rotary, query))


def on_device_of(rotary: Rotary, x: Tensor) -> Rotary:
    cos, sin = rotary
    return cos.to(x.device), sin.to(x.device)


def heads_of(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def video_out(attn: Any, states: Tensor) -> Tensor:
    if attn.to_out is None:  # A single-stream block projects later, together with its MLP.
        return states
    projection, dropout = attn.to_out
    return dropout(projection(states))


def text_out(attn: Any, states: Tensor) -> Tensor:
    project = getattr(attn, "to_add_out", None)  # Not in the last block of some models, whose text nobody needs.
    return states if project is None else project(states)


def _key_lengths(mask: Tensor) -> Tensor:
    """Keys that the first query row sees. A right-padded mask says no more; of a refiner's (B, 1, S, S) one row is
    read.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask: got {mask.dtype} {tuple(mask.shape)}, allowed is a boolean (B, 1, 1, N) or (B, 1, S, S)"
        )
    return mask[:, 0, 0].sum(dim=-1, dtype=torch.int32)
