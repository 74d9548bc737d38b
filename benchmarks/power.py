"""Clock and power of the GPU while one function runs without pause. The card is only asked, never set."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

SAMPLE_SECONDS = 0.02
WARM_UP_SHARE = 0.4  # of the samples, at the start: the clock needs about half a second to settle under load


@dataclass(frozen=True)
class Sustained:
    """One function, called without pause: milliseconds per call, and medians of SM clock and power; None if unknown."""

    ms: float
    clock_mhz: float | None
    power_w: float | None


class PowerMeter:
    """Samples of (SM clock in MHz, power in W) through NVML, taken in a thread inside the `with` block.

    Without the package nvidia-ml-py or a driver that answers there are none, and `missing` says why.
    """

    def __init__(self, device: torch.device) -> None:
        self.samples: list[tuple[float, float]] = []
        self.missing: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        try:
            self._nvml: Any = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except Exception as error:  # Of any kind: a report without clocks is better than none.
            self.missing = f"{type(error).__name__}: {error}"

    def __enter__(self) -> PowerMeter:
        if self.missing is None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def settled(self) -> tuple[float | None, float | None]:
        """Medians of clock and power over the samples after the warm-up."""
        samples = self.samples[int(len(self.samples) * WARM_UP_SHARE) :]
        if not samples:
            return None, None
        clocks, powers = zip(*samples, strict=True)
        return median(clocks), median(powers)

    def _sample(self) -> None:
        try:
            while not self._stop.wait(SAMPLE_SECONDS):
                clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
                self.samples.append((float(clock), self._power()))
        except self._nvml.NVMLError as error:
            self.missing = str(error)

    def _power(self) -> float:
        """Watts at this instant; where the driver has only the average of the last second, that."""
        (field,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn == self._nvml.NVML_SUCCESS:
            return field.value.uiVal / 1e3
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3


def sustained(function: Callable[[], object], device: torch.device, seconds: float, expected_ms: float) -> Sustained:
    """Call `function` on CUDA for about `seconds`, one call queued behind the other.

    Args:
        expected_ms: of one call, as timed before; it gives the number of calls.
    """
    calls = max(3, round(seconds * 1e3 / expected_ms))
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    with PowerMeter(device) as meter:
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        torch.cuda.synchronize(device)
    return Sustained(start.elapsed_time(stop) / calls, *meter.settled())
