"""Cells of the context-parallel benchmark: what there is to compare, and the program of each.

Nothing is listed here: functions and strategies are those of `parallel.matrix`, implementations on
one device those that a function's annotation names.
"""

import dataclasses
import functools
import importlib
import inspect
import itertools
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax import parallel
from attnjax.core import registry, sharding
from attnjax.parallel import matrix
from experiments import targets
from experiments.context_benchmark import masks

_AXES = dict(q="BTNH", k="BSKH", v="BSKH", do="BTNH")
_SIMULATED = "interpret"  # runs a kernel of another platform: its time is no kernel's


class Sizes(NamedTuple):
    """Of queries, keys and values of one example, (1 T N H) and (1 T K H)."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """One function with its gradients: by a strategy on several devices, or whole on one."""

    function: str
    strategy: str | None
    implementation: str | None  # on one device; None is what the function chooses
    mask: str
    length: int
    devices: int

    def __str__(self):
        where = f"{self.strategy}, {self.devices} devices" if self.strategy else "one device"
        how = f"{where}, {self.implementation}" if self.implementation else where
        return f"{self.function}, {self.mask}, {self.length:,} tokens: {how}"


@functools.cache
def functions() -> dict[str, tuple[registry.Mechanism, tuple[str, ...]]]:
    """(record, strategies with options) of what takes q, k, v and a mask and needs no more."""
    found = {}
    for table in matrix.tables():
        name, known = table.record.fn.__name__, parallel.strategies(table.record)
        if _takes_a_mask_alone(table.record.fn):
            _, before = found.get(name, (None, ()))
            found[name] = table.record, tuple(dict.fromkeys((*before, *table.strategies, *known)))
    return found


def _takes_a_mask_alone(fn):
    parameters = inspect.signature(fn).parameters
    needed = [name for name, x in parameters.items() if x.default is x.empty]
    return needed == ["q", "k", "v"] and "mask" in parameters


def implementations(fn: Callable) -> tuple[str | None, ...]:
    """None, which lets a function choose, and those that can be asked for."""
    kinds = typing.get_args(inspect.signature(fn).parameters["implementation"].annotation)
    names = itertools.chain.from_iterable(map(typing.get_args, kinds))
    return None, *(name for name in names if name != _SIMULATED)


def of(
    function: str, mask: str, length: int, devices: Sequence[int], only: Sequence[str] = ()
) -> list[Cell]:
    """Cells of a function: first the one on one device to which the others are compared.

    only: strategies and implementations of interest; all where there is none. A function that has
    none of them has no cells.
    """
    record, strategies = functions()[function]
    about = dict(function=function, mask=mask, length=length)
    wanted = lambda names: [name for name in names if name is None or not only or name in only]
    whole = [
        Cell(strategy=None, implementation=name, devices=1, **about)
        for name in wanted(implementations(record.fn))
    ]
    spread = [
        Cell(strategy=name, implementation=None, devices=size, **about)
        for name in wanted(strategies)
        for size in devices
    ]
    return whole + spread if len(whole + spread) > 1 else []


def ways() -> tuple[str, ...]:
    """Every strategy and implementation that there is."""
    of_all = (
        (*implementations(record.fn)[1:], *strategies)
        for record, strategies in functions().values()
    )
    return tuple(dict.fromkeys(itertools.chain.from_iterable(of_all)))


class Program(NamedTuple):
    """What a cell computes, and the shapes of its arguments, in their places."""

    step: Callable  # (arrays, arrays of the mask) -> output and gradients
    shapes: tuple[Any, ...]
    mesh: jax.sharding.Mesh

    @classmethod
    def of(cls, cell: Cell, sizes: Sizes, devices: Sequence[jax.Device]) -> "Program":
        """On the first of `devices`."""
        record, _ = functions()[cell.function]
        mesh = sharding.make_mesh(context=cell.devices, devices=devices[: cell.devices])
        options = _options(record.fn, cell)
        fn = parallel.shard(cell.strategy, record, mesh) if cell.strategy else record.fn
        tree = jax.tree.structure(masks.by_name(cell.length)[cell.mask])

        def step(arrays, leaves):
            attend = lambda q, k, v: fn(q, k, v, mask=tree.unflatten(leaves), **options)
            out, pull = jax.vjp(attend, *(arrays[name] for name in "qkv"))
            return out, *pull(arrays["do"])

        return cls(step, _shapes(cell, sizes, mesh), mesh)

    def compile(self, target: str = "") -> jax.stages.Compiled:
        """For this machine or a target; raises what a strategy or a compiler says against it."""
        # so that nothing traced takes all devices of this process for those of the program
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            if target:
                return targets.compile_for(target, self.step, *self.shapes)
            return jax.jit(self.step).lower(*self.shapes).compile()

    def put(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments in their places."""
        return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), args, self.shapes)


def _options(fn, cell):
    """Blocks that are chosen are 64 in a sequence, whatever its length."""
    chosen = "block" in inspect.signature(fn).parameters
    options = dict(block=max(cell.length // 64, 1)) if chosen else {}
    return options | ({} if cell.strategy else dict(implementation=cell.implementation))


def _shapes(cell, sizes, mesh):
    lengths = dict(B=1, T=cell.length, S=cell.length, H=sizes.head_dim)
    lengths |= dict(N=sizes.heads, K=sizes.kv_heads)
    # as the strategy holds them, so that it needn't move them first
    over = _module(cell.strategy).STRATEGY.over if cell.strategy else ()
    split = lambda a: "context" if a in over and lengths[a] % cell.devices == 0 else None
    arrays = {
        name: jax.ShapeDtypeStruct(
            tuple(lengths[a] for a in axes),
            sizes.dtype,
            sharding=NamedSharding(mesh, P(*map(split, axes))),
        )
        for name, axes in _AXES.items()
    }
    everywhere = NamedSharding(mesh, P())
    leaves = jax.tree.leaves(masks.by_name(cell.length)[cell.mask])
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    return arrays, list(map(shape, leaves))


def _module(strategy):
    return importlib.import_module(f"attnjax.parallel.{registry.parse_call(strategy)[0]}")


def arguments(cell: Cell, sizes: Sizes) -> tuple[dict[str, np.ndarray], list[jax.Array]]:
    """(arrays, arrays of the mask) of a cell, the same for all of its length."""
    rng = np.random.default_rng(0)
    heads = lambda name: sizes.heads if "N" in _AXES[name] else sizes.kv_heads
    draw = lambda name: rng.normal(size=(1, cell.length, heads(name), sizes.head_dim))
    arrays = {name: draw(name).astype(sizes.dtype) for name in _AXES}
    return arrays, jax.tree.leaves(masks.by_name(cell.length)[cell.mask])
