"""What an initialisation gives, by programs that all models share and random numbers by numpy."""

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval


def initial(init, *args):
    """`init(*args)`, one operation after another, without those that the result doesn't need.

    `jax.jit(init)` would compile all of a model anew: half of what it takes to compile a small
    one. And JAX would compile each draw for its shape, which takes longer than most operations.
    """
    closed, out = jax.make_jaxpr(init, return_shape=True)(*args)
    every = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, every, instantiate=True)
    results = _run(jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(out), results)


def _run(jaxpr, consts, args):
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    value = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
    for eqn in jaxpr.eqns:
        given = list(map(value, eqn.invars))
        if draw := _DRAWS.get(eqn.params.get("name")):
            made = [_drawn(draw, eqn.outvars[0].aval, *given)]
        elif eqn.primitive.name == "jit" and _draws(eqn.params["jaxpr"].jaxpr):
            made = _run(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, given)
        else:
            made = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
            made = made if eqn.primitive.multiple_results else [made]
        known.update(zip(eqn.outvars, made, strict=True))
    return list(map(value, jaxpr.outvars))


def _draws(jaxpr):
    return any(eqn.params.get("name") in _DRAWS for eqn in jaxpr.eqns)


def _drawn(draw, aval, key, *bounds):
    numbers = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    drawn = draw(numbers, aval.shape, *(np.asarray(x, np.float64) for x in bounds))
    return jax.numpy.asarray(drawn.astype(aval.dtype))


def _truncated_normal(numbers, shape, low, high):
    drawn = numbers.normal(size=shape)
    while (outside := (drawn < low) | (drawn > high)).any():
        drawn[outside] = numbers.normal(size=outside.sum())
    return drawn


# What jax.random.normal and others trace to.
_DRAWS = {
    "_normal": lambda numbers, shape: numbers.normal(size=shape),
    "_uniform": lambda numbers, shape, low, high: numbers.uniform(low, high, shape),
    "_truncated_normal": _truncated_normal,
}
