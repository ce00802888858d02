r"""The selective scan of Mamba (S6): each channel has a small state of its own, with chosen steps.

    h_t = exp(delta_t rate) h_{t-1} + delta_t x_t b_t        h_{-1} = initial_state, the last h
    y_t = h_t . c_t + skip x_t                               is returned

h is (H M) for each head: M entries for each of H channels. delta, one step size for each channel
and token, says how much of the state goes and how much of the token comes; b and c, shared by the
channels of a head, say where in the state it is written and read.

Time is walked in chunks that carry h, of which one at a time is spread over its M entries, also in
the backward pass: `xla`, `mosaic_tpu` and `mosaic_gpu` (Hopper) keep the states between chunks.
Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv:2312.00752, algorithm 2 and section 3.3.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import placing, tables
from pallas_kernels.selective_scan import mosaic_gpu, mosaic_tpu, xla

Implementation = Literal["xla", "pallas", "interpret"]
_NAME, _CHUNK = "selective_scan", 64


def selective_scan(
    x: Float[Array, "B T N H"],
    delta: Float[Array, "B T N H"],
    rate: Float[Array, "N H M"],
    b: Float[Array, "B T N M"],
    c: Float[Array, "B T N M"],
    skip: Float[Array, "N H"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H M"] | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """(y in x's dtype, final state in float32); accumulates in float32.

    Args:
      delta: finite and >= 0; a step of 0 changes nothing.
      rate: finite and <= 0.
      segments: numbers of the documents packed into a sequence, each of them one run of tokens.
        The initial state belongs to the first, the final state to the last.
      initial_state: the state after earlier tokens; None is zero.
      chunk: tokens taken at once, a multiple of 16; None is what the table of the device says
        (`pallas_kernels.tables`), or 64.
      implementation: "xla", "pallas", a kernel for TPU or Hopper GPUs, or "interpret", which runs
        the one for TPU on any platform, slowly. None is the kernel where the call is lowered for
        TPU, runs whole on each device (`placing`) and `mosaic_tpu.fits`, and XLA elsewhere. Only
        "xla" has forward-mode derivatives (jax.jvp) and derivatives of the gradient.

    All arrays but segments have gradients. Raises ValueError for arguments that don't fit each
    other, NotImplementedError for states that are too large for the kernel for TPU, where that is
    asked for and lowered.
    """
    if chunk is None:
        chunk = tables.here().tile("chunk", _CHUNK, _NAME, **tables.case_of(x))
    _check(x, delta, rate, b, c, skip, segments, initial_state, chunk, implementation)
    B, T, N, H = x.shape
    # zeros vary over the axes of a mesh that x varies over, and so does what is added to them
    zeros = lambda dtype, *shape: jnp.zeros_like(x, dtype, shape)
    state, new = zeros(jnp.float32, B, N, H, b.shape[-1]), None
    if initial_state is not None:
        state = state + initial_state
    if segments is not None:
        new = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        new = new | zeros(bool, B, T)
    weights = tuple(w + zeros(w.dtype, *w.shape) for w in (rate, skip))
    tokens = x, delta, b, c
    if implementation == "xla":
        return xla.forward(tokens, weights, state, new, chunk=chunk, keep=False)
    return _op(tokens, weights, state, new, chunk, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _op(tokens, weights, state, new, chunk, implementation):
    args = tokens, weights, state, new
    return _run("forward", args, implementation, chunk=chunk, keep=False)


def _forward(tokens, weights, state, new, chunk, implementation):
    args = tokens, weights, state, new
    y, last, states = _run("forward", args, implementation, chunk=chunk, keep=True)
    return (y, last), (tokens, weights, new, states)


def _backward(chunk, implementation, residuals, cotangents):
    return *_run("backward", (*residuals, *cotangents), implementation, chunk=chunk), None


_op.defvjp(_forward, _backward)


def _run(name, args, implementation, **options):
    forms = (
        functools.partial(getattr(form, name), **options) for form in (xla, mosaic_tpu, mosaic_gpu)
    )
    (x, _, b, _), *_ = args
    fits = mosaic_tpu.fits(b.shape[-1], options["chunk"])
    by = dict(zip(("xla", "tpu", "gpu"), forms, strict=True))
    row = tables.here().find(_NAME, **tables.case_of(x))
    return placing.run(args, implementation, **by, fits=fits, row=row)


def _check(x, delta, rate, b, c, skip, segments, initial_state, chunk, implementation):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    if chunk < 16 or chunk % 16:
        raise ValueError(f"{chunk=} must be a positive multiple of 16")
    (B, T, N, H), M = x.shape, b.shape[-1]
    if T == 0:
        raise ValueError(f"x of shape {x.shape} must have at least one token")
    for name, array, shape in (
        ("delta", delta, (B, T, N, H)),
        ("rate", rate, (N, H, M)),
        ("b", b, (B, T, N, M)),
        ("c", c, (B, T, N, M)),
        ("skip", skip, (N, H)),
        ("segments", segments, (B, T)),
        ("initial_state", initial_state, (B, N, H, M)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} of shape {array.shape} must have shape {shape}")
