"""Memory of one training step as XLA compiles it."""

import jax
import numpy as np

from experiments import config as configs
from experiments import evaluation, learning, placement


def of_a_step(config) -> int:
    """Bytes that one device needs for arguments and temporaries of an update."""
    _, source = configs.make_task(config.task, "train")
    mesh = placement.make_mesh(config)
    description = learning.model_description(config, source)
    model = learning.make_model(description, parallel=placement.context_parallel(mesh))
    example = next(evaluation.padded_batches(source, config.batch_size))
    placed = placement.place(config, model, example, mesh)
    batch = jax.tree.map(np.asarray, placed.put(example)) if config.parallel == "pmap" else (
        placed.put(example)
    )  # fmt: skip
    used = placed.update.lower(placed.target, batch).compile().memory_analysis()
    return used.temp_size_in_bytes + used.argument_size_in_bytes
