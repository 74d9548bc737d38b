"""The one line: `accelerate(pipe)`. Everything is checked here, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from numbers import Real
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from para_kernels import ContextParallel
from para_kernels.cache import FirstBlockCache, Policy, TeaCache, check_threshold
from para_kernels.parallel.failure import DEFAULT_TIMEOUT

from .attention import ATTEND
from .compiled import DEFAULT_BACKEND
from .families import check_transformer, class_names, family_of
from .handle import Handle
from .installation import STOCK, Settings
from .linears import Fp8Linears, check_linears, execution_device, resolve_linears
from .models import Family
from .places import Places

ATTENTION = tuple(ATTEND)


class Keep(Enum):
    """The default of an argument that, when not given, leaves its setting as it is."""

    AS_IS = "as is"


def accelerate(
    pipe: Any,
    cache: Policy | float | bool | Keep | None = Keep.AS_IS,
    attention: str = "exact",
    parallel: ContextParallel | Keep | None = Keep.AS_IS,
    compile: bool | str | Keep | None = Keep.AS_IS,  # noqa: A002
    linears: Fp8Linears | str | Keep | None = Keep.AS_IS,
    graphs: bool | Keep = Keep.AS_IS,
) -> Handle:
    """Put this package's attention, and if asked for a cache of steps, context parallelism, compiled blocks, FP8
    linears and CUDA graphs, under a diffusers pipeline.

    Works on this pipeline's transformer alone (on both of Wan 2.2's), and on its instance: pipelines that share the
    transformer share the installation, others are not touched. Called again it re-tunes what is there.

    Args:
        pipe: a pipeline of one of the families in models.py, or of a registered one; or a subclass.
        cache: a policy: `FirstBlockCache`, `TeaCache` or `AdaCache`; a number is the threshold of a `FirstBlockCache`;
            True for the family's default threshold; None, False or 0 for no cache, which is bit for bit the uncached
            pipe. Not given: as it is, that is none on a pipe that has not
            been accelerated.
        attention: `"exact"`; or `"int8"`, `flash_attention_int8` for the joint sequence of video and text, which
            changes the output, and takes longer where sequences are short: `summary()` says from where on it pays. On
            several ranks keys and values travel round the ring in 8 bits.
        parallel: spreads the work over the ranks of the running `torch.distributed` world, see `parallelize_pipe`; None
            for no spreading. Not given: as it is.
        compile: True to compile the transformer's blocks, each kind as one graph of `torch.compile` that serves every
            resolution; None or False not to; a name for another backend than "inductor". They are compiled when they
            first run. Hooks of offloading may stand on blocks and on the transformer, not inside of blocks. Not given:
            as it is.
        linears: `"fp8"` for linears in FP8, by torchao: those of the transformer's blocks, activations and weights,
            and those of the pipe's text encoders, weights alone; `"fp8-weight-only"` for the weights alone everywhere;
            or an `Fp8Linears`. The original weights are dropped, which is what frees their memory, unless it says
            `keep_originals=True`: only then can the installation be removed. None for linears as they were. Not given:
            as it is.
        graphs: True to record the transformer's forward as CUDA graphs, at the second step of every new size: a GPU
            that is done sooner than Python no longer waits for it. They take the memory of a forward once more. With a
            cache only its decision and what it keeps stay in Python. Without effect on a CPU, under autocast, and
            while LoRA adapters are loaded. What a replay does not run are hooks of other packages inside of the
            transformer, and what it does not see are attention processors that were put on since: call this again
            after such a change. Not given: as it is.

    Returns:
        The handle of the installation: `summary()`, `records`, `remove()`. The same one every time until it is removed.

    Raises:
        ValueError: if the pipe is not supported or an argument is not allowed, also beside the others. The pipe is then
            as it was.
    """
    family, transformers = recognised(pipe)
    if attention not in ATTENTION:
        raise ValueError(f"attention: got {attention!r}, allowed is one of {list(ATTENTION)}")
    handle = _handle(transformers, family)
    policy = handle.settings.cache if isinstance(cache, Keep) else _policy(cache, family)
    wanted = handle.settings.linears if isinstance(linears, Keep) else resolve_linears(linears)
    _check_linears(wanted, handle, transformers, pipe)
    backend = handle.settings.compile if isinstance(compile, Keep) else _backend(compile)
    recorded = handle.settings.graphs if isinstance(graphs, Keep) else graphs
    if not isinstance(recorded, bool):
        raise ValueError(f"graphs: got {graphs!r}, allowed is True or False")
    places = handle.settings.parallel if isinstance(parallel, Keep) else _places(parallel, handle)
    return _configured(handle, pipe, transformers, Settings(attention, policy, places, backend, wanted, recorded))


def apply_cache_on_pipe(
    pipe: Any,
    residual_diff_threshold: float | None = None,
    *,
    warmup_steps: int = 0,
    max_consecutive_hits: int | None = None,
    downsample_factor: int = 1,
) -> Handle:
    """Put First Block Cache under a diffusers pipeline and leave its attention as it is. Called again it re-tunes.

    Args:
        pipe: as for `accelerate`, before or after which it may be called.
        residual_diff_threshold: a step reuses below this relative change of the first block's residual; None for the
            family's default, 0 for no cache.
        warmup_steps, max_consecutive_hits, downsample_factor: see `FirstBlockCache`.

    Returns:
        The handle of the installation, as from `accelerate`.

    Raises:
        ValueError: if the pipe is not supported or an argument is not allowed. The pipe is then as it was.
    """
    family, transformers = recognised(pipe)
    threshold = family.cache_threshold if residual_diff_threshold is None else residual_diff_threshold
    check_threshold("residual_diff_threshold", threshold)
    policy = FirstBlockCache(
        threshold,
        warmup_steps=warmup_steps,
        max_consecutive_hits=max_consecutive_hits,
        downsample_factor=downsample_factor,
    )
    handle = _handle(transformers, family)
    _check_linears(handle.settings.linears, handle, transformers, pipe)
    return _configured(handle, pipe, transformers, replace(handle.settings, cache=_unless_never(policy)))


def parallelize_pipe(
    pipe: Any, *, mesh: DeviceMesh | None = None, transport: str = "auto", timeout: float = DEFAULT_TIMEOUT
) -> Handle:
    """Spread a diffusers pipeline's transformer over several GPUs or processes. Called again it re-tunes.

    To be called on every rank, on a pipeline with the same weights, as is the pipeline then: every rank is given the
    same prompts and returns the same output, that of one process (in 8 bits, one as far from exact as that). The joint
    sequence of video and text is cut into contiguous pieces, one for each rank of "ring" and "ulysses"; the samples of
    a batch over the ranks of "batch". Nothing has to divide. All ranks start from the noise of rank 0, which alone
    shows its progress bar. This package's attention comes with it, exact unless there is another; and a cache, put on
    before or after, decides alike on all ranks.

    Args:
        pipe: as for `accelerate`, before or after which it may be called.
        mesh: with the dims ("batch", "ring", "ulysses") or ("ring", "ulysses"), as `init_context_parallel_mesh` makes
            it; None for all ranks, split as suits each call: `ContextParallel("auto")`.
        transport: `"auto"`, `"peer"`, `"host"` or `"collective"`: how keys and values travel.
        timeout: seconds that a rank waits for another before all end with an error.

    Returns:
        The handle of the installation, as from `accelerate`.

    Raises:
        ValueError: if the pipe is not supported, an argument is not allowed, or `torch.distributed` is not initialised.
            The pipe is then as it was.
    """
    family, transformers = recognised(pipe)
    wanted = ContextParallel("auto" if mesh is None else None, transport=transport, timeout=timeout)
    handle = _handle(transformers, family)
    _check_linears(handle.settings.linears, handle, transformers, pipe)
    places = _places(wanted, handle) if mesh is None else Places(wanted, mesh)
    attention = "exact" if handle.settings.attention == STOCK else handle.settings.attention
    return _configured(handle, pipe, transformers, replace(handle.settings, attention=attention, parallel=places))


def recognised(pipe: Any) -> tuple[Family, dict[str, Any]]:
    """The pipe's family and its transformers by their components' names, out of `torch.compile`'s wrapper.

    Raises:
        ValueError: if the pipe is not supported.
    """
    family = family_of(pipe)
    for path in family.without:
        if (value := _attribute(pipe, path)) not in (None, False):
            got = repr(value) if isinstance(value, bool) else f"a {type(value).__name__}"
            raise ValueError(f"pipe: its {path} is {got}, which is not supported; allowed is none")
    there = {name: module for name in family.components if (module := getattr(pipe, name, None)) is not None}
    transformers = {name: getattr(module, "_orig_mod", module) for name, module in there.items()}
    if not transformers:
        missing, allowed = " and ".join(family.components), " or ".join(family.transformers)
        raise ValueError(f"pipe: its {missing} is None, allowed is {allowed}")
    for name, transformer in transformers.items():
        _check_supported(family, name, transformer)
    return family, transformers


def _check_supported(family: Family, name: str, transformer: Any) -> None:
    if not class_names(transformer) & set(family.transformers):
        raise ValueError(
            f"pipe: its {name} is a {type(transformer).__name__}, allowed is {' or '.join(family.transformers)}"
        )
    for entry, allowed in family.config:
        if (value := getattr(transformer.config, entry, None)) != allowed:
            raise ValueError(f"pipe: its {name} has {entry}={value!r}, allowed is {allowed!r}")
    check_transformer(family, transformer)


def _attribute(thing: Any, path: str) -> Any:
    """What stands at a dotted path; None where the path ends early."""
    for name in path.split("."):
        thing = getattr(thing, name, None)
    return thing


def _policy(cache: Policy | float | bool | None, family: Family) -> Policy | None:
    if cache is None or cache is False:
        return None
    if cache is True:
        return FirstBlockCache(family.cache_threshold)
    if isinstance(cache, TeaCache) and cache.rescale is None:
        cache = _rescaled(cache, family)
    if isinstance(cache, Policy):
        return _unless_never(cache)
    if not isinstance(cache, Real):
        raise ValueError(f"cache: got {cache!r}, allowed is a policy, a threshold >= 0, True, False or None")
    check_threshold("cache", cache)
    return _unless_never(FirstBlockCache(cache))


def _places(parallel: ContextParallel | None, handle: Handle) -> Places | None:
    """What is there stays where it is what is wanted: process groups are dear."""
    if parallel is None:
        return None
    if not isinstance(parallel, ContextParallel):
        raise ValueError(f"parallel: got {parallel!r}, allowed is a ContextParallel or None")
    there = handle.settings.parallel
    return there if there is not None and (there.wanted, there.mesh) == (parallel, None) else Places(parallel)


def _backend(wanted: bool | str | None) -> str | None:
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return DEFAULT_BACKEND
    if not isinstance(wanted, str):
        raise ValueError(f"compile: got {wanted!r}, allowed is True, False, None or the name of a backend")
    return wanted


def _check_linears(wanted: Fp8Linears | None, handle: Handle, transformers: Mapping[str, Any], pipe: Any) -> None:
    """Before process groups are made, and for a pipe that shares an installed transformer too."""
    if wanted is not None:
        known = handle.transformers
        for transformer in transformers.values():
            there = handle.settings.linears if any(transformer is one for one in known) else None
            check_linears(wanted, transformer, handle.family, pipe, there)


def _rescaled(policy: TeaCache, family: Family) -> TeaCache:
    """With the polynomial published for the family."""
    if family.teacache_rescale is None:
        raise ValueError(
            f"cache: TeaCache has no published polynomial for {family.name}, allowed is rescale=(coefficients);"
            " `para-kernels tune` fits one, (1.0, 0.0) rescales nothing"
        )
    return replace(policy, rescale=family.teacache_rescale)


def _unless_never(policy: Policy) -> Policy | None:
    """No diff lies below 0: such a policy needs no hooks."""
    return policy if policy.threshold > 0 else None


def _handle(transformers: Mapping[str, Any], family: Family) -> Handle:
    """The handle that is installed on the transformers, or a new one that is not yet."""
    handles = {id(handle): handle for x in transformers.values() if (handle := Handle.on(x)) is not None}
    if len(handles) > 1:
        raise ValueError(
            f"pipe: its {' and '.join(transformers)} have been accelerated as those of different pipelines, allowed is"
            " one installation; call remove() of the other handles first"
        )
    return next(iter(handles.values()), None) or Handle(family)


def _configured(handle: Handle, pipe: Any, transformers: Mapping[str, Any], settings: Settings) -> Handle:
    first, *_ = transformers.values()
    handle.configure(transformers, settings, execution_device(pipe, first))
    handle.watch(pipe)
    return handle
