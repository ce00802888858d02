"""Read or rewrite queries, keys, logits and weights of any model, without touching a mechanism.

Every module calls its pure function in one place, a `layers.Attend` with a path such as
"block_1/mixer/attend". The transforms here take an `apply` and give a new one in which the calls
at chosen paths are changed:

    quiet = edit.rewrite(model.apply, weights=lambda w: w.at[..., 0].set(0), where="block_1/*")
    y, maps = edit.read(model.apply)(params, x)          # maps: {path: (B N T S)}

The attention matrix needs no code of a mechanism: attention is linear in its values, so the
output for values that are the identity is the matrix. This holds for softmax, linear, sparse and
local attention alike. Transform before jit: jit(edit.rewrite(model.apply, ...)).

Transforms compose, the innermost nearest to the mechanism: `read(rewrite(apply))` gives the maps as
rewritten.
"""

import fnmatch
import functools
import inspect
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers


def matrix(fn: Callable[..., jax.Array], q, k, v, *arrays, **options) -> Float[Array, "B N T S"]:
    """The weights with which `fn(q, k, v, ...)` adds up its values, in v's dtype.

    q is (B, *T, N, H), and v (B, *S, K, V) with any number of sequence axes, which are flattened
    in row order. For a `fn` that is not linear in v the result means nothing (claim DENSE_TWIN).
    """
    B, *S, K, _ = v.shape
    count = functools.reduce(lambda a, b: a * b, S)
    identity = jnp.eye(count, dtype=v.dtype).reshape(1, *S, 1, count)
    w = fn(q, k, jnp.broadcast_to(identity, (B, *S, K, count)), *arrays, **options)
    N = w.shape[-2]
    return w.reshape(B, -1, N, count).swapaxes(1, 2)


def rewrite(
    apply: Callable,
    *,
    logits: Callable[..., jax.Array] | None = None,
    weights: Callable[[jax.Array], jax.Array] | None = None,
    qk: Callable[[str, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    where: str = "*",
    heads: Sequence[int] | None = None,
) -> Callable:
    """`apply` with the attention at paths that match `where` (as file names do) rewritten.

    Args:
      qk: (path, q, k) -> (q, k), before anything else.
      logits: a score_mod (score, b, n, t, s) -> score.
      weights: (B N T S) -> (B N T S), by the matrix: O(T S) memory.
      heads: those of logits and weights that change; None is all.

    The new function raises ValueError where no path matches or a head doesn't exist, and
    NotImplementedError at a mechanism that has no logits (or no queries, keys and values).
    """

    def around(path, fn, attend, q, k, v, *arrays, **options):
        _check_heads(path, heads, q.shape[-2])
        if qk is not None:
            q, k = qk(path, q, k)
        if logits is not None:
            options["score_mod"] = _compose(path, fn, options, _only(logits, heads))
        if weights is None:
            return attend(q, k, v, *arrays, **options)
        w = matrix(attend, q, k, v, *arrays, **options)
        new = weights(w)
        if heads is not None:
            chosen = jnp.isin(jnp.arange(w.shape[1]), jnp.asarray(heads))
            new = jnp.where(chosen[None, :, None, None], new, w)
        return _add_up(new, q, v)

    return _wrap(apply, where, around)


def read(apply: Callable, *, where: str = "*", what: str = "weights") -> Callable:
    """`apply` that returns (its output, {path: what is read}).

    what: "weights" (B N T S), or "qk" for the pair of queries and keys.
    """
    if what not in ("weights", "qk"):
        raise ValueError(f"{what=} must be 'weights' or 'qk'")

    def reading(*args, **kwargs):
        found = {}

        def around(path, _, attend, q, k, v, *arrays, **options):
            found[path] = (q, k) if what == "qk" else matrix(attend, q, k, v, *arrays, **options)
            return attend(q, k, v, *arrays, **options)

        return _wrap(apply, where, around)(*args, **kwargs), found

    return reading


def _wrap(apply, where, around):
    """`apply` in which each Attend at a path that matches is replaced.

    `around(path, fn, attend, *arrays, **options)` is called instead: fn is the mechanism's function
    as it stands in the module, and `attend` calls it through the transforms that lie nearer to it.
    """
    if isinstance(apply, jax.stages.Wrapped):
        raise ValueError("apply is jitted already; jit what comes out: jit(rewrite(apply))")

    def wrapped(*args, **kwargs):
        seen, matched = [], []

        def interceptor(attend, arrays, options, context):
            if not isinstance(context.module, layers.Attend) or context.method_name != "__call__":
                return attend(*arrays, **options)
            path = "/".join(context.module.path)
            seen.append(path)
            if not fnmatch.fnmatchcase(path, where):
                return attend(*arrays, **options)
            matched.append(path)
            _check(path, arrays)
            return around(path, context.module.fn, attend, *arrays, **options)

        with nn.intercept_methods(interceptor):
            out = apply(*args, **kwargs)
        if not matched:
            raise ValueError(f"no attention matches {where=}; there is {', '.join(seen) or 'none'}")
        return out

    return wrapped


def _check(path, arrays):
    if "layers" in path.split("/"):
        raise NotImplementedError(f"{path} is in a scan over layers; build with scan=False")
    if len(arrays) < 3 or not all(getattr(x, "ndim", 0) >= 4 for x in arrays[:3]):
        raise NotImplementedError(f"{path} does not attend by queries, keys and values")


def _check_heads(path, heads, N):
    if heads is not None and not all(0 <= n < N for n in heads):
        raise ValueError(f"{heads=} must be among the {N} heads of {path}")


def _compose(path, fn, options, mod):
    while isinstance(fn, functools.partial):
        fn = fn.func
    if "score_mod" not in inspect.signature(fn).parameters:
        name = getattr(fn, "__name__", fn)
        raise NotImplementedError(f"{path}: {name} has no logits to rewrite; rewrite its weights")
    inner = options.get("score_mod")
    if inner is None:
        return mod
    return lambda score, b, n, t, s: mod(inner(score, b, n, t, s), b, n, t, s)


def _only(logits, heads):
    if heads is None:
        return logits
    chosen = jnp.asarray(heads)
    return lambda score, b, n, t, s: jnp.where(
        (n == chosen).any(), logits(score, b, n, t, s), score
    )


def _add_up(w, q, v):
    B, *_, K, V = v.shape
    w = w.reshape(B, K, -1, *w.shape[2:]).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKV->BTKGV", w, v.reshape(B, -1, K, V))
    return out.reshape(*q.shape[:-1], V)
