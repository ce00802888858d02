"""Context parallelism as transforms of a pure function: one strategy a file.

    fn = parallel.shard("ring", registry.get("gqa"), mesh)
    o = jax.jit(fn)(q, k, v, mask=masks.Causal())        # as gqa(q, k, v, ...), T over four devices
    models.create("lm", ..., parallel=functools.partial(parallel.shard, None, mesh=mesh))

Arrays are global. Within, each device holds a piece of batch (mesh axes data, fsdp), sequence
(context) and heads (tensor); which axis is which is read off the function's annotations.
"""

import functools
import importlib
from collections.abc import Callable

import jax

from attnjax.core import registry
from attnjax.parallel import split


def shard(
    strategy: str | None,
    record: registry.Mechanism,
    mesh: jax.sharding.Mesh,
    *,
    axis: str = "context",
) -> Callable:
    """`record.fn` with its sequence split over the mesh axis `axis`: same arguments, same result.

    strategy None is the first that the record names. A length that doesn't divide is filled up
    within; a batch or heads that don't divide are kept whole in each device.

    Raises ValueError for a strategy that the record doesn't name or an axis that the mesh lacks.
    The new function raises NotImplementedError for arguments that the strategy can't honour.
    """
    local = _load(strategy, record)
    if axis not in mesh.shape:
        raise ValueError(f"{axis=} must be one of the mesh's {', '.join(mesh.axis_names)}")

    @functools.wraps(record.fn)
    def sharded(*args, **options):
        call = split.bind(record.fn, args, options)
        local.check(record, call)
        places = split.Places(mesh, axis, call)
        call = places.fill_up(call)
        leaves, tree = jax.tree.flatten(call.mask)

        def body(arrays, leaves):
            here = call._replace(arrays=arrays, mask=tree.unflatten(leaves))
            return local.run(record, here, axis=axis, lengths=places.sizes)

        specs = places.of_arrays(call), places.of_mask(call.mask)
        run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=places.of_output(call))
        return places.cut(run(call.arrays, leaves), call)

    return sharded


def _load(strategy, record):
    name = record.fn.__name__
    if not record.context:
        known = registry.of_kind(registry.Mechanism).items()
        others = [name for name, record in known if record.context][:4]
        raise ValueError(f"{name} has no strategy of context parallelism; {', '.join(others)} have")
    strategy = record.context[0] if strategy is None else strategy
    if strategy not in record.context:
        raise ValueError(f"{strategy=} must be one of {name}'s: {', '.join(record.context)}")
    return importlib.import_module(f"attnjax.parallel.{strategy}").STRATEGY
