"""Layers that put para_kernels under other libraries, one package each."""

if __name__ != "para_kernels.integrations":
    raise ImportError(
        f"the integrations were imported as {__name__!r}; import them as 'para_kernels.integrations'", name=__name__
    )
