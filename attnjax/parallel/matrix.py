"""What each strategy honours, as one table: tests run each of its cells, and the docs show it.

python -m attnjax.parallel.matrix          # docs/context_parallelism.md
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import parallel
from attnjax.core import masks, positions, registry, sharding
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout

_KEY = jax.random.key(0)
_CAUSAL = masks.Causal()
_DROPOUT = dropout.Dropout(0.3, _KEY)
_ARRAYS = (jax.Array, jax.tree_util.Partial)  # what has gradients
_PAGE = """\
# Context parallelism

`tensor` splits heads in the place of the sequence, and `latent` slices of a latent; all other
strategies split the sequence, and heads over the mesh axis `tensor`.

Written by `make docs` from [matrix.py](../attnjax/parallel/matrix.py); do not edit.

    fn = parallel.shard("ring(order='zigzag')", registry.get("gqa"), mesh)

`yes`: outputs and gradients are those of one device, to a relative error of 1e-5 in float32, on 4
and on 8 devices ([matrix_test.py](../tests/parallel/matrix_test.py) runs every cell, several rows
of a column in one call where they can be). A number: the call is refused with the sentence below,
which names what would work.
"""


class Table(NamedTuple):
    """Calls of one function by what is particular about them, and strategies for it."""

    title: str
    record: registry.Mechanism
    strategies: tuple[str, ...]
    ordinary: Callable[..., dict[str, Any]]  # sizes, which have defaults -> arguments
    rows: Mapping[str, dict[str, Any]]  # sizes and arguments that are not the ordinary ones

    def arguments(self, *rows: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays, options) of one call with all that is particular about some rows.

        Masks are combined by &. Raises ValueError where rows differ in anything else.
        """
        special: dict[str, Any] = {}
        for name, value in itertools.chain(*(self.rows[row].items() for row in rows)):
            known = special.get(name, value)
            if known is not value:
                if not isinstance(known, masks.Mask) or value is None:
                    raise ValueError(f"{name} differs in {', '.join(rows)}")
                value = known & value
            special[name] = value
        sizes = special.keys() & inspect.signature(self.ordinary).parameters
        given = self.ordinary(**{name: special.pop(name) for name in sizes}) | special
        arrays = {name: x for name, x in given.items() if isinstance(x, _ARRAYS)}
        return arrays, {name: x for name, x in given.items() if name not in arrays}

    def refusal(self, strategy: str, row: str, devices: int = 4) -> str:
        """The sentence with which a strategy refuses a row; empty where it doesn't.

        Nothing is computed, and the devices needn't exist.
        """
        shape, kinds = (1, 1, devices, 1), (jax.sharding.AxisType.Auto,) * 4
        mesh = jax.sharding.AbstractMesh(shape, sharding.AXES, axis_types=kinds)
        arrays, options = self.arguments(row)
        run = functools.partial(parallel.shard(strategy, self.record, mesh), **options)
        try:
            jax.eval_shape(lambda arrays: run(**arrays), arrays)
        except NotImplementedError as error:
            return str(error)
        return ""


@functools.cache
def tables() -> tuple[Table, ...]:
    """All tables."""
    sequences = _softmax(), _heads(), _recurrence(), _delta_rule(), _blocks(), _gates(), _latents()
    return *sequences, _neighborhoods(), _swin(), _cells()


def _normal(*shape, seed=0):
    # by numpy, as JAX would compile this for each shape
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _alike(*shape):
    """Queries, keys and values of one shape."""
    return {name: _normal(*shape, seed=i) for i, name in enumerate("qkv")}


def _qkv(T=16, S=16, N=8, K=2):
    q, k = _normal(2, T, N, 4, seed=1), _normal(2, S, K, 4, seed=2)
    return dict(q=q, k=k, v=_normal(2, S, K, 3, seed=3))


