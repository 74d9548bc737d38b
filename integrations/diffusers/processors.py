"""Exact attention under the `Attention` modules of the families other than HunyuanVideo: one class each, no mask.

Each is made for one transformer with its `AttentionLengths`, which know the text's padding (Mochi) and, where the
sequence is spread over ranks, which rows are here. All are for inference: there is no backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.preparation import Rotary, Stream, prepare_projection, unprepared

from .attention import (
    AttentionLengths,
    Shard,
    Signed,
    heads_of,
    on_device_of,
    projected,
    rotary_rows,
    self_attention,
    text_out,
    text_projected,
    video_out,
)
from .norms import left_to_norm


class Processor(Signed):
    """What all have in common, for processors of your own too: the lengths that `accelerate` passes.

    Args:
        lengths: of the transformer's running forward.
    """

    def __init__(self, lengths: AttentionLengths) -> None:
        self.lengths = lengths

    def shard(self, video_tokens: int) -> Shard:
        """Which rows are here: all of them where nothing is spread over ranks."""
        return self.lengths.here(video_tokens)


class FluxProcessor(Processor):
    """FLUX.1's joint attention, the text before the image, with RoPE over both."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image (B, S, C) and text (B, T, C), or both in one tensor: to their new states, as diffusers returns them."""
        shard = self.shard(hidden_states.shape[1])
        rotary = None if image_rotary_emb is None else rotary_rows(image_rotary_emb, shard.joint_rows)
        if encoder_hidden_states is None:
            return shard.attend_unprepared(self_attention(attn, hidden_states, rotary), None).flatten(2)
        cut = encoder_hidden_states.shape[1]
        of_text, of_image = (None, None) if rotary is None else (rotary_rows(rotary, r) for r in _parted(cut))
        streams = [text_projected(attn, encoder_hidden_states, of_text), projected(attn, hidden_states, of_image)]
        out = shard.attend_unprepared(unprepared(streams), None).flatten(2)
        return video_out(attn, out[:, cut:]), text_out(attn, out[:, :cut])


class Flux2Processor(FluxProcessor):
    """FLUX.2's joint attention; and that of its single-stream blocks, which projects together with their MLP."""

    def __call__(self, attn: Any, hidden_states: Tensor, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        """As `FluxProcessor`. Of the single-stream blocks: text and image in one tensor, mask, RoPE; to what the
        block adds to them.
        """
        if not hasattr(attn, "to_qkv_mlp_proj"):
            return super().__call__(attn, hidden_states, *rest)
        _, image_rotary_emb = rest
        shard, width = self.shard(hidden_states.shape[1]), 3 * attn.inner_dim
        both = attn.to_qkv_mlp_proj(hidden_states)
        query, key, value = (heads_of(attn, part) for part in both[..., :width].chunk(3, dim=-1))
        query, norm_query = left_to_norm(attn.norm_q, query)
        key, norm_key = left_to_norm(attn.norm_k, key)
        rotary = on_device_of(rotary_rows(image_rotary_emb, shard.joint_rows), query)
        stream = Stream(query, key, None, norm_query, norm_key, rotary)
        out = shard.attend_unprepared(unprepared([stream], value=value), None).flatten(2)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(both[..., width:])], dim=-1))


class CogVideoXProcessor(Processor):
    """CogVideoX's joint attention: one set of projections, the text before the video, with RoPE over the video."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, S, C) and text (B, T, C), to their new states."""
        shard, cut = self.shard(hidden_states.shape[1]), encoder_hidden_states.shape[1]
        joint = projected(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1), None)
        rotary = None if image_rotary_emb is None else rotary_rows(image_rotary_emb, shard.rows)
        text, video = (joint._replace(query=joint.query[:, r], key=joint.key[:, r], value=None) for r in _parted(cut))
        if rotary is not None:
            video = video._replace(rotary=on_device_of(rotary, hidden_states))
        out = shard.attend_unprepared(unprepared([text, video], value=joint.value), None).flatten(2)
        out = video_out(attn, out)
        return out[:, cut:], out[:, :cut]


class JointProcessor(Processor):
    """SD3's and Mochi's joint attention, the text behind the video; and SD3.5's self attention of the image alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Video (B, S, C) and text (B, T, C), to their new states; without text, one tensor.

        RoPE, if any, is (S, H, D / 2), over the video. Padding is known from the lengths alone.
        """
        cut = hidden_states.shape[1]
        shard = self.shard(cut)
        if encoder_hidden_states is None:
            alone = self_attention(attn, hidden_states, None)
            return video_out(attn, shard.attend_video_unprepared(alone, None).flatten(2))
        rotary = None if image_rotary_emb is None else rotary_rows(image_rotary_emb, shard.rows)
        streams = [projected(attn, hidden_states, rotary), text_projected(attn, encoder_hidden_states, None)]
        lens = self.lengths.joint(shard.video_tokens, None)
        out = shard.attend_unprepared(unprepared(streams), lens).flatten(2)
        return video_out(attn, out[:, :cut]), text_out(attn, out[:, cut:])


class WanProcessor(Processor):
    """Wan's self attention of the video, with RoPE, and its cross attention to the text and to an image's tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Video (B, S, C), or video and what it looks at (B, T, C), to the video's new states."""
        if encoder_hidden_states is not None:
            return video_out(attn, self._crossed(attn, hidden_states, encoder_hidden_states).flatten(2))
        shard = self.shard(hidden_states.shape[1])
        # From (1, S, 1, D); Wan's buffers may have been cast with the model.
        rotary = None if rotary_emb is None else (rotary_emb[0][0, :, 0].float(), rotary_emb[1][0, :, 0].float())
        rotary = None if rotary is None else rotary_rows(rotary, shard.rows)
        streams = self_attention(attn, hidden_states, rotary)
        return video_out(attn, shard.attend_video_unprepared(streams, None).flatten(2))

    def _crossed(self, attn: Any, video: Tensor, seen: Tensor) -> Tensor:
        """Rows see all of the text: nothing of it is spread over ranks. The last 512 tokens are the text."""
        query = prepare_projection(*left_to_norm(attn.norm_q, heads_of(attn, attn.to_q(video))))
        if attn.add_k_proj is None:
            return flash_attention(query, *_keys(attn, attn.norm_k, attn.to_k, attn.to_v, seen))
        image, text = seen[:, : seen.shape[1] - WAN_TEXT_TOKENS], seen[:, seen.shape[1] - WAN_TEXT_TOKENS :]
        out = flash_attention(query, *_keys(attn, attn.norm_k, attn.to_k, attn.to_v, text))
        keys = _keys(attn, attn.norm_added_k, attn.add_k_proj, attn.add_v_proj, image)
        return out + flash_attention(query, *keys)


WAN_TEXT_TOKENS = 512  # what diffusers' own processor takes for the text, behind the image's tokens


def _keys(attn: Any, norm: Any, to_k: Any, to_v: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
    return prepare_projection(*left_to_norm(norm, heads_of(attn, to_k(seen)))), heads_of(attn, to_v(seen))


def _parted(cut: int) -> tuple[slice, slice]:
    return slice(cut), slice(cut, None)
