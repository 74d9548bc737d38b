"""FP8 linears by torchao: which of a pipeline's linears, how, what they then take, and the way back.

A weight becomes torchao's `Float8Tensor`: e4m3 with a scale for each output channel. On the transformer the activations
are quantised too, at every call, with a scale for each token, and the product runs on the GPU's FP8 units. A token's
scale is its own: so the result does not depend on how the sequence is spread over ranks.

The tensors are made by torchao's `Float8Tensor.from_hp` and not by its `quantize_`, which also changes settings of
torch.compile for the whole process, leaves a method behind on every module, and refuses to work on a CPU.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .models import Family
from .offload import check_replaceable, store_weight, stored_weight

MULTIPLE = 16  # the FP8 product takes no other numbers of channels
FP8_SINCE = (8, 9)  # compute capability: Ada, Hopper and later multiply FP8
# The dtypes of weights, with what counts as the largest element of a row that has none as large: a row of zeros, as
# padding makes them, would else be divided by a scale of 0. torchao computes the scale, 1 / 448 of it, in the row's own
# dtype.
QUANTISABLE = {torch.bfloat16: 1e-12, torch.float16: 448 * 2.0**-24, torch.float32: 1e-12}


@dataclass(frozen=True)
class Fp8Linears:
    """Linears in FP8, for `accelerate(pipe, linears=...)`. `"fp8"` is short for `Fp8Linears()`.

    Of the transformer, the linears of its blocks are quantised: the projections of attention and the MLPs, which is
    where nearly all of the time goes. What scales and shifts the norms is not: it acts once per sample, so that there
    is memory to gain but no time. Nor is what stands before and behind the blocks, which acts once per token.

    Attributes:
        weight_only: quantise the weights alone and multiply in the pipe's dtype. Saves as much memory, on any device,
            but no time.
        text_encoders: quantise the pipe's text encoders too, their weights alone: they run once per call.
        keep_originals: keep the original weights on the CPU, so that the installation can be removed. They take there
            what they took before, and the GPU's memory is freed all the same. Without it they are gone, and with them
            the way back.
    """

    weight_only: bool = False
    text_encoders: bool = True
    keep_originals: bool = False


LINEARS: Mapping[str, Fp8Linears] = {"fp8": Fp8Linears(), "fp8-weight-only": Fp8Linears(weight_only=True)}


@dataclass
class Taken:
    """What quantised linears take: how many there are, their bytes before and now."""

    count: int = 0
    before: int = 0
    now: int = 0

    def add(self, before: Tensor, now: Tensor) -> None:
        self.count += 1
        self.before += before.numel() * before.element_size()
        self.now += quantised_bytes(now)


class QuantisedLinears:
    """The linears that one installation has quantised: its transformers', and text encoders of the pipes that have
    those.

    Modules are known weakly, the handle must not hold its pipes.
    """

    def __init__(self, settings: Fp8Linears) -> None:
        self.settings = settings
        self.transformers = Taken()
        self.text_encoders = Taken()
        self._transformers: list[weakref.ref[nn.Module]] = []
        self._encoders: list[weakref.ref[nn.Module]] = []
        self._originals: list[tuple[weakref.ref[nn.Module], nn.Parameter]] = []

    def add_transformer(self, transformer: nn.Module, family: Family, device: torch.device) -> None:
        """Quantise the linears of the blocks, once; computed on `device`, kept where the weights are."""
        if all(known() is not transformer for known in self._transformers):
            self._transformers.append(weakref.ref(transformer))
            for linear in block_linears(transformer, family):
                self._quantise(linear, device, not self.settings.weight_only, self.transformers)

    def add_text_encoders(self, pipe: Any, device: torch.device) -> None:
        """Quantise the linears of the pipe's text encoders, each encoder once."""
        for encoder in text_encoders(pipe) if self.settings.text_encoders else []:
            if all(known() is not encoder for known in self._encoders):
                self._encoders.append(weakref.ref(encoder))
                for linear in layer_linears(encoder):
                    self._quantise(linear, device, False, self.text_encoders)

    def check_removable(self, argument: str, otherwise: str) -> None:
        """Raise a ValueError that names `argument` if the original weights are gone or have no way back."""
        if not self.settings.keep_originals:
            raise ValueError(
                f"{argument}: the original weights of the FP8 linears were not kept; allowed after"
                f" accelerate(pipe, linears=Fp8Linears(keep_originals=True)){otherwise}"
            )
        for known in (*self._transformers, *self._encoders):
            if (root := known()) is not None:
                check_replaceable(root, argument)

    def restore(self) -> None:
        """Put the original weights back, on the device where the FP8 ones are now. Those that somebody has replaced
        since stay."""
        for known, original in self._originals:
            if (module := known()) is not None and is_quantised(now := stored_weight(module)):
                store_weight(module, _moved(original, now.device))
        self._originals.clear()

    def _quantise(self, linear: nn.Linear, device: torch.device, activations: bool, taken: Taken) -> None:
        original = stored_weight(linear)
        if is_quantised(original):
            taken.add(original, original)
            return
        quantised = quantise(original.detach().to(device), activations).to(original.device)
        if self.settings.keep_originals:
            kept = (
                original if isinstance(original, nn.Parameter) else nn.Parameter(original, linear.weight.requires_grad)
            )
            self._originals.append((weakref.ref(linear), _moved(kept, torch.device("cpu"))))
        taken.add(original, quantised)
        store_weight(linear, nn.Parameter(quantised, requires_grad=False))


