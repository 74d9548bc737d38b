from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    cpu_capability: str
    openmp: bool
    torch: str

def build_info() -> BuildInfo:
    """Compiler, CPU capability chosen at run time, whether the ops are parallel, and the torch compiled against."""
