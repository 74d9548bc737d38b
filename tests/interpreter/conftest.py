"""These tests run the Triton kernels in Triton's interpreter, which must be chosen before Triton is imported.

`tests/test_triton_interpreter.py` runs them in a process of its own; by hand: TRITON_INTERPRET=1 pytest tests/interpreter
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
