"""Forward-mode derivatives for softmax attention that has reverse mode only.

Reverse mode stays as it is, with what it keeps. Forward mode walks over tiles in XLA
(`blocked_tangents`), whatever computes the output. Derivatives of gradients are those of the
gradients of `blocked_attention`, in forward mode.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import blocked_arguments, blocked_attention, blocked_tangents, linear_function
from attnjax.ops.blocked_arguments import Learned


def with_forward_mode(attend: Callable) -> Callable:
    """`attend`, called as `blocked_attention` is, with forward-mode derivatives too.

    It returns (output, lse), or (output, None) where its lse can't be had. With `whole`, of which
    keys are a part, it stays as it is.
    """

    def attend_both(q, k, v, t, s, *, whole=None, **options):
        if whole is not None:
            return attend(q, k, v, t, s, whole=whole, **options)
        return both(q, k, v, t, s, **options)

    def both(q, k, v, t, s, *, mask, bias, scale, softcap, sinks, dropout, score_mod):
        score_mod, captured, constants = blocked_arguments.open_closure(score_mod)
        dtype = jnp.result_type(q, k)
        learned = Learned(q.astype(dtype), k.astype(dtype), v, bias, sinks, captured)
        given, tree, static = _traced((t, s, mask, dropout, constants))
        call = _Call(attend, dict(scale=scale, softcap=softcap), score_mod, tree, static)
        learned = blocked_arguments.varying(learned, like=(learned, given))
        # what reverse mode keeps is had without derivatives of its own: `_attached` gives them
        still = jax.lax.stop_gradient(learned)
        out, pull = jax.vjp(functools.partial(call.run, given), still)
        return _attached(call, pull, still, learned, given, out)

    return attend_both


class _Call(NamedTuple):
    """What is known while tracing."""

    attend: Callable
    options: dict
    score_mod: Callable | None  # one that `blocked_arguments.open_closure` gave
    tree: jax.tree_util.PyTreeDef  # of what has no gradients
    static: list  # its leaves; None for those that are traced

    def given(self, arrays):
        """(t, s, mask, dropout, constants)."""
        arrays = iter(arrays)
        return self.tree.unflatten([next(arrays) if x is None else x for x in self.static])

    def run(self, arrays, learned: Learned):
        """(output, lse), with reverse mode only."""
        t, s, mask, dropout, constants = self.given(arrays)
        q, k, v, bias, sinks, captured = learned
        options = self.options | dict(mask=mask, bias=bias, sinks=sinks, dropout=dropout)
        if self.score_mod is not None:
            options["score_mod"] = functools.partial(self.score_mod, captured, constants)
        return self.attend(q, k, v, t, s, **dict(score_mod=None) | options)

    def blocked(self, learned: Learned, arrays):
        """What blocked attention computes with."""
        t, s, mask, dropout, constants = self.given(arrays)
        options = dict(mask=mask, dropout=dropout, constants=constants, score_mod=self.score_mod)
        return blocked_attention.arguments(learned, t, s, **options, **self.options)

    def lse(self, learned: Learned, arrays, lse):
        """lse, or that of blocked attention where there is none."""
        if lse is not None:
            return lse
        blocked = with_forward_mode(blocked_attention.blocked_attention)
        return self._replace(attend=blocked).run(arrays, learned)[1]

    def tangents(self, known, kept, moved: Learned):
        """(do, dlse), with None for an lse that isn't wanted."""
        learned, given, (o, lse) = known
        args = *self.blocked(learned, given), o, self.lse(learned, given, lse)
        do, dlse = blocked_tangents.tangents(*args, moved)
        return do, None if lse is None else dlse

    def gradients(self, known, kept, cotangents) -> Learned:
        """By blocked attention, whatever another way has kept."""
        (learned, given, (o, lse)), (do, dlse) = known, cotangents
        lse = self.lse(learned, given, lse)
        dlse = jnp.zeros_like(lse) if dlse is None else dlse
        return blocked_attention.gradients(*self.blocked(learned, given), o, lse, do, dlse)


def _traced(tree):
    """(arrays, structure, leaves with None for these arrays): numpy is known while tracing."""
    leaves, structure = jax.tree.flatten(tree)
    known = [x if isinstance(x, np.ndarray) else None for x in leaves]
    return [x for x in leaves if not isinstance(x, np.ndarray)], structure, known


def _attached(call, pull, still, learned, given, out):
    """The output, with derivatives by all that is learned."""
    kept, pulled = _kept(pull, (still, given, out))
    gradients = linear_function.with_tangents(pulled, call.gradients)

    @jax.custom_jvp
    def attach(learned, given, out, kept):
        return out

    @functools.partial(attach.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        learned, given, _, kept = primals
        out, moved = attach(*primals), linear_function.moving(tangents[0])

        def transpose(residuals, cotangents):
            grads = gradients(*residuals, cotangents)
            wanted = lambda x, grad: None if x is None else grad
            return jax.tree.map(wanted, moved, grads, is_leaf=lambda x: x is None)

        push = lambda residuals, moved: call.tangents(*residuals, moved)
        residuals = (learned, given, out), kept
        return out, linear_function.call(push, transpose, residuals, moved, like=out)

    return attach(learned, given, out, kept)


def _kept(pull, known):
    """(what `pull` has that isn't among the arrays of `known`, (known, kept, cotangents) -> grads).

    Each array is kept once, then: most of what a reverse mode keeps are its inputs and outputs.
    """
    leaves, tree = jax.tree.flatten(pull)
    places = {id(x): i for i, x in enumerate(jax.tree.leaves(known))}
    places = [places.get(id(x)) for x in leaves]

    def pulled(known, kept, cotangents):
        known, kept = jax.tree.leaves(known), iter(kept)
        pull = tree.unflatten([next(kept) if i is None else known[i] for i in places])
        return pull(cotangents)[0]

    return [x for x, i in zip(leaves, places, strict=True) if i is None], pulled
