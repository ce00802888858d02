"""Softmax attention by tokamax's kernels for Hopper GPUs and TPUs: the plain case, in bfloat16.

tokamax (https://github.com/openxla/tokamax) is a package of its own, which is imported where it is
asked for. What is refused is what its version 0.0.17 computes in another way than this library, or
what its kernels stop at while they compile:

    bias     is added before the softcap, not after it; on TPU there is none
    masks    others than a causal one are whole matrices of booleans, or computed with every score
    lse      isn't returned
    dtypes   float32 is refused on GPU, float16 on TPU; on GPU a softcap overflows float16
    lengths  on TPU they must be multiples of a tile; its tests on GPU leave others out
    widths   the shared memory of an H100 has room for heads of 256
    memory   gradients on TPU hold dq in float32 for each tile of keys
"""

import jax
from jax.extend import backend

from attnjax.core import masks
from attnjax.ops import plain_case
from pallas_kernels import hopper

_DTYPES = ("bfloat16",)
_TILE = 128
_WIDEST = 256  # features of a head
_MOST = 2**30  # bytes that gradients on TPU may hold for dq


def tokamax_attention(
    q, k, v, t, s, *, platform, mask, bias, scale, softcap, sinks, dropout, score_mod
):
    """(output, None) as `ops.dot_product_attention` defines it, without lse; no forward-mode.

    t (T) and s (S) are the positions of queries and keys; platform is "cuda" or "tpu". Raises
    NotImplementedError for what is not honoured: another option than a softcap and a causal mask,
    positions that don't count up from 0, other dtypes than bfloat16, other lengths than multiples
    of 128, heads of more than 256, other devices than Hopper GPUs and TPUs of generation 5 or
    later, and within a shard_map that checks what varies; for gradients on TPU that would hold more
    than 1 GiB, which forward passes can't be told from; and where there is no tokamax.
    """
    options = dict(bias=bias, sinks=sinks, dropout=dropout, score_mod=score_mod)
    plain_case.check(t, s, mask, by="tokamax", **options)
    _check_arrays(q, k, v, platform)
    _check_device(platform)
    try:
        import tokamax
    except ImportError as error:
        raise NotImplementedError(f"tokamax can't be had: {error}") from None
    usual = scale == q.shape[-1] ** -0.5
    options = dict(
        scale=None if usual else float(scale),  # its own differs in the last bit, and is tuned for
        logits_soft_cap=softcap,
        is_causal=bool(masks.parts(mask)),
        precision=jax.lax.Precision.DEFAULT,  # all there is for bfloat16
    )
    return tokamax.dot_product_attention(q, k, v, implementation="mosaic", **options), None


def _check_arrays(q, k, v, platform):
    T, S = q.shape[1], k.shape[1]
    if T % _TILE or S % _TILE:
        raise NotImplementedError(
            f"tokamax's kernels take multiples of {_TILE}, not {T} queries and {S} keys"
        )
    names = sorted({x.dtype.name for x in (q, k, v)})
    if len(names) > 1 or names[0] not in _DTYPES:
        raise NotImplementedError(
            f"tokamax's kernels are used for {_DTYPES[0]}, not for {', '.join(names)}"
        )
    widest = max(q.shape[-1], v.shape[-1])
    if widest > _WIDEST:
        raise NotImplementedError(f"tokamax's kernels have heads of {_WIDEST}, not of {widest}")
    held = 4 * q.size * (k.shape[1] // _TILE)
    if platform == "tpu" and held > _MOST:
        raise NotImplementedError(
            f"tokamax's gradients on TPU hold {held / 2**30:.3g} GiB; 1 GiB is what they may"
        )
    if any(jax.typeof(x).mat.varying for x in (q, k, v)):
        raise NotImplementedError("tokamax can't be in a shard_map that checks what varies")


def _check_device(platform):
    """tokamax takes the kernel for the default device, whatever it is lowered for."""
    device = backend.get_default_device()
    if device.platform != {"cuda": "gpu"}.get(platform, platform):
        raise NotImplementedError(
            f"tokamax goes by the default device, which is {device.device_kind}, not {platform}"
        )
    if platform == "cuda":
        hopper.check_device()
