"""Context parallelism: one sequence over several ranks, exactly, at any length and with any number of heads."""

from para_kernels.parallel.agreement import check_agreement
from para_kernels.parallel.attention import context_parallel_attention, ring_attention, ulysses_attention
from para_kernels.parallel.failure import RankFailure, deadline, set_layer
from para_kernels.parallel.mesh import ContextParallel, init_context_parallel_mesh
from para_kernels.parallel.progress import raise_on_failure
from para_kernels.parallel.sharding import Shards
from para_kernels.parallel.transport import Transport, select_transport

__all__ = [
    "ContextParallel",
    "RankFailure",
    "Shards",
    "Transport",
    "check_agreement",
    "context_parallel_attention",
    "deadline",
    "init_context_parallel_mesh",
    "raise_on_failure",
    "ring_attention",
    "select_transport",
    "set_layer",
    "ulysses_attention",
]
