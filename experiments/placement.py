"""How a step is spread over devices: jit over a mesh of four axes, or pmap over data alone."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax import parallel
from attnjax.core import registry, sharding
from experiments import config as configs
from experiments import evaluation, learning

_ROWS = P(("data", "fsdp"))


class Placed(NamedTuple):
    """Functions of arrays that live where they belong."""

    init: Callable  # () -> state
    target: dict  # a state of shapes with shardings, to restore into
    update: Callable  # (state, batch) -> (state, metrics)
    sums: Callable  # (params, batch) -> sums of an evaluation
    rows: Callable  # () -> the rows of a batch that this process holds
    put: Callable  # host batch of those rows -> device batch


def make_mesh(config):
    """The mesh of a config; ValueError where its sizes don't fit the devices or the batch."""
    sizes, devices = config.mesh, len(jax.devices())
    rest = sizes.fsdp * sizes.context * sizes.tensor
    data = sizes.data or max(devices // rest, 1)
    mesh = sharding.make_mesh(
        data=data, fsdp=sizes.fsdp, context=sizes.context, tensor=sizes.tensor
    )
    pieces = data * sizes.fsdp * config.accumulate
    if config.batch_size % pieces:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {pieces} = "
            f"data * fsdp * accumulate"
        )
    if config.parallel == "pmap" and rest > 1:
        raise ValueError("parallel=pmap splits data alone: set mesh.fsdp, context and tensor to 1")
    if config.parallel == "pmap" and jax.process_count() > 1:
        raise ValueError("parallel=pmap is for one process: several need parallel=jit")
    return mesh


@functools.cache
def rows(mesh, batch_size: int) -> tuple[int, ...]:
    """Which rows of a batch the devices of this process hold, ascending.

    They needn't be neighbours, and where a sequence is spread over processes, several hold one.
    """
    places = NamedSharding(mesh, _ROWS).devices_indices_map((batch_size,))
    here = [at for device, (at,) in places.items() if device.process_index == jax.process_index()]
    return tuple(sorted({row for at in here for row in range(batch_size)[at]}))


def context_parallel(mesh, config=None):
    """What a model's mechanisms get as `parallel`: their function with its sequence sharded.

    ValueError where none of a config's mixers has the strategy that it names.
    """
    wanted = config.strategy if config else ""
    name = registry.parse_call(wanted)[0] if wanted else ""
    mixers = [registry.get(registry.parse(text)[0]) for text in config.mixers] if wanted else []
    if wanted and not any(name in parallel.strategies(record) for record in mixers):
        have = sorted({each for record in mixers for each in parallel.strategies(record)})
        raise ValueError(f"strategy={wanted!r} must be one of the mixers': {', '.join(have)}")
    if mesh.shape["context"] == 1:
        return None
    choose = lambda record: wanted if name in parallel.strategies(record) else None
    return lambda record: parallel.shard(choose(record), record, mesh)


def place(config, model, example, mesh) -> Placed:
    """A step for `config.parallel`, with the same results for either and for every mesh.

    What is the same but for the seed is compiled once in a process, and found again later. Raises
    ValueError for a sequence whose length isn't a multiple of the mesh's `context`.
    """
    optimiser = learning.optimizer(config)
    # the shapes of a whole batch and no numbers: every process compiles the same program
    blank = tuple((k, (config.batch_size, *x.shape[1:]), x.dtype) for k, x in example.items())
    axis = "data" if config.parallel == "pmap" else None
    functions = _functions(model, optimiser, blank, config.accumulate, config.label_smoothing, axis)
    seed = np.int64(config.seed)
    make = {"jit": _over_mesh, "pmap": _over_devices}[config.parallel]
    return make(config, functions, seed, optimiser, example, mesh)


class _Functions(NamedTuple):
    init: Callable  # seed -> state
    step: Callable  # (state, batch) -> (state, metrics)
    sums: Callable  # (params, batch, seed) -> sums of an evaluation


