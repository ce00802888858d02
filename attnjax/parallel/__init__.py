"""Parallelism within attention as transforms of a pure function: one strategy a file.

    fn = parallel.shard("ring(order='zigzag')", registry.get("gqa"), mesh)
    o = jax.jit(fn)(q, k, v, mask=masks.Causal())        # as gqa(q, k, v, ...), T over four devices
    models.create("lm", ..., parallel=functools.partial(parallel.shard, None, mesh=mesh))

Arrays are global. Within, each device holds a piece of batch (mesh axes data, fsdp), sequence
(context) and heads (tensor); which axis is which is read off the function's annotations.
What each strategy honours: docs/context_parallelism.md.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

import jax

from attnjax.core import registry
from attnjax.parallel import indices, layout, losses, split


def shard(
    strategy: str | None,
    record: registry.Record,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    *,
    axis: str = "context",
    by_tokens: bool = True,
) -> Callable:
    """`record.fn` with its sequence split over the mesh axis `axis`: same arguments, same result.

    strategy is a name with options; None is the first that the record names. `tensor` splits heads
    in the place of the sequence, and `latent` the slices of a latent. A length that doesn't divide
    is filled up within; a batch or heads that don't divide are kept whole in each device.

    `tensor` and `latent` are told with by_tokens=False that arrays come, and the output goes, with
    heads or slices over the axis: then nothing is sent. Else tokens lie over it outside, and the
    compiler is told so. It must be: where it finds out by itself (XLA of jax 0.11.2 to 0.12.0.1), a
    projection of heads with one matrix for all of them has wrong gradients.

    Raises ValueError for a strategy that is none of the record's `strategies`, an option that it
    hasn't, an axis that the mesh lacks, by_tokens=False of a strategy that splits tokens, or a
    record that is no mechanism. The new function raises NotImplementedError for arguments that the
    strategy can't honour, saying what would work.
    """
    local = _load(strategy, record)
    if axis not in mesh.shape:
        raise ValueError(f"{axis=} must be one of the mesh's {', '.join(mesh.axis_names)}")
    splits_tokens = local.over == split.TOKENS
    if splits_tokens and not by_tokens:
        raise ValueError(f"by_tokens=False is for tensor and latent: {strategy} splits tokens")

    @functools.wraps(record.fn)
    def sharded(*args, **options):
        call = split.bind(record.fn, args, options)
        multiple = local.multiple(mesh.shape[axis], call)
        places = layout.Places(mesh, axis, call, multiple=multiple, over=local.over)
        local.check(record, call, places)
        outside = places.by_tokens if by_tokens and not splits_tokens else lambda x, _: x
        arrays = {name: outside(x, call.letters[name]) for name, x in call.arrays.items()}
        call = places.fill_up(call._replace(arrays=arrays))
        leaves, tree = jax.tree.flatten(call.mask)

        def body(arrays, leaves):
            first = dict(batch=places.first("B"), head=places.first("N"))
            options = indices.shifted(call.options, **first)
            options = losses.shared(options, places.share("B", "N"))
            mask = tree.unflatten(leaves)
            here = call._replace(arrays=arrays, mask=mask, options=options)
            return local.run(record, here, places)

        specs = places.of_arrays(call), places.of_mask(call.mask)
        run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=places.of_output(call))
        out = places.cut(run(call.arrays, leaves), call)
        if isinstance(out, tuple):  # with a state
            return outside(out[0], call.letters["return"]), *out[1:]
        return outside(out, call.letters["return"])

    return sharded


def strategies(record: registry.Mechanism) -> tuple[str, ...]:
    """Those that a record names, and `tensor` where `all_to_all` is one: it asks the same of it."""
    return record.context + (("tensor",) if "all_to_all" in record.context else ())


def _load(text, record):
    name = record.fn.__name__
    if not isinstance(record, registry.Mechanism):
        raise ValueError(
            f"{name} is no mechanism and names no strategy; where its heads don't know of each "
            f"other, dataclasses.replace(registry.get('multi_head_attention'), fn={name}, "
            "context=('all_to_all',)) does"
        )
    if not record.context:
        known = registry.of_kind(registry.Mechanism).items()
        others = [name for name, record in known if record.context][:4]
        raise ValueError(f"{name} has no strategy of context parallelism; {', '.join(others)} have")
    strategy, options = registry.parse_call(record.context[0] if text is None else text)
    if strategy not in strategies(record):
        raise ValueError(f"{strategy=} must be one of {name}'s: {', '.join(strategies(record))}")
    parts = importlib.import_module(f"attnjax.parallel.{strategy}").STRATEGY
    parameters = inspect.signature(parts.run).parameters.values()
    choices = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in choices:
            nearest = registry.nearest(option, choices)
            raise ValueError(f"{strategy} has no option {option!r}{nearest}")
    steps = {name: getattr(parts, name) for name in ("check", "run", "multiple")}
    return parts._replace(**{n: functools.partial(fn, **options) for n, fn in steps.items()})


@functools.cache
def papers() -> dict[str, tuple[str, ...]]:
    """The papers of each strategy, by a name as in "parallel.ring"."""
    names = [f"parallel.{module.name}" for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"attnjax.{name}") for name in names}
    return {name: x.STRATEGY.papers for name, x in modules.items() if hasattr(x, "STRATEGY")}
