"""The toy: its drawings against geometry, its reader against real digits, and the shipped pipeline end to end."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from para_kernels.integrations.diffusers.toy import TOY_PIPELINE, evaluate, train
from para_kernels.integrations.diffusers.toy.digits import ClipRenderer, split_digits, to_uint8
from para_kernels.integrations.diffusers.toy.parts import SHIFT, new_parts
from para_kernels.integrations.diffusers.toy.prompts import (
    COLOURS,
    MOTIONS,
    SIZES,
    SPEEDS,
    Scene,
    evaluation_prompts,
    is_held_out,
    sample_prompts,
)

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def renderer() -> ClipRenderer:
    _, images, _, labels = split_digits()
    return ClipRenderer(images, labels)


@pytest.fixture(scope="module")
def reader() -> evaluate.Reader:
    return evaluate.Reader()


@pytest.fixture(scope="module")
def pipe() -> HunyuanVideoPipeline:
    pipe = HunyuanVideoPipeline.from_pretrained(TOY_PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_training_never_sees_a_held_out_wording() -> None:
    trained = {text for _, text in sample_prompts(3000, seed=5)}
    asked = [text for _, text in evaluation_prompts(200, seed=1)]
    assert not any(map(is_held_out, trained))
    assert all(map(is_held_out, asked))


def test_evaluation_asks_for_every_digit_and_motion_evenly() -> None:
    scenes = [scene for scene, _ in evaluation_prompts(90, seed=1)]
    assert {(scene.digit, scene.motion) for scene in scenes} == {(d, m) for d in range(10) for m in MOTIONS}


def test_real_digits_are_split_without_overlap() -> None:
    train_images, test_images, train_labels, test_labels = split_digits()
    assert (len(train_images), len(test_images)) == (len(train_labels), len(test_labels)) == (1347, 450)
    assert not {image.tobytes() for image in train_images} & {image.tobytes() for image in test_images}


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_drawn_velocity_is_the_asked_for_one(renderer: ClipRenderer, motion: str, speed: str) -> None:
    scene = Scene(3, motion, speed=speed)
    clip = to_uint8(renderer.render([scene], random.Random(0)))
    velocity = evaluate.track(evaluate.ink_of(clip)[0])
    # The centroid of sampled ink wanders by a few hundredths of a pixel as the sub-pixel phase changes.
    np.testing.assert_allclose(velocity, np.array(MOTIONS[motion]) * SPEEDS[speed], atol=0.08)


@pytest.mark.parametrize("colour", COLOURS)
def test_drawn_colours(renderer: ClipRenderer, colour: str) -> None:
    clip = to_uint8(renderer.render([Scene(8, "still", colour=colour, background="gray")], random.Random(0)))
    frame = clip[0, 0].reshape(-1, 3) / 255
    np.testing.assert_allclose(frame[0], 0.25, atol=0.005)
    assert np.abs(frame - np.array(COLOURS[colour])).max(axis=1).min() < 0.05


def test_larger_words_draw_larger_digits(renderer: ClipRenderer) -> None:
    scenes = [Scene(8, "still", size=size) for size in SIZES]
    ink = evaluate.ink_of(to_uint8(renderer.render(scenes, random.Random(0), glyphs=[0] * len(scenes))))
    area = (ink[:, 0] > 0.5).sum(axis=(1, 2))
    assert list(area) == sorted(area)
    assert area[-1] > 1.5 * area[0]


def test_crop_ignores_place_and_size(renderer: ClipRenderer) -> None:
    scenes = [Scene(5, "lower right", size=size, speed="fast") for size in SIZES]
    clips = to_uint8(renderer.render(scenes, random.Random(1), glyphs=[7] * len(scenes)))
    ink = evaluate.ink_of(clips)
    crops = evaluate.crop_ink(ink[:, [0, 8, 16]].reshape(-1, 64, 64))
    similarity = np.corrcoef(crops)
    assert similarity.min() > 0.95


def test_blank_clip_is_read_without_error(reader: evaluate.Reader) -> None:
    reading = reader.read(np.zeros((1, 17, 64, 64, 3), np.uint8))[0]
    assert reading.motion == "still"
    assert reading.velocity == (0.0, 0.0)


def test_reader_knows_real_digits_it_never_saw(reader: evaluate.Reader) -> None:
    assert reader.accuracy["digit"] >= 0.97
    assert reader.accuracy["motion"] >= 0.99


def test_reader_is_not_fooled_by_swapped_answers(reader: evaluate.Reader, renderer: ClipRenderer) -> None:
    scenes = [Scene(digit, "left") for digit in range(10)]
    readings = reader.read(to_uint8(renderer.render(scenes, random.Random(2))))
    swapped = [Scene((scene.digit + 1) % 10, "right") for scene in scenes]
    assert evaluate.score(swapped, readings)["digit"] <= 0.2
    assert evaluate.score(swapped, readings)["motion"] == 0.0


def test_noise_levels_follow_the_scheduler() -> None:
    """Training's noise at level s and the scheduler's `scale_noise` at timestep 1000 s are the same mixture."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 31)[:-1].tolist())
    data, noise = torch.randn(1, 4), torch.randn(1, 4)
    for index in (0, 7, 29):
        mixed = scheduler.scale_noise(data, scheduler.timesteps[index : index + 1], noise)
        sigma = scheduler.timesteps[index] / 1000
        torch.testing.assert_close(mixed, torch.lerp(data, noise, sigma))


def test_exact_velocity_samples_the_data_exactly() -> None:
    """With the velocity that training teaches, the scheduler's steps lead from noise to the data point."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 31)[:-1].tolist())
    data, sample = torch.randn(5), torch.randn(5)
    velocity = sample - data
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    torch.testing.assert_close(sample, data, atol=1e-5, rtol=0)


def test_two_training_steps_save_a_pipeline_that_runs(tmp_path) -> None:
    torch.manual_seed(0)
    parts = new_parts(tmp_path / "tokenizers")
    clips = torch.rand(1, 3, 17, 64, 64) * 2 - 1
    loss, _, _ = train.vae_loss(parts.vae, clips)
    loss.backward()
    assert all(parameter.grad is not None for parameter in parts.vae.parameters())
    tokens = train.tokenize(["a 7, left", ""], parts.llama_tokenizer, parts.clip_tokenizer, train.TEXT_TOKENS)
    flow = train.flow_loss(parts, torch.randn(2, 16, 5, 8, 8), list(tokens))
    # Untrained, the output layer is zero: the loss is the mean square of noise - data, which is 2.
    assert 1.8 < flow.item() < 2.2
    parts.save(tmp_path / "pipeline")
    pipe = HunyuanVideoPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.float32}
    frames = pipe("a 7, left", height=64, width=64, num_frames=17, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 17, 64, 64, 3)
    assert np.isfinite(frames).all()


def test_directory_is_small() -> None:
    files = [path for path in TOY_PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * MEGABYTE


def test_template_takes_exactly_the_tokens_that_the_pipeline_crops(pipe: HunyuanVideoPipeline) -> None:
    prefix = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    expected = pipe.tokenizer(prefix).input_ids
    assert len(expected) == DEFAULT_PROMPT_TEMPLATE["crop_start"]
    for prompt in ("seven, left", "Zebra 42 überall!", ""):
        wrapped = pipe.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)).input_ids
        assert wrapped[: len(expected)] == expected


def test_prompts_have_clearly_different_lengths(pipe: HunyuanVideoPipeline) -> None:
    _, _, mask = pipe.encode_prompt([text for _, text in evaluation_prompts(200, seed=1)])
    lengths = mask.sum(dim=1)
    assert lengths.min() <= 8
    assert lengths.max() >= 40


def test_plain_call_shows_what_was_asked_for(pipe: HunyuanVideoPipeline, reader: evaluate.Reader) -> None:
    scenes = [Scene(7, "left"), Scene(0, "lower right")]
    prompts = [
        "a handwritten 7 moving to the left",
        "a handwritten zero drifting to the lower right, seen from a fixed camera",
    ]
    videos, _ = evaluate.generate(pipe, prompts, first_seed=11, steps=20, batch=2)
    assert videos.shape == (2, 17, 64, 64, 3)
    assert evaluate.score(scenes, reader.read(videos))["digit_and_motion"] == 1.0


def test_committed_figures_meet_the_bar() -> None:
    figures = json.loads((TOY_PIPELINE.parent / "figures.json").read_text())
    assert figures["count"] >= 200
    assert figures["generated"]["digit"] >= 0.9
    assert figures["generated"]["motion"] >= 0.9
