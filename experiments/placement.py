"""How a step is spread over devices: jit over a mesh of four axes, or pmap over data alone."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax import parallel
from attnjax.core import registry, sharding
from experiments import config as configs
from experiments import evaluation, learning


class Placed(NamedTuple):
    """Functions of arrays that live where they belong."""

    init: Callable  # () -> state
    target: dict  # a state of shapes with shardings, to restore into
    update: Callable  # (state, batch) -> (state, metrics)
    sums: Callable  # (params, batch) -> sums of an evaluation
    put: Callable  # host batch -> device batch


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
    return mesh


def context_parallel(mesh, config=None):
    """What a model's mechanisms get as `parallel`: their function with its sequence sharded.

    ValueError where none of a config's mixers has the strategy that it names.
    """
    wanted = config.strategy if config else ""
    name = registry.parse_call(wanted)[0] if wanted else ""
    mixers = [registry.get(registry.parse(text)[0]) for text in config.mixers] if wanted else []
    if wanted and not any(name in record.context for record in mixers):
        have = sorted({each for record in mixers for each in record.context})
        raise ValueError(f"strategy={wanted!r} must be one of the mixers': {', '.join(have)}")
    if mesh.shape["context"] == 1:
        return None
    choose = lambda record: wanted if name in record.context else None
    return lambda record: parallel.shard(choose(record), record, mesh)


def place(config, model, example, mesh) -> Placed:
    """A step for `config.parallel`, with the same results for either and for every mesh."""
    optimiser = learning.optimizer(config)
    init = functools.partial(learning.init_state, model, optimiser, example, config.seed)
    step = functools.partial(
        learning.update,
        model,
        optimiser,
        accumulate=config.accumulate,
        label_smoothing=config.label_smoothing,
    )
    key = jax.random.key(config.seed)
    sums = lambda params, batch: learning.loss_sums(model, params, batch, key)[1]
    make = {"jit": _over_mesh, "pmap": _over_devices}[config.parallel]
    return make(init, step, sums, optimiser, example, mesh)


def prepare(config):
    """(a config's step in its place, a host batch of its first examples); nothing is computed."""
    _, source = configs.make_task(config.task, "train")
    mesh = make_mesh(config)
    description = learning.model_description(config, source)
    model = learning.make_model(description, parallel=context_parallel(mesh, config))
    example = next(evaluation.padded_batches(source, config.batch_size))
    return place(config, model, example, mesh), example


def _over_mesh(init, step, sums, optimiser, example, mesh) -> Placed:
    shapes = jax.eval_shape(init)
    whole = NamedSharding(mesh, P())
    params = sharding.shardings(mesh, shapes["params"])
    opt_state = optax.tree.map_params(
        optimiser, lambda _, s: s, shapes["opt_state"], params, transform_non_params=lambda _: whole
    )
    places = dict(params=params, opt_state=opt_state, step=whole, key=whole)
    batch_places = {k: NamedSharding(mesh, batch_spec(k, x)) for k, x in example.items()}

    def put(batch):
        place = lambda name: batch_places.get(name, NamedSharding(mesh, P(("data", "fsdp"))))
        return {
            name: jax.make_array_from_process_local_data(place(name), x)
            for name, x in batch.items()
        }

    place = lambda shape, at: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at)
    return Placed(
        init=jax.jit(init, out_shardings=places),
        target=jax.tree.map(place, shapes, places),
        update=jax.jit(step, donate_argnums=0, out_shardings=(places, whole)),
        sums=jax.jit(sums, out_shardings=whole),
        put=put,
    )


def batch_spec(name, x):
    return sharding.BATCH if name in ("inputs", "targets", "weights") and x.ndim > 1 else P(
        ("data", "fsdp")
    )  # fmt: skip


def _over_devices(init, step, sums, optimiser, example, mesh) -> Placed:
    count = jax.local_device_count()

    def put(batch):
        return jax.tree.map(lambda x: np.reshape(x, (count, -1, *x.shape[1:])), batch)

    mapped = dict(axis_name="data", in_axes=(None, 0), out_axes=None)
    add = lambda params, batch: jax.lax.psum(sums(params, batch), "data")
    return Placed(
        init=jax.jit(init),
        target=jax.eval_shape(init),
        update=jax.pmap(functools.partial(step, axis="data"), **mapped),
        sums=jax.pmap(add, **mapped),
        put=put,
    )
