from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    cpu_capability: str
    torch: str

def build_info() -> BuildInfo:
    """Compiler, CPU capability chosen at run time, and the torch compiled against."""
