import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.tasks import icl_regression as task
from experiments import fitting, reproduce
from experiments.finding import Finding
from experiments.reproductions import icl_regression, icl_softmax_heads, rank_of_heads

FEWER = {  # of models, and of their parts, to compile
    "copy_state": ["--head-dims", "2"],
    "recall_of_paper": ["--vocab-size", "64", "--num-pairs", "2"],
    "softmax_limits": ["--tops", "1", "4", "--lengths", "8", "16"],
}


@pytest.mark.parametrize("name", reproduce.names())
def test_a_short_run_says_what_it_found(name, tmp_path, capsys):
    """A few steps agree with no paper, and the exit code says so."""
    options = ["--steps", "3", "--batch-size", "8", "--out", str(tmp_path)]
    assert reproduce.main([name, *options, *FEWER.get(name, [])]) == 1
    page = json.loads((tmp_path / f"{name}.json").read_text())
    assert page["config"]["steps"] == 3 and not all(x["agrees"] for x in page["findings"])
    text = (tmp_path / "README.md").read_text()
    assert all(x["claim"] in text for x in page["findings"]) and "**no**" in text
    assert page["findings"][0]["seen"].split()[0] in capsys.readouterr().out


def test_every_reproduction_says_its_command_minutes_and_paper():
    for name in reproduce.names():
        module = reproduce.load(name)
        assert f"attnjax reproduce {name}" in module.__doc__ and "Minutes: " in module.__doc__
        assert "Paper" in module.__doc__ and dataclasses.is_dataclass(module.Config)


def test_all_findings_are_on_one_page(tmp_path):
    findings = [Finding(claim="a claim", expected="|x|", seen="2", agrees=False)]
    for name in ("rank_of_heads", "icl_regression"):
        reproduce.write(name, reproduce.load(name).Config(), findings, 90.0, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.index("## icl_regression") < text.index("## rank_of_heads")
    assert text.count(r"| a claim | \|x\| | 2 | **no** |") == 2 and "1.5 minutes" in text


def test_wrong_names_are_one_line(capsys):
    assert reproduce.main(["icl_regresion"]) == 2
    assert "did you mean icl_regression" in capsys.readouterr().err
    assert reproduce.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in reproduce.names())


def test_weights_by_hand_reach_the_optimum():
    """The step of gradient descent that theory names, as weights of the layer that is trained."""
    config = icl_regression.Config(dim=3, num_examples=8)
    module = icl_regression.layer(
        config, fn=lambda *qkv, mask=None: icl_regression.linear(*qkv, scale=1 / 8)
    )
    draw = lambda key: icl_regression.draw(key, batch_size=4096, dim=3, num_examples=8)
    inputs, answer = (np.diag(np.array(x, np.float32)) for x in ([1, 1, 1, 0], [0, 0, 0, 1]))
    step = 8 / (8 + 3 + 1)
    weights = {"query": inputs, "key": inputs, "value": answer}
    params = {name: {"heads": {"kernel": x[:, None]}} for name, x in weights.items()} | {
        "out": {"merge": {"kernel": step * answer[None]}}
    }
    loss = lambda params, x, y: jnp.mean((icl_regression.predict(module, params, x) - y) ** 2)
    error = fitting.mean_loss(loss, {"params": params}, draw, batches=50, seed=1)
    assert abs(error / task.one_step_error(3, 8) - 1) < 0.02


def test_weights_of_heads_are_read():
    head = np.eye(4)[:, None]
    both = np.concatenate([head, head], 1)
    signs = np.array([1.0, -1.0])[:, None, None] * np.eye(4)
    params = {name: {"heads": {"kernel": both}} for name in ("query", "key", "value")}
    params["out"] = {"merge": {"kernel": signs}}
    assert icl_softmax_heads.weights(params, 3) == (0, 0)
    params["out"] = {"merge": {"kernel": np.abs(signs)}}
    params["key"] = {"heads": {"kernel": np.ones((4, 2, 4))}}
    assert icl_softmax_heads.weights(params, 3) == (1, 2)


def test_the_nearest_point_is_the_answer():
    draw = jax.jit(lambda key: rank_of_heads.draw(key, batch_size=20, dim=4, num_points=5))
    query, points, nearest = jax.device_get(draw(jax.random.key(0)))
    distance = np.linalg.norm(points - query[:, None], axis=-1)
    np.testing.assert_allclose(
        distance.min(1), np.linalg.norm(nearest - query, axis=-1), rtol=1e-5, atol=1e-6
    )


def test_a_fit_finds_the_least_squares_and_stops_at_nan():
    draw = lambda key: (jax.random.normal(key, (16, 2)),)
    loss = lambda w, x: jnp.mean((x @ (w - jnp.array([1.0, -2.0]))) ** 2)
    w = fitting.fit(loss, jnp.zeros(2), draw, steps=300, learning_rate=0.1)
    assert jnp.allclose(w, jnp.array([1.0, -2.0]), atol=1e-3)
    with pytest.raises(FloatingPointError, match="broken"):
        bad = lambda w, x: loss(w, x) / 0
        fitting.fit(bad, jnp.zeros(2), draw, steps=3, learning_rate=0.1, label="broken")
