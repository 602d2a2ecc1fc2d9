"""The compiled loops of `kernels`: one call works on one stretch of the long vector, without Python's lock.

Values pass through tiles of `BLOCK` coordinates that stay in cache. No loop changes the order of a floating-point sum,
so the results are those of the torch path, bit for bit: only sums of exact products may be contracted to fused
multiply-adds, which rounds alike. Types are those that the compiler infers, so none are written at compiled functions.
"""

from fedproxy.aggregation.merge.compiled.combine import combine
from fedproxy.aggregation.merge.compiled.measure import measure
from fedproxy.aggregation.merge.compiled.select import bracket, sample

__all__ = ["bracket", "combine", "measure", "sample"]
