"""Memory of one training step as XLA compiles it."""

import jax
import numpy as np

from experiments import placement


def of_a_step(config) -> int:
    """Bytes that one device needs for arguments and temporaries of an update."""
    placed, example = placement.prepare(config)
    batch = jax.tree.map(np.asarray, placed.put(example)) if config.parallel == "pmap" else (
        placed.put(example)
    )  # fmt: skip
    return of_compiled(placed.update.lower(placed.target, batch).compile())


def of_compiled(step) -> int:
    """Bytes that one device needs for arguments and temporaries of a compiled function."""
    used = step.memory_analysis()
    return used.temp_size_in_bytes + used.argument_size_in_bytes
