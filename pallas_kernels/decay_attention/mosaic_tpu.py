"""A Pallas kernel for TPU: the grid walks (sequence, head, chunk), the state stays in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decay_attention import chunk as chunks

_TILE = 16  # rows of the smallest tile that any 16- or 32-bit dtype needs


def decay_attention(q, k, v, state, starts, log_decay, *, chunk, interpret=False):
    """(o, final state); the state given is decayed for the first token."""
    B, T, N, _ = q.shape
    C = min(chunk, -(-T // _TILE) * _TILE)
    # heads before time: a tile's last two axes are then (time, features)
    q, k, v = (chunks.pad(x.swapaxes(1, 2), C) for x in (q, k, v))
    per_token = lambda x: pl.BlockSpec((None, None, C, x.shape[-1]), lambda b, n, i: (b, n, i, 0))
    whole = pl.BlockSpec((None, None, *state.shape[2:]), lambda b, n, i: (b, n, 0, 0))
    inputs = [log_decay, q, k, v, state]
    in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), *map(per_token, (q, k, v)), whole]
    if starts is not None:
        inputs.append(chunks.pad(starts[..., None], C, mode="edge"))
        in_specs.append(pl.BlockSpec((None, C, 1), lambda b, n, i: (b, i, 0)))
    o, state = pl.pallas_call(
        functools.partial(_kernel, T=T),
        grid=(B, N, v.shape[2] // C),
        in_specs=in_specs,
        out_specs=[per_token(v), whole],
        out_shape=[_like(v), _like(state)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q, v, C),
        interpret=interpret,
        name="decay_attention",
    )(*inputs)
    return o[:, :, :T].swapaxes(1, 2), state


def _kernel(log_decay_ref, q_ref, k_ref, v_ref, initial_ref, *refs, T):
    *starts_ref, o_ref, state_ref = refs
    n, i = pl.program_id(1), pl.program_id(2)
    C = q_ref.shape[0]

    @pl.when(i == 0)
    def _():
        state_ref[...] = initial_ref[...]

    start = starts_ref[0][...] - i * C if starts_ref else jnp.full((C, 1), -1)
    at = dict(age=jnp.minimum(i, 1), count=jnp.minimum(T - i * C, C))
    qkv = q_ref[...], k_ref[...], v_ref[...]
    state, o = chunks.attend(state_ref[...], *qkv, start, log_decay_ref[n], **at)
    state_ref[...] = state  # its block is the same for every i, so it stays until the last
    o_ref[...] = o.astype(o_ref.dtype)


def _like(x):
    """x as an output, which varies over the axes of a mesh that x varies over."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)


def _cost(q, v, C):
    """What XLA can't see inside the kernel."""
    tokens, H, V = q.size // q.shape[-1], q.shape[-1], v.shape[-1]
    return pl.CostEstimate(
        flops=2 * tokens * (C * (H + V) + 2 * H * V),
        transcendentals=tokens * C,
        bytes_accessed=2 * (q.nbytes + v.nbytes),
    )
