"""Which operations a kernel for Hopper has for tiles, and what stands for those that it lacks.

Mosaic doesn't tell which it lowers, so it is tried: a kernel of one operation is lowered, which
needs no GPU, and never compiled.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal

from pallas_kernels.flash_attention.mosaic_gpu import elementary

_TILE = 64, 64
# what Mosaic lowers not at all, for some dtypes only, or to instructions that are too coarse
_INSTEAD = {
    "add_any": lax.add,
    "broadcast_in_dim": lambda x: x,  # of a number, which is one until it meets a tile
    "ceil": elementary.ceil,
    "convert_element_type": elementary.convert,
    "copy": lambda x: x,
    "cos": elementary.cos,
    "floor": elementary.floor,
    "integer_pow": elementary.integer_pow,
    "log1p": elementary.log1p,
    "not": elementary.invert,
    "pow": elementary.power,
    "sin": elementary.sin,
    "stop_gradient": lambda x: x,
    "tanh": elementary.tanh,
}


def rewritten(function: Callable) -> Callable:
    """`function` of tiles, by what stands for operations that Mosaic lacks; others stay."""

    def run(*args):
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        like, tree = jax.tree.flatten(out)
        return tree.unflatten(
            jnp.broadcast_to(x, y.shape) for x, y in zip(found, like, strict=True)
        )

    return run


def check(function: Callable, *dtypes) -> None:
    """Raises NotImplementedError where `rewritten(function)` of trees of tiles can't be lowered."""
    tiles = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(_TILE, dtype), dtypes)
    for eqn in jax.make_jaxpr(rewritten(function))(*tiles).eqns:
        args = tuple((x.aval.shape, x.aval.dtype) for x in eqn.invars)
        if not _lowers(eqn.primitive, tuple(eqn.params.items()), args):
            names = ", ".join(sorted({str(dtype) for _, dtype in args}))
            raise NotImplementedError(
                f"the kernel for Hopper can't honour a score_mod with {eqn.primitive.name} of "
                f"{names}, but what Mosaic lowers: arithmetic, comparisons, jnp.where and most "
                "functions of float32, and arithmetic of int32"
            )


@functools.cache
def _lowers(primitive, params, args) -> bool:
    """Whether Mosaic lowers a primitive for arguments (shape, dtype), tiles or scalars."""

    def kernel(*refs):
        *tiles, out = refs
        tiles = map(_read, tiles, [dtype for shape, dtype in args if shape])
        values = [next(tiles) if shape else jnp.ones((), dtype) for shape, dtype in args]
        found = primitive.bind(*values, **dict(params))
        out[...] = jnp.broadcast_to(found, _TILE).astype(out.dtype)

    held = lambda dtype: jnp.int32 if dtype == jnp.bool_ else dtype
    tiles = [jax.ShapeDtypeStruct(_TILE, held(dtype)) for shape, dtype in args if shape]
    out = jax.ShapeDtypeStruct(_TILE, jnp.float32)
    options = plgpu.CompilerParams(approx_math=True)
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            run = jax.jit(plgpu.kernel(kernel, out_type=out, compiler_params=options))
            run.trace(*tiles).lower(lowering_platforms=("cuda",))
    except Exception:  # Mosaic raises errors of many kinds
        return False
    return True


def _read(reference, dtype):
    x = plgpu.load(reference, layout=plgpu.Layout.WGMMA, optimized=False)
    return x != 0 if dtype == jnp.bool_ else x


def _evaluate(jaxpr, consts, *args):
    """The results of a jaxpr of tiles, by what stands for its operations; numbers stay numbers."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda x: jnp.asarray(x.val, x.aval.dtype) if isinstance(x, Literal) else env[x]
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _apply(eqn, [read(x) for x in eqn.invars]), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn, values):
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, *values)
    values = jnp.broadcast_arrays(*values)
    if name not in _INSTEAD:
        out = eqn.primitive.bind(*values, **params)
        return out if eqn.primitive.multiple_results else [out]
    wanted = {x: params[x] for x in ("new_dtype", "y") if x in params}
    return [_INSTEAD[name](*values, **wanted)]