@functools.lru_cache
def _functions(model, optimiser, blank, accumulate, label_smoothing, axis) -> _Functions:
    """The same functions for the same arguments, as JAX knows a program by its function."""
    zeros = lambda: {name: jnp.zeros(shape, dtype) for name, shape, dtype in blank}
    return _Functions(
        init=lambda seed: learning.init_state(model, optimiser, zeros(), seed),
        step=functools.partial(
            learning.update,
            model,
            optimiser,
            accumulate=accumulate,
            label_smoothing=label_smoothing,
            axis=axis,
        ),
        sums=functools.partial(_sums, model, axis),
    )


def _sums(model, axis, params, batch, seed):
    sums = learning.loss_sums(model, params, batch, jax.random.key(seed))[1]
    return sums if axis is None else jax.lax.psum(sums, axis)


def prepare(config):
    """(a config's step in its place, a host batch of its first examples); nothing is computed."""
    _, source = configs.make_task(config.task, "train")
    mesh = make_mesh(config)
    description = learning.model_description(config, source)
    model = learning.make_model(description, parallel=context_parallel(mesh, config))
    example = next(evaluation.padded_batches(source, config.batch_size))
    return place(config, model, example, mesh), example


def _over_mesh(config, functions, seed, optimiser, example, mesh) -> Placed:
    specs = {name: batch_spec(name, x) for name, x in example.items()}
    spread = (x for name, x in example.items() if specs[name] is sharding.BATCH)
    for length in {x.shape[1] for x in spread}:
        _assert_divides(length, mesh.shape["context"])
    shapes = jax.eval_shape(functions.init, seed)
    whole = NamedSharding(mesh, P())
    params = sharding.shardings(mesh, shapes["params"])
    opt_state = optax.tree.map_params(
        optimiser, lambda _, s: s, shapes["opt_state"], params, transform_non_params=lambda _: whole
    )
    places = dict(params=params, opt_state=opt_state, step=whole, key=whole)
    batch_places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    held = functools.partial(rows, mesh, config.batch_size)

    def put(batch):
        place = lambda name: batch_places.get(name, NamedSharding(mesh, _ROWS))
        return {
            name: _global(x, place(name), held(), config.batch_size) for name, x in batch.items()
        }

    place = lambda shape, at: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at)
    init = jax.jit(functions.init, out_shardings=places)
    sums = jax.jit(functions.sums, out_shardings=whole)
    return Placed(
        init=lambda: init(seed),
        target=jax.tree.map(place, shapes, places),
        update=jax.jit(functions.step, donate_argnums=0, out_shardings=(places, whole)),
        sums=lambda params, batch: sums(params, batch, seed),
        rows=held,
        put=put,
    )


def batch_spec(name, x):
    """Where a batch's array `name` lives: rows over data, positions of a sequence over context."""
    sequence = name in ("inputs", "targets", "weights") and x.ndim > 1
    return sharding.BATCH if sequence else _ROWS


def _assert_divides(length, pieces):
    if length % pieces:
        near = length // pieces * pieces
        raise ValueError(
            f"a sequence of {length} tokens must be a multiple of context={pieces}: "
            f"take {near or pieces} or {near + pieces}"
        )


def _global(x, place, rows, batch_size) -> jax.Array:
    """The array of a whole batch, of which `x` holds `rows`."""

    def part(index):
        wanted = range(batch_size)[index[0]]
        first = rows.index(wanted.start)
        return x[(slice(first, first + len(wanted)), *index[1:])]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), place, part)


def _over_devices(config, functions, seed, optimiser, example, mesh) -> Placed:
    count = jax.local_device_count()

    def put(batch):
        return jax.tree.map(lambda x: np.reshape(x, (count, -1, *x.shape[1:])), batch)

    mapped = functools.partial(jax.pmap, axis_name="data", out_axes=None)
    sums = mapped(functions.sums, in_axes=(None, 0, None))
    return Placed(
        init=lambda: jax.jit(functions.init)(seed),
        target=jax.eval_shape(functions.init, seed),
        update=mapped(functions.step, in_axes=(None, 0)),
        sums=lambda params, batch: sums(params, batch, seed),
        rows=lambda: range(config.batch_size),
        put=put,
    )
