"""The compute kernels: declared in `ops`, readable in `reference`; fast in `cpu/` (by `native`) and `triton/`."""
