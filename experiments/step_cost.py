"""What one training step costs: its time on this machine and its memory as compiled."""

import statistics
import time

import jax

from experiments import memory, placement


def measure(config, *, runs: int) -> dict[str, float]:
    """{"seconds": median of `runs` steps after a first, "memory": bytes on one device}."""
    placed, example = placement.prepare(config)
    state, batch = placed.init(), placed.put(example)
    step = placed.update.lower(state, batch).compile()
    used, times = memory.of_compiled(step), []
    for _ in range(runs + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "memory": used}
