"""FP8 linears: which ones, what they compute, what they compose with, and the way back."""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from typing import Any

import linears_ranks
import pytest
import ranks
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from tiny_families import TINY, generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline, transformer_inputs
from torch import Tensor, nn

from para_kernels import FirstBlockCache
from para_kernels.integrations.diffusers import Fp8Linears, Handle, accelerate, apply_cache_on_pipe, linears
from para_kernels.integrations.diffusers.linears import cpu_multiplies_rows, is_quantised
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO

ranks.preload("linears_ranks")
pytestmark = pytest.mark.usefixtures("one_thread")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None or not cpu_multiplies_rows(), reason="needs torchao, and FP8 on the CPU"
)

FP8_MAX = 448.0
KEPT = Fp8Linears(keep_originals=True)


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    pipe = tiny_pipeline()
    generate(pipe, PROMPTS[:1], steps=1)
    return pipe


def weights(root: nn.Module) -> dict[str, Tensor]:
    return {path: module.weight for path, module in root.named_modules() if isinstance(module, nn.Linear)}


def quantised(root: nn.Module) -> set[str]:
    return {path for path, weight in weights(root).items() if is_quantised(weight)}


def e4m3_rows(x: Tensor) -> Tensor:
    """Every row as e4m3 with a scale of its own represents it, in float64; scales are rounded to the dtype of x."""
    largest = x.abs().amax(dim=-1, keepdim=True).double().clamp(min=1e-12)
    scale = (largest / FP8_MAX).to(x.dtype).double()
    scaled = (x.double() / scale).clamp(-FP8_MAX, FP8_MAX)
    return scaled.float().to(torch.float8_e4m3fn).double() * scale


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# --- which, and what they compute -------------------------------------------------------------------------------------


