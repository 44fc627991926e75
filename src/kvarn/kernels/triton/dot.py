"""One matrix product for all kernels: on a GPU `tl.dot`, in Triton's interpreter the same in float32.

The interpreter keeps bfloat16 as 16-bit integers and would multiply those. Products of two bfloat16 are exact in
float32, so both ways sum the same terms.
"""

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32; PRECISION "ieee" or "tf32" says how float32 operands are multiplied."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)
