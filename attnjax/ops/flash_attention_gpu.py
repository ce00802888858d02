"""Softmax attention by Pallas kernels for Hopper GPUs."""

from attnjax.ops import flash_arguments, flash_attention
from pallas_kernels.flash_attention import mosaic_gpu

_INSTEAD = "implementation='blocked' can"


def flash_attention_gpu(q, k, v, t, s, *, interpret=False, **options):
    """(output, lse) as `ops.dot_product_attention` defines them; no forward-mode derivative.

    t (T) and s (S) are the positions of queries and keys; options are those of `flash_arguments`,
    and interpret is as the kernel's. Raises NotImplementedError for a score_mod that looks up by
    position, and for what the kernel itself can't honour.
    """
    blocks = mosaic_gpu.TILE, mosaic_gpu.TILE
    states = flash_attention.states_of(options["mask"], t, s, blocks)
    args, options = flash_arguments.arguments(q, k, v, t, s, states, blocks, **options)
    try:
        return mosaic_gpu.flash_attention(*args, interpret=interpret, **options)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}; {_INSTEAD}") from None
