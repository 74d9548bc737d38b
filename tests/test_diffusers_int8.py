"""`accelerate(pipe, attention="int8")`: on the attention inputs of a trained model, and put on and taken off."""

from __future__ import annotations

import int8_ranks
import pytest
import ranks
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from reference import error
from tiny_hunyuan import generate, tiny_pipeline
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.attention8 import flash_attention_int8
from para_kernels.integrations.diffusers import accelerate, apply_cache_on_pipe, summary
from para_kernels.integrations.diffusers.generate import Acceleration
from para_kernels.integrations.diffusers.toy import TOY_PIPELINE

ranks.preload("int8_ranks")

pytestmark = pytest.mark.usefixtures("one_thread")

# Of all blocks over four steps, measured on the CPU (float32): mean 8.6e-3, worst 1.17e-2, least cosine 0.99994. With so
# few keys all of them are among the largest.
WORST_ERROR, LEAST_COSINE = 1.4e-2, 0.9998


def test_error_on_a_trained_models_inputs() -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(TOY_PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    errors, cosines = [], []

    def attend(query: Tensor, key: Tensor, value: Tensor, lens: Tensor | None) -> Tensor:
        exact = flash_attention(query, key, value, kv_lens=lens, q_lens=lens)
        rounded = flash_attention_int8(query, key, value, kv_lens=lens, q_lens=lens)
        errors.append(error(rounded, exact))
        cosines.append(torch.cosine_similarity(rounded.double().flatten(), exact.double().flatten(), 0).item())
        return exact

    handle = accelerate(pipe)
    handle._installations[0]._lengths.attend = attend
    noise = torch.Generator().manual_seed(0)
    pipe(
        "a handwritten 7 moving to the left", height=64, width=64, num_frames=17, num_inference_steps=4,
        output_type="latent", generator=noise,
    )  # fmt: skip
    assert len(errors) >= 30
    assert max(errors) <= WORST_ERROR
    assert min(cosines) >= LEAST_COSINE
    assert min(errors) >= 1e-3, "not the exact attention under another name"


def test_changes_the_output_slightly_and_is_taken_off() -> None:
    pipe = tiny_pipeline()
    stock = generate(pipe)
    handle = accelerate(pipe)
    exact = generate(pipe)
    assert accelerate(pipe, attention="int8") is handle
    rounded = generate(pipe)
    assert 1e-6 < error(rounded, exact) < 0.1
    assert handle.summary().splitlines()[1].startswith("attention   int8, ")
    assert "8-bit" in handle.summary()
    apply_cache_on_pipe(pipe, 0.0)
    assert torch.equal(generate(pipe), rounded), "a cache leaves the attention as it is"
    accelerate(pipe)
    assert torch.equal(generate(pipe), exact)
    accelerate(pipe, attention="int8")
    handle.remove()
    assert torch.equal(generate(pipe), stock)


def test_the_summary_says_from_where_on_8_bits_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    handle = accelerate(pipe, attention="int8")
    assert "faster than exact" not in handle.summary(), "nothing was measured on a CPU"
    monkeypatch.setattr(summary, "int8_faster_from", lambda device, dtype, head_dim: 10240)
    assert "faster than exact from about 10,240 keys on" in handle.summary()
    accelerate(pipe)
    assert "faster than exact" not in handle.summary()


def test_over_ranks() -> None:
    first, second = ranks.launch(2, int8_ranks.run, timeout=300.0)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    for name in int8_ranks.WAYS:
        seen = first[name]
        assert seen["output"] == second[name]["output"], name
        # A piece of the keys has a mean and scales of its own.
        assert 1e-6 < seen["from exact"] < 0.1, name
        assert seen["from one process"] < 0.1, name
        assert seen["same decisions"], name
        assert seen["summary"].startswith("attention   int8, "), name
        assert seen["exact again"] <= 1e-5, name
    assert first["by hand"] == {"kept": True}
    for seen in (first, second):
        assert seen["differ"]["said"].startswith('attention: got "int8" on rank 1, must be "exact"')


def test_the_command_lines_choice_reaches_the_pipe() -> None:
    pipe = tiny_pipeline()
    assert Acceleration(attention="int8").install(pipe).settings.attention == "int8"
