"""What each strategy honours, as one table: tests run each of its cells, and the docs show it.

python -m attnjax.parallel.matrix          # docs/context_parallelism.md
"""

import dataclasses
import functools
from collections.abc import Mapping
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
_PAGE = """\
# Context parallelism

`tensor` splits heads in the place of the sequence, and `latent` slices of a latent; all other
strategies split the sequence, and heads over the mesh axis `tensor`.

Written by `make docs` from [matrix.py](../attnjax/parallel/matrix.py); do not edit.

    fn = parallel.shard("ring(order='zigzag')", registry.get("gqa"), mesh)

`yes`: outputs and gradients are those of one device, to a relative error of 1e-5 in float32, on 4
and on 8 devices ([matrix_test.py](../tests/parallel/matrix_test.py) runs every cell). A number: the
call is refused with the sentence below, which names what would work.
"""


class Table(NamedTuple):
    """Arguments of one function by what is particular about them, and strategies for it."""

    title: str
    record: registry.Mechanism
    strategies: tuple[str, ...]
    rows: Mapping[str, dict[str, Any]]

    def refusal(self, strategy: str, row: str, devices: int = 4) -> str:
        """The sentence with which a strategy refuses a row; empty where it doesn't.

        Nothing is computed, and the devices needn't exist.
        """
        shape, kinds = (1, 1, devices, 1), (jax.sharding.AxisType.Auto,) * 4
        mesh = jax.sharding.AbstractMesh(shape, sharding.AXES, axis_types=kinds)
        arrays, options = arguments(self.rows[row])
        run = functools.partial(parallel.shard(strategy, self.record, mesh), **options)
        try:
            jax.eval_shape(lambda arrays: run(**arrays), arrays)
        except NotImplementedError as error:
            return str(error)
        return ""


