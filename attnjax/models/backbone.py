"""What every model shares: a stack of blocks, in a loop or in a scan over layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from attnjax.core import registry
from attnjax.models import block

Remat = Literal["none", "full", "dots"]
_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Period(nn.Module):
    """The blocks after which a stack repeats itself: what a scan over layers scans over."""

    make: Callable[[str], block.Block]
    mixers: tuple[str, ...]

    def setup(self):
        self.block = [self.make(text) for text in self.mixers]


class Backbone(nn.Module, kw_only=True):
    """The fields and the stack of blocks of every model.

    Attributes:
      features: D. head_dim is D // num_heads where None.
      mixers: mechanisms and their options, for `registry.build`; layer i has the i-th, repeating.
      scan: one compiled body for all repetitions; parameters as `stacked` makes them.
      remat: what the backward pass computes again: nothing, all, or all but matrix products.
      dtype: of the computation; parameters are float32.
      parallel: gives the function in the place of a record's own, as `parallel.shard` does.
    """

    features: int
    depth: int
    num_heads: int
    head_dim: int | None = None
    mixers: tuple[str, ...]
    mlp_ratio: float | int = 4
    activation: block.Activation
    scan: bool = False
    remat: Remat = "none"
    dtype: DTypeLike | None = None
    parallel: Callable[[registry.Mechanism], Callable] | None = None

    @property
    def _head_dim(self):
        return self.head_dim or self.features // self.num_heads

    def _build_blocks(self):
        self._check(remat=Remat, activation=block.Activation)
        make, count = self._make(), len(self.mixers)
        if not self.scan:
            self.block = [make(self.mixers[i % count]) for i in range(self.depth)]
        elif self.depth % count:
            raise ValueError(f"scan needs depth={self.depth} to be a multiple of {count} mixers")
        else:
            self.layers = Period(make, self.mixers)

    def _make(self):
        kind = block.Block
        if self.remat != "none":
            kind = nn.remat(block.Block, policy=_POLICIES[self.remat], prevent_cse=not self.scan)
        return functools.partial(
            kind,
            num_heads=self.num_heads,
            head_dim=self._head_dim,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            dtype=self.dtype,
            parallel=self.parallel,
        )

    def _check(self, **choices):
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name}={getattr(self, name)!r} must be in {get_args(literal)}")

    def _through(self, body, carry, xs=None):
        """`carry, y = body(layer, carry, x)` through all blocks: (carry, the layers' y)."""

        def some(layers, carry, xs):
            ys = []
            for layer, x in zip(layers, xs or (None,) * len(layers), strict=True):
                carry, y = body(layer, carry, x)
                ys.append(y)
            return carry, tuple(ys)

        if not self.scan:
            return some(self.block, carry, xs)
        lifted = nn.scan(
            lambda period, carry, xs: some(period.block, carry, xs),
            variable_axes={"params": 0},
            split_rngs={"params": True, "noise": True},
            length=self.depth // len(self.mixers),
        )
        return lifted(self.layers, carry, xs)


def require(texts: Sequence[str], fits: Callable[[registry.Mechanism], bool], what: str) -> None:
    """Raises ValueError, naming some mechanisms that fit, where one in `texts` doesn't."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"mixers={texts!r} must be a tuple of names or name(option=value, ...)")
    for text in texts:
        name, _ = registry.parse(text)
        record = registry.get(name)
        if not (isinstance(record, registry.Mechanism) and fits(record)):
            known = registry.of_kind(registry.Mechanism).items()
            fitting = [name for name, record in known if fits(record)][:4]
            raise ValueError(f"{name} is not {what}; such are {', '.join(fitting) or 'none'}")


def stacked(params: PyTree, period: int = 1) -> PyTree:
    """Parameters of a model with scan=False -> those with scan=True and `period` mixers."""
    blocks = sorted((k for k in params if k.startswith("block_")), key=lambda k: int(k[6:]))
    stack = lambda j: jax.tree.map(lambda *x: jnp.stack(x), *[params[k] for k in blocks[j::period]])
    rest = {k: x for k, x in params.items() if k not in blocks}
    return rest | {"layers": {f"block_{j}": stack(j) for j in range(period)}}


def unstacked(params: PyTree) -> PyTree:
    """The inverse of `stacked`."""
    layers, period = params["layers"], len(params["layers"])
    length = len(jax.tree.leaves(layers)[0])
    blocks = {
        f"block_{i * period + j}": jax.tree.map(lambda x, i=i: x[i], layers[f"block_{j}"])
        for i in range(length)
        for j in range(period)
    }
    return {k: x for k, x in params.items() if k != "layers"} | blocks
