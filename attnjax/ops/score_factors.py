"""A score_mod as a kernel can run it.

A kernel can do arithmetic with scores and positions, and can't look anything up by position. So
what a score_mod computes is cut in two: all that needs neither score nor position is a number for
each batch entry and head (a factor, computed before by XLA, which also takes its gradient on to
what score_mod captured), and the rest is a function of tiles and of those factors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from attnjax.ops import blocked_arguments

_KNOWN, _BEFORE, _WITHIN = 0, 1, 2  # a literal; of captured arrays, b and n; of score and positions

# what the compiler of kernels has for tiles, and has derivatives of that it has too
# fmt: off
_ARITHMETIC = {
    "abs", "add", "and", "ceil", "clamp", "convert_element_type", "copy", "cos", "div",
    "eq", "exp", "exp2", "floor", "ge", "gt", "integer_pow", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "pvary", "rem",
    "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh",
    "xor",
}
# fmt: on


class Factored(NamedTuple):
    """`function(score, t, s, factors, numbers)` of tiles; all arguments have a tile's shape.

    factors are floating (B N 1 1) and have gradients, numbers are others.
    """

    function: Callable[..., jax.Array]
    factors: tuple[jax.Array, ...]
    numbers: tuple[jax.Array, ...]


class _Value(NamedTuple):
    kind: int
    x: Any = None


def factored(score_mod: Callable, B: int, N: int) -> Factored:
    """`score_mod(score, b, n, t, s)` of scalars, for B batch entries and N heads.

    Raises NotImplementedError for more than arithmetic of scores and positions.
    """
    opened, *arrays = blocked_arguments.open_closure(score_mod)
    scalars = [jax.ShapeDtypeStruct((), x) for x in (jnp.float32, *[jnp.int32] * 4)]
    closed = jax.make_jaxpr(opened)(*arrays, *scalars)
    places = []  # which factor is needed, each time that one is

    def before(b, n):
        found = []

        def bind(eqn, values):
            if max((x.kind for x in values), default=_KNOWN) < _WITHIN:
                return _apply(eqn, values)
            _check(eqn)
            _meet(values, found, places)
            return [_Value(_WITHIN)] * len(eqn.outvars)

        at = [_Value(_WITHIN), _Value(_BEFORE, b), _Value(_BEFORE, n), *[_Value(_WITHIN)] * 2]
        captured = [_Value(_BEFORE, x) for x in jax.tree.leaves(arrays)]
        _meet(_walk(closed, [*captured, *at], bind), found, places)
        return found

    grid = jax.vmap(jax.vmap(before, (None, 0)), (0, None))(jnp.arange(B), jnp.arange(N))
    learned = [jnp.issubdtype(x.dtype, jnp.floating) for x in grid]
    pick = lambda kind: tuple(
        x[:, :, None, None] for x, y in zip(grid, learned, strict=True) if y == kind
    )
    return Factored(_within(closed, places, learned), pick(True), pick(False))


def honoured(score_mod: Callable | None, B: int, N: int) -> bool:
    """Whether a kernel can run it."""
    try:
        jax.eval_shape(lambda: score_mod and factored(score_mod, B, N)[1:])
    except NotImplementedError:
        return False
    return True


def _within(closed, places, learned):
    """What is computed of scores and positions, as a function of tiles."""

    def scalar(score, t, s, factors, numbers):
        factors, numbers = iter(factors), iter(numbers)
        grid = [next(factors if x else numbers) for x in learned]
        needed = iter([grid[i] for i in places])

        def bind(eqn, values):
            kind = max((x.kind for x in values), default=_KNOWN)
            if kind == _BEFORE:
                return [_Value(_BEFORE)] * len(eqn.outvars)
            values = [next(needed) if x.kind == _BEFORE else x.x for x in values]
            if eqn.primitive.name == "pvary":  # a kernel knows of no mesh
                return [_Value(kind, x) for x in values]
            return [_Value(kind, x) for x in _listed(eqn, values)]

        at = [
            _Value(_WITHIN, score),
            *[_Value(_BEFORE)] * 2,
            _Value(_WITHIN, t),
            _Value(_WITHIN, s),
        ]
        captured = [_Value(_BEFORE)] * (len(closed.jaxpr.invars) - len(at))
        [out] = _walk(closed, [*captured, *at], bind)
        return jnp.float32(next(needed) if out.kind == _BEFORE else out.x)

    return jax.vmap(jax.vmap(scalar))


def _walk(closed, values, bind):
    """The results of a jaxpr, each equation by `bind(eqn, values)`, and all within calls of jit."""
    jaxpr, consts = closed.jaxpr, [_Value(_BEFORE, x) for x in closed.consts]
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(x):
        if isinstance(x, Literal):
            return _Value(_KNOWN, jnp.asarray(x.val, x.aval.dtype))
        return env[x]

    for eqn in jaxpr.eqns:
        values = [read(x) for x in eqn.invars]
        inner = eqn.primitive.name in ("jit", "pjit")
        found = _walk(eqn.params["jaxpr"], values, bind) if inner else bind(eqn, values)
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn, values):
    kind = max((x.kind for x in values), default=_KNOWN)
    values = [x.x for x in values]
    values = blocked_arguments.varying(values, like=values)
    return [_Value(kind, x) for x in blocked_arguments.apply(eqn, values)]


def _meet(values, found, places):
    """Notes what is needed within of what is computed before, once."""
    for value in values:
        if value.kind != _BEFORE:
            continue
        if jnp.ndim(value.x):
            raise NotImplementedError(_refusal(f"an array of shape {jnp.shape(value.x)}"))
        at = [i for i, x in enumerate(found) if x is value.x]
        if not at:
            found.append(value.x)
        places.append(at[0] if at else len(found) - 1)


def _check(eqn):
    if eqn.primitive.name not in _ARITHMETIC:
        raise NotImplementedError(_refusal(eqn.primitive.name))


def _refusal(what):
    return (
        "the kernel can't honour a score_mod that needs more than arithmetic of scores and "
        f"positions ({what}): implementation='blocked' can, and a bias or attnjax.core.masks do "
        "what looks up by position"
    )


def _listed(eqn, values):
    out = eqn.primitive.bind(*values, **eqn.params)
    return out if eqn.primitive.multiple_results else [out]