@needs_torchao
@pytest.mark.parametrize("name", TINY)
def test_blocks_are_quantised_and_what_is_around_them_is_not(name: str) -> None:
    pipe = tiny_family(name)
    exact = generate_family(name, pipe)
    accelerate(pipe, linears="fp8")
    done = quantised(pipe.transformer)
    blocks = {path for path in weights(pipe.transformer) if "blocks." in path and "refiner" not in path}
    modulations = {path for path in blocks if "norm" in path}
    odd = {path for path in blocks if any(size % 16 for size in weights(pipe.transformer)[path].shape)}
    assert done == blocks - modulations - odd
    assert len(done) >= 15
    # e4m3 has 3 bits of mantissa; a wrong scale or a swapped weight gives more than 0.5.
    assert 0 < relative(generate_family(name, pipe), exact) < 0.1


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 64), (1, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("activations", [True, False])
def test_the_product_is_that_of_rows_in_e4m3(dtype: torch.dtype, shape: tuple[int, ...], activations: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96).to(dtype).requires_grad_(False)
    # Rows and channels of very different size: one scale for all of them would lose the small ones.
    linear.weight *= torch.logspace(-3, 3, 96, dtype=dtype)[:, None]
    x = torch.randn(*shape, dtype=dtype) * 10 ** torch.randn(*shape[:-1], 1, dtype=dtype)
    weight = linear.weight
    linear.weight = nn.Parameter(linears.quantise(linear.weight, activations), requires_grad=False)
    got = linear(x)
    assert (got.dtype, got.shape) == (dtype, (*shape[:-1], 96))
    expected = (e4m3_rows(x) if activations else x.double()) @ e4m3_rows(weight).T + linear.bias.double()
    # Of the sizes that are added, in each row and channel; what quantising itself does to them is 2e-2 and more.
    sizes = x.double().abs() @ weight.double().abs().T + linear.bias.double().abs()
    assert ((got.double() - expected).abs() <= (4e-3 if dtype == torch.bfloat16 else 1e-4) * sizes).all()


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_channels_of_zeros_stay_zero(dtype: torch.dtype) -> None:
    """Padding is such rows: as NaN they would spoil attention."""
    linear = nn.Linear(32, 32, bias=False).to(dtype).requires_grad_(False)
    linear.weight[3] = 0
    linear.weight = nn.Parameter(linears.quantise(linear.weight, True), requires_grad=False)
    out = linear(torch.cat([torch.zeros(2, 32, dtype=dtype), torch.ones(1, 32, dtype=dtype)]))
    assert out[:2].eq(0).all()
    assert out[2, 3] == 0
    assert out.isfinite().all()


@needs_torchao
def test_text_encoders_have_their_weights_alone_quantised(pipe: HunyuanVideoPipeline) -> None:
    accelerate(pipe, linears="fp8")
    assert len(quantised(pipe.text_encoder)) == 21
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        done = quantised(encoder)
        fits = {path for path, weight in weights(encoder).items() if not any(size % 16 for size in weight.shape)}
        assert done == {path for path in fits if "layers." in path}
        assert all(weights(encoder)[path].act_quant_kwargs is None for path in done)
    assert all(weights(pipe.transformer)[path].act_quant_kwargs is not None for path in quantised(pipe.transformer))


@needs_torchao
def test_text_encoders_can_be_left_out_and_weights_quantised_alone(pipe: HunyuanVideoPipeline) -> None:
    accelerate(pipe, linears=Fp8Linears(weight_only=True, text_encoders=False))
    assert quantised(pipe.text_encoder) == quantised(pipe.text_encoder_2) == set()
    done = quantised(pipe.transformer)
    assert done
    assert all(weights(pipe.transformer)[path].act_quant_kwargs is None for path in done)


@needs_torchao
def test_linears_of_loras_and_of_other_classes_are_left_alone(pipe: HunyuanVideoPipeline) -> None:
    class Own(nn.Linear):
        pass

    attention: Any = pipe.transformer.transformer_blocks[0].attn
    attention.to_q = Own(48, 48)
    attention.to_k.lora_A = nn.ModuleDict({"default": nn.Linear(48, 16)})
    attention.to_v = nn.Linear(48, 40)  # not a multiple of 16
    accelerate(pipe, linears="fp8")
    inside = quantised(attention)
    assert {"to_out.0", "to_k"} <= inside
    assert not {"to_q", "to_v", "to_k.lora_A.default"} & inside


# --- the way back -----------------------------------------------------------------------------------------------------


@needs_torchao
def test_remove_gives_the_original_weights_back(pipe: HunyuanVideoPipeline) -> None:
    stock = generate(pipe)
    roots = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    before = [{name: (id(p), p.clone()) for name, p in root.named_parameters()} for root in roots]
    attributes = [sorted(module.__dict__) for root in roots for module in root.modules()]
    handle = accelerate(pipe, linears=KEPT)
    assert not torch.equal(generate(pipe), stock)
    handle.remove()
    for root, known in zip(roots, before, strict=True):
        for name, parameter in root.named_parameters():
            assert id(parameter) == known[name][0]
            assert torch.equal(parameter, known[name][1])
    assert [sorted(module.__dict__) for root in roots for module in root.modules()] == attributes
    assert torch.equal(generate(pipe), stock)


@needs_torchao
def test_linears_can_be_turned_off_and_changed_again(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe)
    exact = generate(pipe)
    accelerate(pipe, linears=KEPT)
    fp8 = generate(pipe)
    accelerate(pipe, cache=100.0)  # not given: as they are
    assert handle.settings.linears == KEPT
    accelerate(pipe, cache=None, linears=Fp8Linears(weight_only=True, keep_originals=True))
    assert not torch.equal(generate(pipe), fp8)
    accelerate(pipe, linears=KEPT)
    assert torch.equal(generate(pipe), fp8)
    accelerate(pipe, linears=None)
    assert torch.equal(generate(pipe), exact)
    assert handle.linears is None


@needs_torchao
def test_without_keeping_the_originals_are_freed_and_removal_is_refused(pipe: HunyuanVideoPipeline) -> None:
    original = weakref.ref(pipe.transformer.transformer_blocks[0].attn.to_q.weight)
    handle = accelerate(pipe, cache=100.0, linears="fp8")
    gc.collect()
    assert original() is None
    fp8 = generate(pipe)
    with pytest.raises(ValueError, match=r"remove: the original weights .* not kept; .*remove\(keep_linears=True\)"):
        handle.remove()
    with pytest.raises(ValueError, match=r"linears: the original weights .* not kept"):
        accelerate(pipe, linears=None)
    assert handle.installed
    assert torch.equal(generate(pipe), fp8)

    handle.remove(keep_linears=True)
    assert Handle.on(pipe.transformer) is None
    assert len(quantised(pipe.transformer)) == 39
    with pytest.raises(ValueError, match=r"linears: .*keep_originals=True, but 39 linears .* FP8 already"):
        accelerate(pipe, linears=KEPT)
    again = accelerate(pipe, linears="fp8")
    assert "39 in the blocks" in again.summary()
    with pytest.raises(ValueError, match="remove: "):
        again.remove()


@needs_torchao
def test_an_own_weight_that_came_later_stays(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, linears=KEPT)
    later = nn.Parameter(torch.zeros(48, 48))
    pipe.transformer.transformer_blocks[0].attn.to_q.weight = later
    handle.remove()
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight is later
    assert not quantised(pipe.transformer)


@needs_torchao
def test_a_pipe_that_shares_the_transformer_and_one_that_is_dropped(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, linears=KEPT)
    other = tiny_pipeline(seed=1)
    other.register_modules(transformer=pipe.transformer)
    apply_cache_on_pipe(other, 0.0)
    assert quantised(other.text_encoder)
    encoder = weakref.ref(other.text_encoder)
    del other
    gc.collect()
    assert encoder() is None
    handle.remove()
    assert not quantised(pipe.transformer) | quantised(pipe.text_encoder)


# --- with the others --------------------------------------------------------------------------------------------------


@needs_torchao
def test_with_the_cache(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, linears="fp8", cache=FirstBlockCache(0.35, warmup_steps=1))
    uncached = generate(pipe, steps=1)
    assert uncached.isfinite().all()
    generate(pipe, steps=6)
    assert {record.reused for record in handle.records} == {True, False}


@needs_torchao
def test_a_quantised_block_compiles_whole(pipe: HunyuanVideoPipeline) -> None:
    accelerate(pipe, linears="fp8")
    block = pipe.transformer.single_transformer_blocks[0]
    video, text, temb = torch.randn(2, 9, 48), torch.randn(2, 5, 48), torch.randn(2, 48)
    with torch.no_grad():
        expected = block(video, text, temb)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(video, text, temb)
    for got, wanted in zip(compiled, expected, strict=True):
        assert relative(got, wanted) <= 1e-6


@needs_torchao
def test_moving_and_casting_a_pipe_afterwards(pipe: HunyuanVideoPipeline) -> None:
    accelerate(pipe, linears="fp8")
    expected = generate(pipe)
    pipe.to("cpu")
    assert torch.equal(generate(pipe), expected)
    meta = tiny_pipeline().transformer
    meta.load_state_dict(pipe.transformer.state_dict(), assign=True)
    with torch.no_grad():
        inputs = transformer_inputs()
        assert torch.equal(meta(**inputs).sample, meta(**inputs).sample)


# --- summary ----------------------------------------------------------------------------------------------------------


@needs_torchao
def test_the_summary_names_what_was_quantised_and_what_it_takes(pipe: HunyuanVideoPipeline) -> None:
    before = sum(weight.nbytes for weight in weights(pipe.transformer).values())
    handle = accelerate(pipe, linears="fp8")
    done = {path: weight for path, weight in weights(pipe.transformer).items() if is_quantised(weight)}
    assert handle.linears is not None
    taken = handle.linears.transformers
    # One byte an element, and four for each row's scale.
    assert taken.now == sum(rows * (columns + 4) for rows, columns in (weight.shape for weight in done.values()))
    assert taken.before == sum(4 * weight.numel() for weight in done.values()) < before
    text = handle.summary()
    assert "linears     fp8 (e4m3, activations x weights, per row): 39 in the blocks, 0.2 MiB instead of 0.7" in text
    assert "fp8 (e4m3, weights alone): 21 in the text encoders" in text
    assert "dropped: remove() cannot bring them back" in text
    assert "linears" not in accelerate(tiny_pipeline()).summary()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["int4", True, 8, {}])
