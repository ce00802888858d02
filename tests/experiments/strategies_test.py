"""A run of 50 steps has the loss of one device at each of them, whatever the strategy."""

import dataclasses

import numpy as np
import pytest

from tests.experiments import fifty_steps
from tests.experiments.fifty_steps import BATCHES, BOUND, LM, VIT


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        # lightning attention has no ring: beside one, it passes its state on
        (LM, "ring(order='zigzag')"),
        (LM, "ring(order='striped')"),
        (LM, "all_to_all"),
        (VIT, "halo"),
    ],
    ids=["zigzag and pass_state", "striped and pass_state", "all_to_all", "halo"],
)
def test_a_run_of_50_steps(config, strategy):
    init, expected, _ = fifty_steps.on_one_device(config)
    assert expected[-BATCHES:].mean() < 0.8 * expected[:BATCHES].mean()  # it learns
    actual = fifty_steps.on_several(dataclasses.replace(config, strategy=strategy), init)
    np.testing.assert_allclose(actual, expected, rtol=BOUND)
