"""What a run would do, before anything is compiled."""

import math

import jax
import rich.console
import rich.table


def show(config, placed, example, mesh) -> None:
    """Prints shapes of a batch, every parameter with its place, the mesh and memory by device."""
    console = rich.console.Console(soft_wrap=True)
    console.print(f"task {config.task}, model {config.model}, mixers {', '.join(config.mixers)}")
    for name, x in example.items():
        console.print(f"batch {name}: {x.dtype} {list(x.shape)} on this host")
    console.print("mesh " + ", ".join(f"{name} {size}" for name, size in mesh.shape.items()))
    params = placed.target["params"]
    table = rich.table.Table()
    for name in ("parameter", "shape", "sharding", "numbers"):
        table.add_column(name, overflow="fold")
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        place = str(leaf.sharding.spec) if leaf.sharding is not None else "on every device"
        table.add_row(name, str(list(leaf.shape)), place, f"{leaf.size:,}")
    console.print(table)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(f"{count:,} parameters")
    parts = {"parameters": params, "optimiser": placed.target["opt_state"], "gradients": params}
    sizes = {name: bytes_per_device(tree) for name, tree in parts.items()}
    sizes["batch"] = sum(x.nbytes for x in example.values()) // jax.local_device_count()
    console.print("bytes on each device, without activations: " + ", ".join(
        f"{name} {size:,}" for name, size in (sizes | {"sum": sum(sizes.values())}).items()
    ))  # fmt: skip


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