def test_other_linears_are_refused(pipe: HunyuanVideoPipeline, wanted: Any) -> None:
    with pytest.raises(ValueError, match=r"linears: got .*, allowed is one of \['fp8', 'fp8-weight-only'\]"):
        accelerate(pipe, linears=wanted)
    assert Handle.on(pipe.transformer) is None


def test_without_torchao_it_says_how_to_get_it(pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    linears._maker.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"] + ["torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"linears: .*torchao.* pip install para-kernels\[fp8\]"):
        accelerate(pipe, linears="fp8", cache=0.1)
    assert Handle.on(pipe.transformer) is None
    accelerate(pipe, linears=None)


@needs_torchao
def test_a_cpu_without_such_products_is_told_apart(pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(pipe)
    monkeypatch.setattr(linears, "cpu_multiplies_rows", lambda: False)
    with pytest.raises(
        ValueError, match=r"linears: torch \S+ multiplies FP8 with a scale per row on GPUs alone; .*weight"
    ):
        accelerate(pipe, linears="fp8")
    assert torch.equal(generate(pipe), expected)
    accelerate(pipe, linears=Fp8Linears(weight_only=True, keep_originals=True)).remove()


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 0), torch.bfloat16, r"has compute capability 8\.0, FP8 products need 8\.9 or later; .*fp8-weight-only"),
        ((9, 0), torch.float16, r"the transformer is torch\.float16, .* give torch\.bfloat16 alone"),
        ((8, 9), torch.bfloat16, None),
        ((10, 0), torch.bfloat16, None),
    ],
)
def test_the_gpu_must_multiply_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, message: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    pipe = tiny_pipeline(dtype=dtype)
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda pipe: torch.device("cuda")))
    arguments: Any = (linears.Fp8Linears(), pipe.transformer, HUNYUAN_VIDEO, pipe, None)
    if message is None:
        linears.check_linears(*arguments)
        return
    with pytest.raises(ValueError, match=message):
        linears.check_linears(*arguments)
    linears.check_linears(linears.Fp8Linears(weight_only=True), *arguments[1:])


@needs_torchao
def test_a_transformer_with_nothing_to_quantise_is_refused(pipe: HunyuanVideoPipeline) -> None:
    pipe = tiny_pipeline(num_attention_heads=1, attention_head_dim=24, rope_axes_dim=(8, 8, 8))
    with pytest.raises(ValueError, match=r"linears: the blocks .* none to quantise; .* multiples of 16"):
        accelerate(pipe, linears="fp8")


# --- over ranks -------------------------------------------------------------------------------------------------------


@needs_torchao
def test_over_two_ranks() -> None:
    first, second = ranks.launch(2, linears_ranks.run, timeout=300.0)
    assert isinstance(first, dict), first
    assert first.keys() == second.keys() == linears_ranks.WAYS.keys()
    for name, one in first.items():
        assert one["output"] == second[name]["output"]
        # A sum in another order moves some activations to the next e4m3 number: far less than FP8 itself changes.
        assert one["difference"] < 0.2 * one["fp8"]
        assert one["reused"] == one["reused alone"] == second[name]["reused"]
        assert set(one["reused"]) == {True, False}
