"""A tiny run that ends well only when it is told to; the tests call it in a process to signal."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpointing, preemption


def initial_state():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    zeros = np.zeros((8, 3), np.float32)
    return {"w": jax.make_array_from_callback(zeros.shape, sharding, lambda index: zeros[index])}


def run(directory: str, address: str = "", index: int = 0) -> int:
    """The exit status; with the coordinator's `address`, that of one process of two."""
    warnings.simplefilter("error")
    if address:
        jax.distributed.initialize(address, num_processes=2, process_id=index)
    state = initial_state()
    advance = jax.jit(lambda w: w + jnp.float32(1))
    run = checkpointing.Checkpointer(directory, fingerprint={}, save_every=20)
    with run as checkpointer, preemption.Preemption() as preempted:
        restored = checkpointer.restore_latest_valid(state)
        state, first = (restored.state, restored.step + 1) if restored else (state, 1)
        for step in range(first, first + 4000):
            state = {"w": advance(state["w"])}
            if preempted.requested(step):
                checkpointer.save(step, state, {"next": step})
                checkpointer.close()
                print(preempted.message(step), flush=True)
                return 0
            if step == first:
                print("running", flush=True)
            time.sleep(0.005)
    return 1
