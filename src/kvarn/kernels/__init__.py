"""The compute kernels: declared in `ops`, readable in `reference`, fast on CPUs through `native` and `cpu/`."""
