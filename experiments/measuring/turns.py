"""Implementations take turns, so that whatever else the machine does falls on each alike.

What one raises is why it has no time: a peer may raise anything, and memory may not suffice.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Way = Literal["forward", "backward", "forward+backward"]
Timer = Callable[[int], float]  # so many calls after one another -> seconds of each


class Refused(Exception):
    """Why an implementation has no time, in words of its own."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One implementation of what is measured."""

    prepare: Callable[[], Timer]
    """Makes it ready; raises where that can't be."""
    work: float
    """Operations or bytes of one call."""


def take_turns(entries: dict[str, Entry], *, runs: int, seconds: float, at_once: float = 0.0):
    """({name: seconds of each run}, {name: why it has none}).

    Args:
      runs, seconds: rounds, in which each runs once, go on until there were so many, for so long.
      at_once: a run is as many calls as take so many seconds, one at least.
    """
    timers, refused = {}, {}
    for name, entry in entries.items():
        try:
            timers[name] = _warm(entry.prepare(), at_once)
        except Exception as error:
            refused[name] = reason(error)
    times = {name: [] for name in timers}
    rounds, end = 0, time.perf_counter() + seconds
    while times and (rounds < runs or time.perf_counter() < end):
        for name in list(times):
            try:
                times[name].append(timers[name]())
            except Exception as error:  # those that were made ready later took its memory
                refused[name] = reason(error)
                del times[name]
        rounds += 1
    return times, refused


def _warm(timer, at_once):
    """A function that runs once; the first call compiles, and warms caches up."""
    timer(1)
    calls = math.ceil(at_once / timer(1)) if at_once else 1
    return lambda: timer(calls)


def reason(error: Exception) -> str:
    """One line of what was raised."""
    line = " ".join(str(error).split())[:300]
    return line if isinstance(error, Refused) else f"{type(error).__name__}: {line}"


def refused(why: str) -> Callable[[], Timer]:
    """`prepare` of an Entry that isn't to be timed."""

    def prepare():
        raise Refused(why)

    return prepare


def of_jax(fn: Callable, arrays: tuple, way: Way, given: tuple = ()) -> Callable[[], Timer]:
    """`prepare` of an Entry for fn(*arrays, *given), or its gradients in the arrays.

    "backward" is timed alone: what the forward keeps for it is made before.
    """

    arrays, given = jax.tree.map(jnp.asarray, (arrays, given))

    def prepare():
        if way == "forward":
            return functools.partial(_seconds, jax.jit(fn), (*arrays, *given))
        out = jax.eval_shape(fn, *arrays, *given)
        cotangent = jax.random.normal(jax.random.key(9), out.shape, out.dtype)
        if way == "backward":
            kept = jax.jit(functools.partial(_vjp, fn))(arrays, given)
            step, args = jax.jit(lambda vjp, do: vjp(do)), (kept, cotangent)
        else:
            step = jax.jit(lambda do, arrays, given: _vjp(fn, arrays, given)(do))
            args = cotangent, arrays, given
        return functools.partial(_seconds, step, args)

    return prepare


def _vjp(fn, arrays, given):
    return jax.vjp(lambda *arrays: fn(*arrays, *given), *arrays)[1]


def _seconds(step, args, calls):
    start = time.perf_counter()
    for _ in range(calls):
        out = step(*args)
        if jax.default_backend() == "cpu":  # which might run several at the same time
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls
