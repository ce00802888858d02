"""Kernels by the platform that is lowered for; what one can't honour raises there, and only there.

All branches are traced, wherever the program is to run. One that raises NotImplementedError gives
way to a primitive that nothing lowers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.ops import blocked_arguments
from pallas_kernels import refusal


def one_of(kernels: dict[str, Callable], learned, given, out, *, otherwise: str):
    """What the kernel of the platform returns, of those that are named by it.

    Args:
      kernels: functions without arguments.
      learned, given: what they take; learned has gradients. What they return varies over each mesh
        axis that any of it varies over.
      out: shapes and dtypes of what each returns.
      otherwise: why there is none for other platforms.

    Raises NotImplementedError if no kernel can be had, and where it is lowered if its own can't.
    """
    given, refusals = jax.tree.leaves(given), {}

    def attempt(platform):
        try:
            return kernels[platform]()
        except NotImplementedError as error:
            refusals[platform] = str(error)
            return _refused(str(error), out, learned, given)

    branches = {platform: functools.partial(attempt, platform) for platform in kernels}
    default = lambda: _refused(otherwise, out, learned, given)
    found = jax.lax.platform_dependent(default=default, **branches)
    if refusals.keys() == kernels.keys():
        raise NotImplementedError("; ".join(f"{name}: {why}" for name, why in refusals.items()))
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _refused(reason, out, learned, given):
    """What raises where it is lowered; so do its gradients, which might be all that is wanted."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
    return refusal.refuse(reason, blocked_arguments.varying(zeros, like=(learned, given)))


def _forward(reason, out, learned, given):
    return _refused(reason, out, learned, given), learned


def _backward(reason, out, learned, cotangents):
    return refusal.refuse(reason, jax.tree.map(lambda x: x * 0, learned)), None


_refused.defvjp(_forward, _backward)
