"""Pallas kernels for Hopper GPUs: the state goes from chunk to chunk without leaving the chip.

What a chunk does to a state is linear in it, whatever the gate. `pieces` are its matrices, which
XLA computes of all chunks at once by the maths of `chunk`, the delta rule's triangular system
included. `chain` are the kernels, one forward and one backward, that carry the state and make the
products with it; `call` launches them. Given the states and their cotangents, the gradients of the
pieces are products of each chunk by itself: XLA makes those too.

A warpgroup walks over all chunks of 64 of a head's value features, and puts out what belongs to
each on its way. In two passes (states first, then the outputs of all chunks side by side) fewer
sequences and heads would do to keep a chip busy, but states would be written and read, each as
large as two of a chunk's other matrices. Of the gradient the second pass is made, as there states
have to be kept anyway. Source of what is done in kernels and what before them: Yang et al.,
"Parallelizing Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3.

Unlike there: no decay is divided by, so that a large one costs no digits of a small one.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.linear_recurrence import chunk as chunks
from pallas_kernels.linear_recurrence.mosaic_gpu import chain
from pallas_kernels.linear_recurrence.mosaic_gpu import pieces as parts

CHUNK = 64
WIDEST = {"bfloat16": 128, "float16": 128, "float32": 64}  # keys of which two chunks fit
_FEATURES = 64  # that wgmma's matrices are laid out by


def forward(tokens, state, starts, *, chunk, keep=True, interpret=False):
    """(o, final state, and with `keep` the states before each chunk).

    Any length and any V. Products are of bfloat16, float16 or, for float32, of TF32; sums are in
    float32. interpret=`plgpu.InterpretGPUParams()` runs on a CPU, slowly.

    Raises NotImplementedError for chunks of other than 64 tokens, keys wider than 128 (in float32
    64), other dtypes, and for float32 where jax_default_matmul_precision asks for more than TF32.
    """
    dtype, (B, N, H, V) = _dtype(tokens, chunk, interpret), state.shape

    def lay(tokens, start):
        x = parts.pieces(*tokens, start)
        return _laid(x._replace(k=x.k.T, v=x.v.T), x.k.shape[1], dtype)

    x = parts.each(lay, *_cut(tokens, starts))
    last, o, *states = chain.forward(x, _rows(state), keep=keep, interpret=interpret)
    states = (_crop(x, H, V).reshape(B, N, -1, H, V) for x in states)
    return _join(o.mT, tokens[2]), _crop(last, H, V).reshape(state.shape), *states


def backward(tokens, starts, states, do, dstate, *, chunk, interpret=False):
    """Gradients of (tokens, initial state) by those of the output and the final state."""
    dtype, shape = _dtype(tokens, chunk, interpret), dstate.shape
    cut, start = _cut(tokens, starts)
    do = _flat(_wide(do).astype(dtype))

    def lay(tokens, start, do):
        x = parts.pieces(*tokens, start)
        read = None if x.read is None else x.read.T
        x = x._replace(q=x.q.T, v=do.T, read=read, weights=x.weights.T)
        return _laid(x, x.k.shape[1], dtype)

    def gradients(tokens, start, state, after, du, do):
        return parts.gradients(tokens, start, state.T, after.T, du.T, do)

    x = parts.each(lay, cut, start, do)
    dstate, du, after = chain.backward(x, _rows(dstate), interpret=interpret)
    found = parts.each(gradients, cut, start, _rows(states), after, du, do)
    return jax.tree.map(_join, found, tokens), _crop(dstate, *shape[2:]).reshape(shape)


def _dtype(tokens, chunk, interpret):
    """Of products."""
    q, k, v, *_ = tokens
    if chunk != CHUNK:
        raise NotImplementedError(f"the kernel for Hopper has chunks of {CHUNK}, not {chunk}")
    hopper.check_device(interpret)
    dtype = hopper.check_dtype(jnp.result_type(q, k, v))
    if (H := k.shape[-1]) > WIDEST[dtype]:
        raise NotImplementedError(
            f"the kernel for Hopper has keys of {WIDEST[dtype]} in {dtype}, not {H}"
        )
    return dtype


def _cut(tokens, starts):
    """Tokens and starts of each chunk (chunks C ...), with features filled up."""
    q, k, v, log_decay, beta = tokens
    B, T, N, _ = q.shape
    if log_decay is not None and log_decay.shape[-1] > 1:
        log_decay = _wide(log_decay)
    tokens = *map(_wide, (q, k, v)), log_decay, beta
    if starts is None:
        starts = jnp.zeros_like(q, jnp.int32, (B, T)) - 1  # varies on a mesh as q does
    starts = chunks.cut_starts(starts, CHUNK)
    starts = jnp.broadcast_to(starts, (B, N, *starts.shape[2:]))
    return jax.tree.map(_flat, tokens), starts.reshape(-1, CHUNK, 1)


def _flat(x):
    """(B T N F) -> (chunks C F)"""
    return chunks.cut(x, CHUNK).reshape(-1, CHUNK, x.shape[-1])


def _wide(x):
    """Features filled up with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _FEATURES)])


def _join(x, like):
    """(chunks C F) -> (B T N F), of the shape and dtype of like."""
    B, T, N, F = like.shape
    x = chunks.join(x.reshape(B, N, -1, CHUNK, x.shape[2]), T)
    return x[..., :F].astype(like.dtype)


def _rows(states):
    """(... H V) -> (states V H) in float32, filled up."""
    states = _wide(_wide(states.astype(jnp.float32)).mT)
    return states.reshape(-1, *states.shape[-2:])


def _crop(states, H, V):
    """(states V H), filled up -> (states H V)"""
    return states.mT[:, :H, :V]


def _laid(x: parts.Pieces, H, dtype):
    """As the kernels take them."""
    kept = jnp.broadcast_to(x.kept[:, 0], (H,))
    return jax.tree.map(lambda x: x.astype(dtype), x)._replace(kept=kept)