# --- which linears ----------------------------------------------------------------------------------------------------


def block_linears(transformer: nn.Module, family: Family) -> list[nn.Linear]:
    """The quantisable linears of the transformer's blocks, but for those that the family keeps."""

    def is_kept(path: str) -> bool:
        return any(fnmatchcase(part, kept) for part in path.split(".") for kept in family.kept_linears)

    blocks = [block for name in family.block_lists for block in getattr(transformer, name)]
    return list(_quantisable(module for block in blocks for path, module in block.named_modules() if not is_kept(path)))


def layer_linears(encoder: nn.Module) -> list[nn.Linear]:
    """The quantisable linears of a text encoder's layers: those below a list of modules. What stands before and behind
    is kept, as in the transformer."""
    layers = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    return list(_quantisable(dict.fromkeys(module for layer in layers for module in layer.modules())))


def text_encoders(pipe: Any) -> list[nn.Module]:
    """`text_encoder`, `text_encoder_2`, ... of a pipeline, as far as they are loaded."""
    found = [getattr(pipe, name, None) for name in getattr(pipe, "components", ()) if name.startswith("text_encoder")]
    return [encoder for encoder in found if isinstance(encoder, nn.Module)]


def _quantisable(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """Plain linears whose sizes the FP8 product takes, quantised already or not. Subclasses have forwards of their own,
    which may do anything with the weight."""
    for module in modules:
        if type(module) is not nn.Linear:
            continue
        weight = stored_weight(module)
        if weight.dtype in QUANTISABLE and all(size % MULTIPLE == 0 for size in weight.shape):
            yield module


# --- torchao ----------------------------------------------------------------------------------------------------------


def quantise(weight: Tensor, activations: bool) -> Tensor:
    """A weight (out, in) in e4m3 with a scale per output channel; with `activations`, the linear's input (..., in) is
    then quantised too, with a scale per row.

    Bias, input and output keep their dtype.
    """
    return _maker()(weight, activations)


def is_quantised(weight: Tensor) -> bool:
    """Whether it is one of torchao's, in one byte an element."""
    return all(hasattr(weight, name) for name in ("qdata", "scale"))


def quantised_bytes(weight: Tensor) -> int:
    """Of a quantised weight with its scales."""
    return sum(getattr(weight, name).nbytes for name in ("qdata", "scale"))


@cache
def _maker() -> Callable[[Tensor, bool], Tensor]:
    """Imported only when asked for: it takes seconds."""
    try:
        from torchao.float8.inference import Float8MMConfig  # pyright: ignore[reportMissingImports]
        from torchao.quantization import Float8Tensor, PerRow  # pyright: ignore[reportMissingImports]
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"linears: FP8 is done by torchao, which is missing or too old ({error}); pip install para-kernels[fp8]"
        ) from error

    def make(weight: Tensor, activations: bool) -> Tensor:
        least = QUANTISABLE[weight.dtype]
        return Float8Tensor.from_hp(
            weight,
            granularity=PerRow(),
            hp_value_lb=least,
            # Sums stay in the FP8 units' own precision, as torchao's own recipes have it for inference.
            mm_config=Float8MMConfig(use_fast_accum=True),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow(), hp_value_lb=least)
            if activations
            else None,
        )

    return make


