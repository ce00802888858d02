"""Only what is particular to Mamba: its limits, and that it chooses by content."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.ssm import mamba as lib
from tests.initial import initial

KEY = jax.random.key(0)
ARGS = initial(lambda key: lib.SPEC.example(key, 12), KEY)
CONSTANT = jnp.zeros((2, 4, 7)).at[:, 0].set(ARGS["select"][:, 0])  # all is chosen by channel 0


def test_where_tokens_choose_alike_it_is_a_convolution():
    """Channel 0 is 1 at every token, and it alone chooses: what is left is S4, with the kernel
    K_s = delta sum_m b_m c_m exp(s delta rate_m)."""
    args = ARGS | dict(u=ARGS["u"].at[..., 0].set(1), select=CONSTANT)

    @jax.jit
    def run():
        r, b, c = jnp.split(args["select"][:, 0], [1, 4], -1)
        delta = jax.nn.softplus(jnp.einsum("NR,NRH->NH", r, args["widen"]) + args["bias"])
        rate = -jnp.exp(args["log_rate"])
        lag = jnp.arange(12)[:, None] - jnp.arange(12)[None]
        powers = jnp.exp(jnp.einsum("TS,NH,NHM->TSNHM", jnp.maximum(lag, 0), delta, rate))
        kernel = jnp.einsum("TSNHM,NM,NM,NH->TSNH", powers, b, c, delta)
        kernel = jnp.where((lag >= 0)[..., None, None], kernel, 0)
        y = jnp.einsum("TSNH,BSNH->BTNH", kernel, args["u"]) + args["skip"][None, None] * args["u"]
        return lib.mamba(**args), y

    chex.assert_trees_all_close(*run(), rtol=1e-4, atol=1e-5)


def test_one_entry_of_rate_one_is_a_gated_recurrence():
    """Theorem 1: the state keeps 1 - sigmoid(z) of itself, where delta = softplus(z)."""
    args = ARGS | dict(select=ARGS["select"][..., :3], log_rate=jnp.zeros((2, 4, 1)))

    @jax.jit
    def run():
        r, b, c = jnp.split(jnp.einsum("BTNH,NHF->BTNF", args["u"], args["select"]), 3, -1)
        z = jnp.einsum("BTNR,NRH->BTNH", r, args["widen"]) + args["bias"][None, None]

        def step(h, x):
            z, u, b, c = x
            h = (1 - jax.nn.sigmoid(z)) * h + jax.nn.softplus(z) * u * b
            return h, h * c + args["skip"][None] * u

        xs = [x.swapaxes(0, 1) for x in (z, args["u"], b, c)]
        return lib.mamba(**args), jax.lax.scan(step, jnp.zeros((2, 2, 4)), xs)[1].swapaxes(0, 1)

    chex.assert_trees_all_close(*run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen", [True, False], ids=["selective", "not selective"])
def test_it_passes_over_tokens_that_say_so(chosen):
    """Noise between the tokens, told by the sign of channel 0, changes nothing that comes after,
    which no recurrence with steps alike for all tokens can do: selective copying in one line."""
    few, noise = ARGS["u"][:, :6].at[..., 0].set(1), ARGS["u"][:, 6:].at[..., 0].set(-1)
    select = ARGS["select"].at[..., 0].set(jnp.array([1.0, 0, 0, 0]))  # r is channel 0
    widen, bias = jnp.full((2, 1, 4), 40.0 * chosen), jnp.full((2, 4), -40.0 * chosen)
    args = ARGS | dict(select=select, widen=widen, bias=bias)
    at = jnp.array([0, 2, 3, 7, 8, 11])
    mixed = jnp.zeros((2, 12, 2, 4)).at[:, at].set(few)
    mixed = mixed.at[:, jnp.array([1, 4, 5, 6, 9, 10])].set(noise)
    run = jax.jit(lambda u: lib.mamba(**args | dict(u=u)))
    difference = jnp.abs(run(mixed)[:, at] - run(few)).max()
    assert difference < 1e-5 if chosen else difference > 1e-2


def test_the_layer_is_its_equation():
    module, x = lib.Mamba(num_heads=1, head_dim=4, state=3), jax.random.normal(KEY, (2, 5, 4))
    params = jax.jit(module.init)(KEY, x)["params"]

    @jax.jit
    def expected():
        u = jnp.einsum("BTD,DNH->BTNH", x, params["input"]["project"]["heads"]["kernel"])
        padded = jnp.pad(u, ((0, 0), (3, 0), (0, 0), (0, 0)))
        kernel = params["input"]["conv"]["kernel"]["table"]
        u = jax.nn.silu(sum(padded[:, 3 - i : 8 - i] * kernel[i][None, None] for i in range(4)))
        names = "select", "widen", "bias", "log_rate", "skip"
        y = lib.mamba(u, *(params["selection"][name]["table"] for name in names))
        z = jnp.einsum("BTD,DNH->BTNH", x, params["gate"]["heads"]["kernel"])
        return jnp.einsum("BTNH,NHD->BTD", y * jax.nn.silu(z), params["out"]["merge"]["kernel"])

    actual = jax.jit(lambda: module.apply(dict(params=params), x))()
    chex.assert_trees_all_close(actual, expected(), rtol=1e-4, atol=1e-5)
