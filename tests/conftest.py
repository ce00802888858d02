"""Settings of every test: strict shapes and dtypes, four CPU devices, quick compilation."""

import gc

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_include_full_tracebacks_in_locations", False)  # a fifth less to compile


def pytest_collection_finish():
    """What is imported by now stays, so the garbage collector need not go through it again.

    Tracing makes many small objects and few cycles: by default it would look for those too often.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
