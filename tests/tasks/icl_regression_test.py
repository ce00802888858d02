import numpy as np
import pytest

from attnjax.tasks import icl_regression


def test_the_target_follows_from_the_examples():
    task = icl_regression.IclRegression("train", dim=3, num_examples=5)
    for example in (task[i] for i in range(20)):
        inputs = example["inputs"]
        assert inputs.shape == (6, 4) and inputs.dtype == np.float32
        assert example["target"].shape == () and example["target"].dtype == np.float32
        w = np.linalg.lstsq(inputs[:-1, :-1], inputs[:-1, -1])[0]
        np.testing.assert_allclose(inputs[-1, :-1] @ w, example["target"], rtol=2e-4, atol=2e-4)
        assert inputs[-1, -1] == 0


def test_inputs_and_maps_are_standard_normal():
    task = icl_regression.IclRegression("train", dim=4, num_examples=8)
    examples = [task[i] for i in range(2000)]
    x = np.stack([example["inputs"][:, :-1] for example in examples]).reshape(-1, 4)
    np.testing.assert_allclose(x.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(np.cov(x.T), np.eye(4), atol=0.06)
    targets = np.array([example["target"] for example in examples])
    assert np.isclose(np.mean(targets**2), 4, rtol=0.15)  # E (w . x)^2 = d


def test_one_step_error_is_the_least_of_all_steps():
    """The formula against a sample: the best step's error, and that no other step is better."""
    d, N = 5, 20
    task = icl_regression.IclRegression("train", dim=d, num_examples=N)
    examples = [task[i] for i in range(8000)]
    inputs = np.stack([example["inputs"] for example in examples])
    target = np.stack([example["target"] for example in examples])
    x, y, query = inputs[:, :-1, :-1], inputs[:, :-1, -1], inputs[:, -1, :-1]
    gradient = np.einsum("bnd,bn,bd->b", x, y, query) / N
    error = lambda step: np.mean((step * gradient - target) ** 2)
    best = N / (N + d + 1)
    assert np.isclose(error(best), icl_regression.one_step_error(d, N), rtol=0.05)
    assert error(best) < min(error(0.9 * best), error(1.1 * best))


@pytest.mark.parametrize("name", ["dim", "num_examples"])
def test_impossible_sizes(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        icl_regression.IclRegression("train", **{name: 0})


def test_baselines():
    assert icl_regression.baselines() == {"zero": 10.0, "one_gradient_step": 110 / 21}
