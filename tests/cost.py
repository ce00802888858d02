"""What a function costs, read off its jaxpr."""

import math

import jax

_MOVES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy"}


def largest_array(fn, *args) -> int:
    """Entries of the largest array that is computed."""
    return largest_array_in(jax.make_jaxpr(fn)(*args))


def operations(fn, *args) -> int:
    """Arithmetic operations, loops counted as often as they run."""
    return operations_in(jax.make_jaxpr(fn)(*args))


def largest_array_in(closed) -> int:
    """As `largest_array`, of what jax.make_jaxpr gave."""
    return max(_sizes(closed.jaxpr))


def operations_in(closed) -> int:
    """As `operations`, of what jax.make_jaxpr gave."""
    return _operations(closed.jaxpr)


def _inner(eqn):
    is_jaxpr = lambda x: hasattr(x, "eqns")
    return filter(is_jaxpr, jax.tree.leaves(eqn.params, is_leaf=is_jaxpr))


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in _inner(eqn):
            yield from _sizes(inner)


def _operations(jaxpr):
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn):
    kind = eqn.primitive.name
    inner = [_operations(jaxpr) for jaxpr in _inner(eqn)]
    if kind == "while":
        raise NotImplementedError("a loop whose length is not known has no cost")
    if kind == "scan":
        return eqn.params["length"] * sum(inner)
    if inner:
        return max(inner) if kind == "cond" else sum(inner)
    if kind in _MOVES:
        return 0
    size = sum(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
    if kind == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if kind == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return 2 * size * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return size
