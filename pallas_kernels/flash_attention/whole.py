"""Attention to some of the keys, where the output of all of them is known already."""

import functools
from collections.abc import Callable

import jax


def part_of(backward: Callable, static: int = 1) -> Callable:
    """(*static, learned, given, whole) -> whole, with the gradients that `backward` gives.

    whole is the (o, lse) of all keys, of which those that are learned here are a part: weights are
    computed again by the lse, so that this is the part's share of the gradients. `backward` is that
    of a custom_vjp which keeps (learned, given, o, lse) and has as many static arguments.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=tuple(range(static)))
    def part(*args):
        return args[-1]

    def forward(*args):
        *_, learned, given, whole = args
        return whole, (learned, given, *whole)

    part.defvjp(forward, lambda *args: (*backward(*args), None))
    return part
