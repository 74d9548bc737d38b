"""Quality figures against their definitions, and the files made of videos against what was put in."""

from __future__ import annotations

import math
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

pytest.importorskip("diffusers")
pytest.importorskip("skimage")

from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from para_kernels.integrations.diffusers import figures, quality, video


def frames(seed: int, count: int = 3, height: int = 24, width: int = 20) -> np.ndarray:
    """(count, height, width, 3), float32, uniform in [0, 1)."""
    return np.random.default_rng(seed).random((count, height, width, 3), dtype=np.float32)


def smooth(count: int = 4, height: int = 32, width: int = 48) -> np.ndarray:
    """A slow gradient that moves: what a video codec keeps almost as it is."""
    t, y, x = np.meshgrid(np.arange(count) / 8, np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([(x + t) / 2, (y + t) / 2, (x + y) / 2], axis=-1).astype(np.float32)


def ssim_by_definition(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Equation 13 of Wang et al. 2004 over every full window of one channel, with unbiased variances."""
    c1, c2 = 0.01**2, 0.03**2
    windows_a, windows_b = (
        sliding_window_view(x.astype(np.float64), (window, window)).reshape(-1, window * window) for x in (a, b)
    )
    mean_a, mean_b = windows_a.mean(1), windows_b.mean(1)
    variance_a, variance_b = windows_a.var(1, ddof=1), windows_b.var(1, ddof=1)
    covariance = ((windows_a - mean_a[:, None]) * (windows_b - mean_b[:, None])).sum(1) / (window * window - 1)
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean())


def test_psnr_of_a_constant_offset() -> None:
    reference = 0.5 * frames(0)
    assert quality.psnr(reference, reference + np.float32(0.1)) == pytest.approx(20.0, abs=1e-4)


def test_psnr_is_scikit_images_over_all_frames() -> None:
    a, b = frames(0), frames(1)
    assert quality.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), rel=1e-6)


def test_psnr_of_equal_videos_is_infinite() -> None:
    assert quality.psnr(frames(0), frames(0)) == math.inf


def test_one_equal_frame_does_not_hide_the_others() -> None:
    a, b = frames(0), frames(1)
    b[0] = a[0]
    assert quality.psnr(a, b) == pytest.approx(quality.psnr(a[1:], b[1:]) + 10 * math.log10(3 / 2), rel=1e-6)


def test_ssim_is_its_definition() -> None:
    a = frames(0)
    b = np.clip(a + 0.2 * (frames(1) - 0.5), 0, 1)
    expected = np.mean([ssim_by_definition(a[f, ..., c], b[f, ..., c]) for f in range(3) for c in range(3)])
    # scikit-image averages over the image without its border: exactly the full windows.
    assert quality.ssim(a, b) == pytest.approx(expected, rel=1e-4)
    assert quality.ssim(a, a) == pytest.approx(1.0)


def test_compare_reports_the_mean_the_worst_and_the_largest() -> None:
    reference = np.stack([0.5 * frames(0), 0.5 * frames(1)])
    videos = reference.copy()
    videos[0] += np.float32(0.01)
    videos[1] += np.float32(0.1)
    result = quality.compare(reference, videos)
    assert result.psnr == pytest.approx(30.0, abs=1e-3)
    assert result.psnr_worst == pytest.approx(20.0, abs=1e-3)
    assert result.max_abs_diff == pytest.approx(0.1, abs=1e-6)
    assert result.ssim == pytest.approx(np.mean([quality.ssim(*pair) for pair in zip(reference, videos, strict=True)]))


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        (frames(0), frames(0, count=2), "video: shape"),
        (frames(0)[0], frames(0)[0], "video: shape"),
        (frames(0, height=6), frames(0, height=6), "no side may be below 7"),
        (frames(0), video.to_uint8(frames(0)), "video: dtype uint8"),
    ],
)
def test_quality_refuses(reference: np.ndarray, other: np.ndarray, message: str) -> None:
    for measure in (quality.psnr, quality.ssim):
        with pytest.raises(ValueError, match=message):
            measure(reference, other)


def test_compare_refuses_batches_of_other_shapes() -> None:
    with pytest.raises(ValueError, match="videos: shape"):
        quality.compare(frames(0)[None], np.stack([frames(0), frames(1)]))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [1, 3])
def test_mp4_holds_the_frames(tmp_path: Path, zoom: int) -> None:
    shown = smooth()
    video.write_mp4(tmp_path / "v.mp4", shown, fps=8, zoom=zoom)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "v.mp4"))
    properties = next(reader)
    decoded = np.stack([np.frombuffer(frame, np.uint8) for frame in reader])
    assert properties["size"] == (48 * zoom, 32 * zoom)
    assert properties["fps"] == 8
    decoded = decoded.reshape(4, 32 * zoom, 48 * zoom, 3).astype(np.float32) / 255
    assert quality.psnr(video.enlarge(shown, zoom), decoded) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": smooth()[0]}, "frames: shape"),
        ({"fps": 0}, "fps: 0"),
        ({"zoom": 0}, "zoom: 0"),
        ({"path": Path("v.gif")}, "output: 'v.gif'"),
        ({"path": Path("v.npy")}, "output: 'v.npy'"),
    ],
)
def test_write_mp4_refuses(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        video.write_mp4(**({"path": tmp_path / "v.mp4", "frames": smooth(), "fps": 8, "zoom": 1} | arguments))
    assert not list(tmp_path.iterdir())


def test_npy_holds_the_very_frames(tmp_path: Path) -> None:
    shown = smooth() * 1.5 - 0.2  # past 0 and 1: nothing is clipped
    video.write_video(tmp_path / "v.npy", shown, fps=8, zoom=3)
    written = np.load(tmp_path / "v.npy")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, shown.astype(np.float32))
    video.write_video(tmp_path / "v.mp4", smooth(), fps=8, zoom=1)
    assert {path.name for path in tmp_path.iterdir()} == {"v.npy", "v.mp4"}


@pytest.mark.parametrize(
    ("arguments", "message"), [({"frames": smooth()[0]}, "frames: shape"), ({"path": Path("v.mp4")}, "output: 'v.mp4'")]
)
def test_write_npy_refuses(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        video.write_npy(**({"path": tmp_path / "v.npy", "frames": smooth()} | arguments))
    assert not list(tmp_path.iterdir())


def test_values_are_rounded_and_clipped() -> None:
    np.testing.assert_array_equal(
        video.to_uint8(np.array([-0.5, 0.0, 0.5 / 255 + 1e-4, 1.0, 2.0])), np.array([0, 0, 1, 255, 255], np.uint8)
    )


def red(shape: tuple[int, ...], level: np.ndarray | float) -> np.ndarray:
    """(*shape, 3) of red at `level`, which broadcasts over `shape`."""
    image = np.zeros((*shape, 3), np.float32)
    image[..., 0] = level
    return image


def test_contact_sheet_shows_every_video_of_every_setting(tmp_path: Path) -> None:
    # One shade of red per (setting, prompt, frame), so that each cell can be told from the others and from text.
    levels = np.arange(2 * 3 * 4).reshape(2, 3, 4) / 40 + 0.1
    videos = [red((3, 4, 16, 16), row[:, :, None, None]) for row in levels]
    figures.contact_sheet(
        tmp_path / "sheet.png", ["stock", "exact\n1.0 s"], ["a", "b", "c"], videos, frames_per_video=2
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for setting in range(2):
        for prompt in range(3):
            for frame in (0, 3):  # the first and the last of four
                colour = video.to_uint8(red((), levels[setting, prompt, frame]))
                assert (sheet == colour).all(-1).sum() == 128 * 128, (setting, prompt, frame)
    labels = sheet[:, : figures.LABEL_WIDTH]
    assert (labels < 128).any()


def test_contact_sheet_shrinks_large_frames(tmp_path: Path) -> None:
    figures.contact_sheet(tmp_path / "sheet.png", ["stock"], ["a"], [red((1, 2, 180, 320), 0.4)])
    colour = video.to_uint8(red((), 0.4))
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == colour).all(-1).sum() == 2 * 128 * 72


def test_threshold_plot_draws_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    figures.threshold_plot(
        path, [0.05, 0.1, 0.2], [1.0, 1.4, 2.1], [math.inf, 35.0, 24.0], [1.0, 0.97, 0.9], "4 prompts"
    )
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue, red, green = ((31, 119, 180), (214, 39, 40), (44, 160, 44))  # matplotlib's own tab colours
    for colour in (blue, red, green):
        assert (np.abs(image - colour).sum(-1) < 12).sum() > 200, colour
