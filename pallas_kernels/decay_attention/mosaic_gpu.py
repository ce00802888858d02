"""On Hopper GPUs, the kernel of `linear_recurrence` with one decay for all tokens of a head."""

import jax.numpy as jnp

from pallas_kernels.linear_recurrence import mosaic_gpu


def decay_attention(q, k, v, state, starts, log_decay, *, chunk, interpret=False):
    """(o, final state); the state given is decayed for the first token.

    Raises NotImplementedError for a chunk that isn't a multiple of the kernel's 64, and as
    `linear_recurrence.mosaic_gpu.forward` does.
    """
    if chunk % mosaic_gpu.CHUNK:
        raise NotImplementedError(
            f"the kernel for Hopper takes tokens by {mosaic_gpu.CHUNK}, not by {chunk}"
        )
    later = jnp.arange(q.shape[1]) > 0  # than the token that the state is decayed for
    decay = jnp.where(later[None, :, None, None], log_decay[None, None, :, None], 0.0)
    decay = jnp.broadcast_to(decay, (*q.shape[:3], 1))
    options = dict(chunk=mosaic_gpu.CHUNK, keep=False, interpret=interpret)
    return mosaic_gpu.forward((q, k, v, decay, None), state, starts, **options)
