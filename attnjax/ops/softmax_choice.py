"""Which implementation of softmax attention is taken: by name, by a table or by the platform."""

import functools
import math
from collections.abc import Callable

import jax

from attnjax.ops import (
    cudnn_attention,
    flash_attention,
    flash_attention_gpu,
    flash_mask,
    lowered_for,
    score_factors,
    tokamax_attention,
)
from attnjax.ops.blocked_attention import blocked_attention
from attnjax.ops.dense_attention import dense_attention
from attnjax.ops.forward_mode import with_forward_mode
from pallas_kernels import flash_attention as kernels
from pallas_kernels import placing, tables

_DENSE_UP_TO = 256 * 256  # scores of one head, of devices without a table


def by_name(implementation: str | None, *, return_lse: bool) -> Callable:
    """What attends, as `ops.dot_product_attention` says of a name: (q, k, v, t, s, **options).

    Returns (output, lse), of which lse may be None where it isn't wanted.
    """
    return {
        None: functools.partial(_by_table, return_lse=return_lse),
        "dense": dense_attention,
        "blocked": _blocked,
        "pallas": _by_kernel,
        "interpret": functools.partial(_kernel, interpret=True),
    }[implementation]


def _by_table(q, k, v, t, s, *, return_lse, **options):
    """What the table in force says; without one "dense" up to a size, and then `_by_platform`."""
    table, width = tables.here(), max(q.shape[-1], v.shape[-1])
    case = dict(dtype=q.dtype, head_dim=width, length=math.sqrt(len(t) * len(s)))
    row = table.find("dot_product_attention", **case)
    if row is None:
        small = len(t) * len(s) <= _DENSE_UP_TO
        return (dense_attention if small else _by_platform)(q, k, v, t, s, **options)
    on_device = functools.partial(_on, table.platform, return_lse=return_lse)
    match row.implementation, table.platform:
        case "dense", _:
            attend = dense_attention
        case "blocked", "tpu":
            attend = _blocked
        case ("blocked", _) | ("pallas", "tpu"):
            attend = _by_platform
        case "pallas", "cuda":
            attend = functools.partial(on_device, _kernel_gpu)
        case "cudnn", "cuda":
            attend = _by_platform if return_lse else functools.partial(on_device, _cudnn)
        case "tokamax", "cuda" | "tpu":
            kernel = functools.partial(_tokamax, platform=table.platform)
            attend = _by_platform if return_lse else functools.partial(on_device, kernel)
        case _:
            raise ValueError(f"{row} must name an implementation that there is on {table.kind}")
    return attend(q, k, v, t, s, **options)


def _on(platform, kernel, q, k, v, t, s, *, return_lse, **options):
    """`kernel` where it is lowered for the platform and honours the options, or `_by_platform`."""
    args = q, k, v, t, s
    try:
        fits = placing.whole() and jax.eval_shape(lambda: kernel(*args, **options))
    except NotImplementedError:
        fits = False
    if not fits:
        return _by_platform(*args, **options)
    wanted = lambda out: out if return_lse else (out[0], None)
    return jax.lax.platform_dependent(
        default=lambda: wanted(_by_platform(*args, **options)),
        **{platform: lambda: wanted(kernel(*args, **options))},
    )


def _blocked(*args, **options):
    return with_forward_mode(blocked_attention)(*args, **options)


def _kernel(*args, plan=None, interpret=False, **options):
    kernel = functools.partial(flash_attention.flash_attention, plan=plan, interpret=interpret)
    return with_forward_mode(kernel)(*args, **options)


def _kernel_gpu(*args, **options):
    return with_forward_mode(flash_attention_gpu.flash_attention_gpu)(*args, **options)


def _cudnn(*args, **options):
    return with_forward_mode(cudnn_attention.cudnn_attention)(*args, **options)


def _tokamax(*args, platform, **options):
    kernel = functools.partial(tokamax_attention.tokamax_attention, platform=platform)
    return with_forward_mode(kernel)(*args, **options)


def _by_platform(q, k, v, t, s, **options):
    """The kernel where it is lowered for TPU and can be had; blocked elsewhere."""
    small = min(len(t), len(s)) < kernels.LANES
    modified = score_factors.honoured(options["score_mod"], q.shape[0], q.shape[2])
    if small or not modified or not placing.whole():
        return _blocked(q, k, v, t, s, **options)
    plan = flash_attention.plan_of(
        q, k, v, t, s, *(options[name] for name in ("mask", "bias", "score_mod"))
    )
    if not kernels.fits(plan.states.shape) or flash_mask.grows(options["mask"], t, s, plan.sizes):
        return _blocked(q, k, v, t, s, **options)
    return jax.lax.platform_dependent(
        tpu=lambda: _kernel(q, k, v, t, s, plan=plan, **options),
        default=lambda: _blocked(q, k, v, t, s, **options),
    )


def _by_kernel(q, k, v, t, s, **options):
    """The kernel for what it is lowered for."""
    dropout = options["dropout"]
    learned = q, k, v, options["bias"], options["sinks"]
    given = t, s, options["mask"], dropout and dropout.seed, options.get("whole")
    kernels = dict(
        tpu=lambda: _kernel(q, k, v, t, s, **options),
        cuda=lambda: _kernel_gpu(q, k, v, t, s, **options),
    )
    lse = jax.ShapeDtypeStruct(q.shape[:3], "float32")
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype), lse
    otherwise = "there is a kernel for TPU and for Hopper GPUs; implementation='interpret' runs "
    otherwise += "the first on any platform, and 'blocked' needs none"
    return lowered_for.one_of(kernels, learned, given, out, otherwise=otherwise)
