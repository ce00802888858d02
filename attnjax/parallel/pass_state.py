r"""A recurrence over devices: each begins from the state that the tokens before its own have left.

    S_i' = f_i S_i + s_i        s_i: the final state from zero, of device i
                                f_i: `record.carry`, of each entry; without it a matrix (the delta
                                     rule's), the final state from the identity with values of zero

One all-gather of the small s_i and f_i, a scan over them in every device, and a second call from
the state that was found. Source: Sun et al., "Linear Attention Sequence Parallelism",
arXiv:2404.02882, with one gather in the place of a chain of messages.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.core import masks
from attnjax.ops import blocked_arguments
from attnjax.parallel import split

_KINDS = (masks.Causal, masks.Valid, masks.Segments)


def _check(record, call, places):
    parameters = set(inspect.signature(record.fn).parameters)
    if not {"initial_state", "return_state"} <= parameters:
        name = record.fn.__name__
        raise NotImplementedError(f"pass_state needs initial_state and return_state of {name}")
    if record.carry is None and call.letters["initial_state"] != ("B", "N", "H", "V"):
        name = record.fn.__name__
        raise NotImplementedError(f"pass_state needs carry, or a state (B N H V), of {name}")
    if not masks.select(call.mask, *_KINDS, by="pass_state")[0]:
        message = (
            "pass_state goes forward in time: it needs mask=Causal(), without it all_to_all can"
        )
        raise NotImplementedError(message)
    if call.options["return_state"] and (T := places.sizes["T"]) % places.size:
        raise NotImplementedError(
            f"return_state needs {T=} to be a multiple of {places.size}, elsewhere all_to_all can"
        )


def _run(record, call, places):
    axis, T = places.axis, places.sizes["T"]
    here, piece = lax.axis_index(axis), places.here("T")
    at = jnp.minimum(here * piece + jnp.arange(piece), T - 1)
    arrays = {name: x for name, x in call.arrays.items() if name != "initial_state"}
    options = {name: x for name, x in call.options.items() if not name.endswith("_state")}
    args = arrays | dict(mask=jax.tree.map(lambda x: x[:, at], call.mask))
    fn = functools.partial(record.fn, **args, **options)
    _, state = fn(return_state=True)
    enters = _enters(call.mask, at[0]).reshape(-1, *(1,) * (state.ndim - 1))
    initial = call.arrays.get("initial_state", jnp.zeros_like(state))
    factor, times = _transition(record, fn, args, state)
    before, final = _chain(initial, state, factor * enters, times, axis)
    o = fn(initial_state=before[here] * enters)
    if not call.options["return_state"]:
        return o
    # the same in each device, which only a sum makes known
    return o, lax.psum(jnp.where(here == 0, final, 0), axis)


def _transition(record, fn, args, state):
    """What becomes of an initial state: a factor, and how it is multiplied with the state."""
    if record.carry is not None:
        return record.carry(**args), jnp.multiply
    v, (H, _) = args["v"], state.shape[-2:]
    nothing = jnp.zeros_like(v, shape=(*v.shape[:-1], H))
    identity = jnp.zeros_like(state, shape=(*state.shape[:-1], H)) + jnp.eye(H)[None, None]
    _, matrix = fn(v=nothing, initial_state=identity, return_state=True)
    return matrix, functools.partial(jnp.matmul, precision="highest")  # errors would multiply


def _enters(mask, first):
    """Whether the state before position `first` matters to it: no new segment begins there."""
    before = jnp.maximum(first - 1, 0)
    _, _, segments = masks.select(mask, *_KINDS, by="pass_state")
    same = [(part.q[:, before] == part.q[:, first]).astype(jnp.float32) for part in segments]
    return functools.reduce(jnp.multiply, same, jnp.ones(1))


def _chain(initial, state, factor, times, axis):
    """The state before each device's tokens (P ...), and the last.

    One after the other: the states are few, and jaxlib 0.11.2 crashes on the gradient of an
    associative scan here.
    """
    initial = blocked_arguments.varying(initial.astype(state.dtype), like=(initial, state))
    step = lambda before, x: (times(x[0], before) + x[1], before)
    final, before = lax.scan(step, initial, lax.all_gather((factor, state), axis))
    return before, final


STRATEGY = split.Strategy(check=_check, run=_run)
