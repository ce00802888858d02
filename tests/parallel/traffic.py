"""What devices send each other, read off a jaxpr."""

import math

import jax


def sent(run, arrays) -> int:
    """Entries of all messages between two devices, loops counted as often as they run."""
    return _sent(jax.make_jaxpr(lambda arrays: run(**arrays))(arrays).jaxpr)


def _sent(jaxpr):
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn):
    if eqn.primitive.name == "ppermute":
        between = sum(a != b for a, b in eqn.params["perm"])
        return between * sum(math.prod(x.aval.shape) for x in eqn.invars)
    is_jaxpr = lambda x: hasattr(x, "eqns")
    inner = filter(is_jaxpr, jax.tree.leaves(eqn.params, is_leaf=is_jaxpr))
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return times * sum(map(_sent, inner))
