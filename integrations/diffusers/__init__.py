"""para_kernels under diffusers pipelines: `accelerate(pipe)` is the one line."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("this needs diffusers: pip install 'para-kernels[diffusers]'") from error

from para_kernels.parallel.mesh import init_context_parallel_mesh

from .accelerate import accelerate, apply_cache_on_pipe, parallelize_pipe
from .attention import ParaAttnProcessor
from .families import known_families, register_family
from .handle import Handle
from .linears import Fp8Linears
from .models import Conditioning, Family, Passes, ShardPlan
from .processors import Processor
from .vae import ParallelVae, parallelize_vae

__all__ = [
    "Conditioning",
    "Family",
    "Fp8Linears",
    "Handle",
    "ParaAttnProcessor",
    "ParallelVae",
    "Passes",
    "Processor",
    "ShardPlan",
    "accelerate",
    "apply_cache_on_pipe",
    "init_context_parallel_mesh",
    "known_families",
    "parallelize_pipe",
    "parallelize_vae",
    "register_family",
]
