"""The shipped toy: a small HunyuanVideo pipeline trained on moving handwritten digits, and the scripts that made it."""

from pathlib import Path

TOY_PIPELINE: Path = Path(__file__).parent / "pipeline"
"""Directory for `HunyuanVideoPipeline.from_pretrained`: 17 frames of 64 x 64, prompts like `a 7 moving left`."""

__all__ = ["TOY_PIPELINE"]