# --- checks -----------------------------------------------------------------------------------------------------------


def resolve_linears(linears: Any) -> Fp8Linears | None:
    """What the argument `linears` stands for."""
    if linears is None or isinstance(linears, Fp8Linears):
        return linears
    if isinstance(linears, str) and linears in LINEARS:
        return LINEARS[linears]
    raise ValueError(f"linears: got {linears!r}, allowed is one of {list(LINEARS)}, an Fp8Linears or None")


def check_torchao() -> None:
    """Raise a ValueError that says how to get it if torchao is missing."""
    _maker()


def check_linears(
    settings: Fp8Linears, transformer: nn.Module, family: Family, pipe: Any, there: Fp8Linears | None
) -> None:
    """Find out whether `settings` can be put on the pipe, on whose transformer `there` is installed already.

    Raises:
        ValueError: if torchao is missing, the device cannot multiply FP8, no linear can be quantised, or weights are
            offloaded in a way that does not let them be exchanged.
    """
    check_torchao()
    for encoder in text_encoders(pipe) if settings.text_encoders else []:
        if not all(map(_is_done, layer_linears(encoder))):
            check_replaceable(encoder, "linears")
    if settings != there:
        linears = block_linears(transformer, family)
        _check_transformer(transformer, linears, settings.keep_originals and there is None)
        if not settings.weight_only:
            _check_device(execution_device(pipe, transformer), stored_weight(linears[0]).dtype)


def _check_transformer(transformer: nn.Module, linears: Sequence[nn.Linear], needs_originals: bool) -> None:
    kind = type(transformer).__name__
    if not linears:
        raise ValueError(
            f"linears: the blocks of the {kind} have none to quantise; allowed are plain nn.Linear of"
            f" {', '.join(map(str, QUANTISABLE))} with channels that are multiples of {MULTIPLE}"
        )
    done = sum(map(_is_done, linears))
    if done < len(linears):
        check_replaceable(transformer, "linears")
    if needs_originals and done:
        raise ValueError(
            f"linears: got keep_originals=True, but {done} linears of the {kind} are FP8 already and their original"
            " weights gone; load the pipe anew"
        )


def _is_done(linear: nn.Linear) -> bool:
    return is_quantised(stored_weight(linear))


@functools.cache
def cpu_multiplies_rows() -> bool:
    """Whether this torch has FP8 products with a scale per row on the CPU; 2.11 has not."""
    rows, scales = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(rows, rows.T, scale_a=scales, scale_b=scales.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and not cpu_multiplies_rows():
        raise ValueError(
            f"linears: torch {torch.__version__} multiplies FP8 with a scale per row on GPUs alone;"
            ' linears="fp8-weight-only" works on any device'
        )
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_SINCE:
        has, needs = (".".join(map(str, version)) for version in (capability, FP8_SINCE))
        raise ValueError(
            f"linears: {torch.cuda.get_device_name(device)} has compute capability {has}, FP8 products need {needs} or"
            ' later; linears="fp8-weight-only" saves the memory on any GPU'
        )
    if dtype != torch.bfloat16:
        raise ValueError(
            f"linears: the transformer is {dtype}, FP8 products with a scale per row give torch.bfloat16 alone;"
            ' load the pipe in it, or take linears="fp8-weight-only"'
        )


def execution_device(pipe: Any, transformer: nn.Module) -> torch.device:
    """Where the pipe, which has that transformer, computes; its weights may be offloaded from there. A class of one's
    own need not say it.
    """
    device = getattr(pipe, "_execution_device", None)
    return next(transformer.parameters()).device if device is None else torch.device(device)


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The very object where it is there already: others may hold it."""
    if parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