def _softmax():
    documents = masks.Segments(jnp.array([[0] * 6 + [1] * 2 + [2] * 8, [0] * 12 + [4] * 4]))
    rows = {
        "one key head for each query head": dict(K=8, mask=_CAUSAL),
        "fewer key heads than devices": {},
        "one key head": dict(K=1),
        "heads that don't divide": dict(N=3, K=3),
        "lengths that don't divide": dict(T=13, S=11),
        "fewer tokens than devices": dict(T=3, S=3),
        "documents and padding": dict(mask=documents & _padding() & _CAUSAL),
        "sliding window": dict(mask=masks.Window(3)),
        "window on both sides": dict(mask=masks.Window(2, 3)),
        "prefix": dict(mask=_CAUSAL | masks.Prefix(2)),
        "neighborhood in an image": dict(mask=masks.Neighborhood((4, 4), (3, 3))),
        "any mask, by head": dict(mask=_by_head()),
        "bias": dict(bias=_normal(1, 8, 16, 16)),
        "bias of keys": dict(bias=_normal(2, 1, 1, 16), mask=_CAUSAL),
        "sinks, scale and softcap": dict(sinks=_normal(8), scale=0.7, softcap=2.0),
        "dropout": dict(dropout=_DROPOUT),
        "score_mod": dict(score_mod=_learned_alibi()),
        "implementation": dict(implementation="blocked"),
    }
    strategies = ("ring", "ring(order='zigzag')", "ring(order='striped')", "ring_self_attention")
    strategies += ("gather", "gather(order='zigzag')", "all_to_all", "all_to_all_ring(heads=2)")
    return Table("Softmax attention", _any_softmax(), (*strategies, "halo"), _qkv, rows)


def _any_softmax():
    """Every option of the operation, as a mechanism would have them."""
    record = registry.get("multi_head_attention")
    return dataclasses.replace(record, fn=ops.dot_product_attention)


def _padding():
    return masks.Valid(jnp.arange(16)[None] < jnp.array([[16], [9]]))


def _by_head():
    return masks.Dense(jax.random.bernoulli(_KEY, 0.5, (1, 8, 16, 16)))


def _learned_alibi():
    """A score_mod whose slopes have a gradient."""
    lower = lambda slopes, score, b, n, t, s: score - slopes[n] * jnp.abs(t - s)
    return jax.tree_util.Partial(lower, jnp.asarray(positions.alibi_slopes(8)))


def _heads():
    more = dict(mask=_by_head(), bias=_normal(1, 8, 16, 16), sinks=_normal(8), dropout=_DROPOUT)
    rows = {
        "fewer key heads than devices, and every option by head": more
        | dict(score_mod=_learned_alibi()),
        "heads that don't divide": dict(N=3, K=3),
    }
    return Table("Softmax attention by heads", _any_softmax(), ("tensor",), _qkv, rows)


def _linear(T=16, N=8):
    return _qkv(T=T, S=T, N=N, K=N) | dict(mask=_CAUSAL)


def _packed(T=16):
    return masks.Segments(jnp.array([[0] * 4 + [1] * 3 + [2] * (T - 7), [0] * 4 + [1] * (T - 4)]))


def _recurrence():
    ordinary = lambda T=16, N=8: _linear(T, N) | dict(log_decay=-jnp.linspace(0.1, 1, N))
    state = dict(initial_state=_normal(2, 8, 4, 3), return_state=True)
    rows = {
        "causal": {},
        "without a mask": dict(mask=None),
        "documents and padding": dict(mask=_packed() & _padding() & _CAUSAL),
        "state in and out": state,
        "state of a length that doesn't divide": dict(T=13) | state,
        "lengths that don't divide": dict(T=13),
        "heads that don't divide": dict(N=3),
    }
    record = registry.get("lightning_attention_2")
    strategies = ("pass_state", "all_to_all")
    return Table("Recurrences with a decay", record, strategies, ordinary, rows)


def _delta_rule():
    def ordinary():
        k = _normal(2, 13, 8, 4)
        beta = jax.random.uniform(_KEY, (2, 13, 8))
        unit = dict(k=k / jnp.linalg.norm(k, axis=-1, keepdims=True), beta=beta)
        return _linear(T=13) | unit | dict(mask=_packed(13) & _CAUSAL)

    rows = {"documents, and a length that doesn't divide": {}}
    record = registry.get("delta_net")
    return Table("The delta rule", record, ("pass_state", "all_to_all"), ordinary, rows)


