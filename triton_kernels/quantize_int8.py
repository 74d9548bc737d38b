"""stub"""
from typing import NamedTuple
K_BLOCK = 128
class Quantised(NamedTuple):
    q: int
