"""The commands of ``para-kernels``, a file each: `add_to` says what it takes, `run` does it."""
