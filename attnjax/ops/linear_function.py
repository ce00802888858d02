"""Linear functions that are told their transpose: each mode of autodiff by a program of its own.

What jax.custom_vjp makes has no forward mode, jax.custom_jvp transposes what the tangents are
computed by, operation by operation, and jax.custom_derivatives.linear_call can't be mapped.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_linear_p = core.Primitive("linear_function")
_linear_p.multiple_results = True


def call(function: Callable, transpose: Callable, residuals, linear, *, like):
    """`function(residuals, linear)`, linear in `linear` and of the types of the arrays in `like`.

    All arguments and results are trees. `transpose(residuals, cotangents)` is of the types of
    `linear`; it has derivatives if it is differentiable itself. Those of the function by residuals
    are of forward mode only: NotImplementedError where reverse mode needs them.
    """
    (known, of_known), (moved, of_moved) = map(jax.tree.flatten, (residuals, linear))
    shapes, of_out = jax.tree.flatten(like)

    def forward(known, moved):
        return jax.tree.leaves(function(of_known.unflatten(known), of_moved.unflatten(moved)))

    def backward(known, cotangents):
        return jax.tree.leaves(transpose(of_known.unflatten(known), of_out.unflatten(cotangents)))

    out = tuple(map(jax.typeof, shapes))
    options = dict(function=forward, transpose=backward, count=len(known), out=out)
    return of_out.unflatten(_linear_p.bind(*known, *moved, **options))


def with_tangents(fast: Callable, smooth: Callable) -> Callable:
    """`fast`, with the derivatives of `smooth`, the same function of the same trees of arrays.

    They are of forward mode only: NotImplementedError where reverse mode needs them.
    """

    @jax.custom_jvp
    def computed(*args):
        return fast(*args)

    @functools.partial(computed.defjvp, symbolic_zeros=True)
    def _(args, tangents):
        out = computed(*args)
        return out, _pushed(smooth, args, moving(tangents), like=out)

    return computed


def moving(tangents):
    """Tangents as a rule of jax.custom_jvp gets them, with None for zeros."""
    return jax.tree.map(lambda x: None if isinstance(x, SymbolicZero) else x, tangents)


def push(function: Callable, primals, tangents):
    """As jax.jvp, of tangents of which some are None: zeros that nothing is computed for."""
    leaves, tree = jax.tree.flatten(primals)
    tangents = tree.flatten_up_to(tangents)

    def of_moving(*moving):
        moving = iter(moving)
        values = [x if dx is None else next(moving) for x, dx in zip(leaves, tangents, strict=True)]
        return function(*tree.unflatten(values))

    pairs = [(x, dx) for x, dx in zip(leaves, tangents, strict=True) if dx is not None]
    return jax.jvp(of_moving, *map(tuple, zip(*pairs, strict=True)) if pairs else ((), ()))


def _pushed(function, primals, tangents, *, like):
    """The tangents of `function(*primals)`, as a linear function that has no transpose."""
    tangent = lambda primals, tangents: push(function, primals, tangents)[1]
    return call(tangent, _refuse, primals, tangents, like=like)


def _refuse(residuals, cotangents):
    raise NotImplementedError(
        "derivatives of derivatives are of forward mode here, as jax.jvp(jax.grad(f)) takes them; "
        "reverse mode needs implementation='dense'"
    )


def _run(*args, function, transpose, count, out):
    return function(list(args[:count]), list(args[count:]))


def _jvp(primals, tangents, **options):
    count, run = options["count"], functools.partial(_run, **options)
    out = _linear_p.bind(*primals, **options)
    known, moved = tangents[:count], tangents[count:]
    parts = []
    if any(not isinstance(x, ad.Zero) for x in moved):
        moved = map(ad.instantiate_zeros, moved)
        parts.append(_linear_p.bind(*primals[:count], *moved, **options))
    if any(not isinstance(x, ad.Zero) for x in known):
        known = [None if isinstance(x, ad.Zero) else x for x in known]
        still = [None] * (len(primals) - count)
        parts.append(_pushed(run, primals, (*known, *still), like=out))
    return out, [functools.reduce(ad.add_tangents, x) for x in zip(*parts, strict=True)]


def _transpose(cotangents, *args, function, transpose, count, out):
    found = transpose(list(args[:count]), list(map(ad.instantiate_zeros, cotangents)))
    wanted = map(ad.is_undefined_primal, args[count:])
    return [None] * count + [x if w else None for x, w in zip(found, wanted, strict=True)]


def _batch(args, axes, *, function, transpose, count, out):
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    moved = [
        lax.broadcast(x, (size,)) if axis is None else jax.numpy.moveaxis(x, axis, 0)
        for x, axis in zip(args[count:], axes[count:], strict=True)
    ]
    mapped = lambda f: jax.vmap(f, (list(axes[:count]), 0), axis_size=size)
    wider = jax.make_jaxpr(lambda *x: [lax.broadcast(y, (size,)) for y in x])(*out).out_avals
    options = dict(function=mapped(function), transpose=mapped(transpose), count=count)
    found = _linear_p.bind(*args[:count], *moved, out=tuple(wider), **options)
    return found, [0] * len(found)


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(lambda *args, out, **options: out)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
