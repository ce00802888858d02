"""Operations that raise where they are lowered, and only there.

All branches of a choice by platform are traced, wherever the program is to run: what one of them
can't honour mustn't raise before.
"""

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_refused_p = core.Primitive("refused")
_refused_p.def_abstract_eval(lambda x, *, reason: x)
batching.defvectorized(_refused_p)
ad.deflinear2(_refused_p, lambda ct, x, *, reason: [_refused_p.bind(ct, reason=reason)])


@_refused_p.def_impl
def _raise(x, *, reason):
    raise NotImplementedError(reason)


mlir.register_lowering(_refused_p, lambda ctx, x, *, reason: _raise(x, reason=reason))


def refuse(reason: str, tree):
    """The arrays of a tree, of which none can be had: NotImplementedError where one is lowered."""
    return jax.tree.map(lambda x: _refused_p.bind(x, reason=reason), tree)
