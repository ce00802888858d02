"""Settings of every test: strict shapes and dtypes, four CPU devices, and `tests.settings`."""

import jax

from tests import settings

settings.settle()
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    settings.collect_less_garbage()
