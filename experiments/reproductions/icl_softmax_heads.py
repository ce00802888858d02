"""Two softmax heads of opposite sign do regression in context that one head can't.

Command: attnjax reproduce icl_softmax_heads
Minutes: about 2 on two cores.
Paper: He et al., "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic
Interpretability of Multi-Head Softmax Attention" (key icl-multi-head-softmax).

A trained head's products of queries and keys are w times the identity on the inputs x, and its
value is mu times the answer y, with the mu of all heads adding up to 0: so the layer predicts
sum_h mu_h sum_i softmax_i(w_h x . x_i) y_i, a step of gradient descent without its bias. Linear
attention, for comparison, has the scale 1/N of the prompts it was trained on.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import registry
from experiments import fitting
from experiments.finding import Finding
from experiments.reproductions import icl_regression


@dataclasses.dataclass(frozen=True)
class Config(icl_regression.Config):
    """One layer, with one head and with two."""

    dim: int = 5
    num_examples: int = 40
    batch_size: int = 256
    steps: int = 4000


def run(config: Config) -> list[Finding]:
    """Trains one head, two heads, and linear attention for comparison."""
    error, params, modules = {}, {}, {}
    scale = 1 / config.num_examples
    heads = lambda n: registry.get("multi_head_attention").module(
        num_heads=n, head_dim=config.dim + 1
    )
    linear = icl_regression.layer(config, fn=functools.partial(icl_regression.linear, scale=scale))
    for name, module in {"one head": heads(1), "two heads": heads(2), "linear": linear}.items():
        params[name], error[name] = icl_regression.train(module, config, name)
        modules[name] = module
    diagonal, balance = weights(params["two heads"]["params"], config.dim)
    longer = {
        name: at_length(modules[name], params[name], config, 2) for name in ("two heads", "linear")
    }
    rises = lambda name: f"{name}: {error[name]:.3f} to {longer[name]:.3f}"
    return [
        Finding(
            claim="two heads have a smaller error than one",
            expected="two heads < one head",
            seen=f"{error['two heads']:.3f} and {error['one head']:.3f}",
            agrees=error["two heads"] < 0.9 * error["one head"],
        ),
        Finding(
            claim="products of queries and keys become a multiple of the identity on x",
            expected="off the diagonal less than 15 % of it",
            seen=f"{100 * diagonal:.1f} %",
            agrees=diagonal < 0.15,
        ),
        Finding(
            claim="the values of the heads add up to 0",
            expected="|sum mu| less than 15 % of the largest",
            seen=f"{100 * balance:.1f} %",
            agrees=balance < 0.15,
        ),
        Finding(
            claim="with twice the examples softmax gets no worse, and linear attention does",
            expected="two heads fall or stay, linear rises",
            seen=f"{rises('two heads')}, {rises('linear')}",
            agrees=longer["two heads"] <= error["two heads"] and longer["linear"] > error["linear"],
        ),
    ]


def weights(params, dim: int) -> tuple[float, float]:
    """(off-diagonal share of the products on x, imbalance of the values), over all heads."""
    params = jax.device_get(params)
    q, k, v = (params[name]["heads"]["kernel"] for name in ("query", "key", "value"))
    products = np.einsum("DNH,ENH->NDE", q, k)[:, :dim, :dim]
    on = np.abs(np.diagonal(products, axis1=1, axis2=2)).mean()
    off = np.abs(products * (1 - np.eye(dim))).sum() / (len(products) * dim * (dim - 1))
    mu = np.einsum("NV,NV->N", v[-1], params["out"]["merge"]["kernel"][..., -1])
    return float(off / on), float(np.abs(mu.sum()) / np.abs(mu).max())


def at_length(module, params, config, times: int) -> float:
    """Mean squared error with so many times the examples of the training."""
    count = times * config.num_examples
    prompts = functools.partial(icl_regression.draw, batch_size=config.batch_size, dim=config.dim,
                                num_examples=count)  # fmt: skip
    loss = lambda params, x, y: jnp.mean((icl_regression.predict(module, params, x) - y) ** 2)
    return fitting.mean_loss(loss, params, prompts, batches=100, seed=config.seed + 2)