def _blocks():
    padding = masks.Valid(jnp.arange(11)[None] < jnp.array([[11], [8]]))
    ordinary = lambda: _qkv(T=11, S=11, N=4) | dict(block=2, topk=3, mask=padding)
    rows = {"padding, and a length that doesn't divide": {}}
    record = registry.get("moba")
    return Table("Chosen blocks of keys", record, ("block_ring",), ordinary, rows)


def _gates():
    padding = masks.Valid(jnp.arange(11)[None] < jnp.array([[11], [8]]))

    def ordinary(query_block=1):
        gates = _normal(2, -(-11 // query_block), 8, 5, seed=4), _normal(2, 6, 2, 5, seed=5)
        sizes = dict(block=2, query_block=query_block, topk=3)
        return _qkv(T=11, S=11) | dict(gate_q=gates[0], gate_k=gates[1]) | sizes

    rows = {
        "padding, and a length that doesn't divide": dict(mask=padding),
        "the gate's own loss": dict(distill=0.5),
        "queries that share a choice": dict(query_block=2),
    }
    strategies = ("gather(order='zigzag')", "all_to_all", "block_ring")
    record = registry.get("seerattention")
    return Table("Blocks of keys that a gate chose", record, strategies, ordinary, rows)


def _latents():
    record = registry.get("tpla")
    latent = lambda J: dict(latent=_normal(2, 13, J, 5), up=_normal(J, 5, 4, 14) / 4)
    shares = lambda J: dict(shares=jnp.full(J, 1 / J))
    ordinary = lambda J=8: record.example(_KEY, 13) | latent(J) | shares(J)
    rows = {"slices that divide": {}, "slices that don't divide": dict(J=3)}
    return Table("Slices of a latent", record, ("latent",), ordinary, rows)


def _neighborhoods():
    ordinary = lambda shape=(16,), window=3: _alike(1, *shape, 2, 4) | dict(window=window)
    both = dict(window=(3, 2), stride=(2, 1), dilation=(2, 1), causal=(True, False))
    rows = {
        "one axis": {},
        "strides, and a length that doesn't divide": dict(shape=(13,), window=5, stride=3),
        "blocks": dict(window=4, stride=4),
        "two axes, dilated, causal along one": dict(shape=(11, 3)) | both,
        "three axes": dict(shape=(9, 3, 2), window=(3, 2, 2)),
    }
    return Table("Neighborhoods", registry.get("gna"), ("halo",), ordinary, rows)


def _swin():
    grid = lambda: _alike(1, 13, 5, 2, 4) | dict(bias=_normal(1, 2, 9, 9), window=3)
    rows = {f"{shift=}": dict(shift=shift) for shift in (0, 1)}
    return Table("Windows that shift", registry.get("swin"), ("halo",), grid, rows)


def _cells():
    ordinary = lambda: _alike(2, 5, 3, 2, 8, 4) | dict(cell=(2, 2, 1), tau=0.3)
    rows = {"a length that doesn't divide": {}}
    return Table("Cells of a video", registry.get("vmoba"), ("all_to_all",), ordinary, rows)


def page() -> str:
    """docs/context_parallelism.md."""
    return "\n".join([_PAGE, *map(_section, tables())])


def _section(table):
    notes: list[str] = []

    def cell(strategy, row):
        sentence = table.refusal(strategy, row)
        if sentence and sentence not in notes:
            notes.append(sentence)
        return str(notes.index(sentence) + 1) if sentence else "yes"

    line = lambda cells: f"| {' | '.join(cells)} |"
    head = [line(["", *(f"`{name}`" for name in table.strategies)])]
    head += ["|---" * (len(table.strategies) + 1) + "|"]
    rows = [line([row, *(cell(name, row) for name in table.strategies)]) for row in table.rows]
    where = table.record.fn.__name__
    numbered = [f"{i}. {sentence}" for i, sentence in enumerate(notes, 1)]
    return "\n".join([f"## {table.title} (`{where}`)", "", *head, *rows, "", *numbered]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