def arguments(row: Mapping[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(arrays, options) of a row."""
    arrays = {name: x for name, x in row.items() if isinstance(x, jax.Array)}
    return arrays, {name: x for name, x in row.items() if name not in arrays}


@functools.cache
def tables() -> tuple[Table, ...]:
    """All tables."""
    sequences = _softmax(), _heads(), _recurrence(), _delta_rule(), _blocks(), _latents()
    return *sequences, _neighborhoods(), _swin()


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
    padding = masks.Valid(jnp.arange(16)[None] < jnp.array([[16], [9]]))
    by_head = masks.Dense(jax.random.bernoulli(_KEY, 0.5, (1, 8, 16, 16)))
    options = {
        "one key head for each query head": _qkv(K=8) | dict(mask=_CAUSAL),
        "fewer key heads than devices": _qkv(),
        "one key head": _qkv(K=1),
        "heads that don't divide": _qkv(N=3, K=3),
        "lengths that don't divide": _qkv(T=13, S=11),
        "fewer tokens than devices": _qkv(T=3, S=3) | dict(mask=_CAUSAL),
        "documents and padding": _qkv() | dict(mask=documents & padding & _CAUSAL),
        "sliding window": _qkv() | dict(mask=masks.Window(3)),
        "window on both sides": _qkv() | dict(mask=masks.Window(2, 3)),
        "prefix": _qkv() | dict(mask=_CAUSAL | masks.Prefix(5)),
        "neighborhood in an image": _qkv() | dict(mask=masks.Neighborhood((4, 4), (3, 3))),
        "any mask, by head": _qkv() | dict(mask=by_head),
        "bias": _qkv() | dict(bias=_normal(1, 8, 16, 16)),
        "bias of keys": _qkv() | dict(bias=_normal(2, 1, 1, 16), mask=_CAUSAL),
        "sinks, scale and softcap": _qkv() | dict(sinks=_normal(8), scale=0.7, softcap=2.0),
        "dropout": _qkv() | dict(dropout=_DROPOUT),
        "score_mod": _qkv() | dict(score_mod=positions.alibi(8)),
        "implementation": _qkv() | dict(implementation="blocked", mask=_CAUSAL),
    }
    strategies = ("ring", "ring(order='zigzag')", "ring(order='striped')", "ring_self_attention")
    strategies += ("gather", "gather(order='zigzag')", "all_to_all", "all_to_all_ring(heads=2)")
    return Table("Softmax attention", _any_softmax(), (*strategies, "halo"), options)


def _any_softmax():
    """Every option of the operation, as a mechanism would have them."""
    record = registry.get("multi_head_attention")
    return dataclasses.replace(record, fn=ops.dot_product_attention)


def _heads():
    by_head = masks.Dense(jax.random.bernoulli(_KEY, 0.5, (1, 8, 16, 16)))
    more = dict(mask=by_head, bias=_normal(1, 8, 16, 16), sinks=_normal(8), dropout=_DROPOUT)
    rows = {
        "fewer key heads than devices, and every option by head": _qkv()
        | more
        | dict(score_mod=positions.alibi(8)),
        "heads that don't divide": _qkv(N=3, K=3),
    }
    return Table("Softmax attention by heads", _any_softmax(), ("tensor",), rows)


def _linear(T=16, N=8):
    return _qkv(T=T, S=T, N=N, K=N) | dict(mask=_CAUSAL)


def _packed(T=16):
    return masks.Segments(jnp.array([[0] * 4 + [1] * 3 + [2] * (T - 7), [0] * 4 + [1] * (T - 4)]))


def _recurrence():
    head = lambda N=8: dict(log_decay=-jnp.linspace(0.1, 1, N))
    padding = masks.Valid(jnp.arange(16)[None] < jnp.array([[16], [9]]))
    state = dict(initial_state=_normal(2, 8, 4, 3), return_state=True)
    rows = {
        "causal": _linear() | head(),
        "without a mask": _linear() | head() | dict(mask=None),
        "documents and padding": _linear() | head() | dict(mask=_packed() & padding & _CAUSAL),
        "state in and out": _linear() | head() | state,
        "state of a length that doesn't divide": _linear(T=13) | head() | state,
        "lengths that don't divide": _linear(T=13) | head(),
        "heads that don't divide": _linear(N=3) | head(3),
    }
    record = registry.get("lightning_attention_2")
    return Table("Recurrences with a decay", record, ("pass_state", "all_to_all"), rows)


def _delta_rule():
    k = _normal(2, 13, 8, 4)
    row = _linear(T=13) | dict(k=k / jnp.linalg.norm(k, axis=-1, keepdims=True))
    row |= dict(beta=jax.random.uniform(_KEY, (2, 13, 8)), mask=_packed(13) & _CAUSAL)
    rows = {"documents, and a length that doesn't divide": row}
    record = registry.get("delta_net")
    return Table("The delta rule", record, ("pass_state", "all_to_all"), rows)


def _blocks():
    padding = masks.Valid(jnp.arange(11)[None] < jnp.array([[11], [8]]))
    row = _qkv(T=11, S=11, N=4) | dict(block=2, topk=3, mask=padding)
    rows = {"padding, and a length that doesn't divide": row}
    return Table("Chosen blocks of keys", registry.get("moba"), ("block_ring",), rows)


def _latents():
    record = registry.get("tpla")
    latent = lambda J: dict(latent=_normal(2, 13, J, 5), up=_normal(J, 5, 4, 14) / 4)
    example = lambda J: record.example(_KEY, 13) | latent(J) | dict(shares=jnp.full(J, 1 / J))
    rows = {"slices that divide": example(8), "slices that don't divide": example(3)}
    return Table("Slices of a latent", record, ("latent",), rows)


def _neighborhoods():
    grid = lambda *shape: _alike(1, *shape, 2, 4)
    both = dict(window=(3, 2), stride=(2, 1), dilation=(2, 1), causal=(True, False))
    rows = {
        "one axis": grid(16) | dict(window=3),
        "strides, and a length that doesn't divide": grid(13) | dict(window=5, stride=3),
        "blocks": grid(16) | dict(window=4, stride=4),
        "two axes, dilated, causal along one": grid(11, 3) | both,
        "three axes": grid(9, 3, 2) | dict(window=(3, 2, 2)),
    }
    return Table("Neighborhoods", registry.get("gna"), ("halo",), rows)


def _swin():
    grid = _alike(1, 13, 5, 2, 4) | dict(bias=_normal(1, 2, 9, 9))
    rows = {f"{shift=}": grid | dict(window=3, shift=shift) for shift in (0, 1)}
    return Table("Windows that shift", registry.get("swin"), ("halo",), rows)


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
