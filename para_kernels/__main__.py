"""`python -m para_kernels` is the command `para-kernels`; `torchrun -m para_kernels` runs it on several ranks."""

import sys

from para_kernels.integrations.diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main())
