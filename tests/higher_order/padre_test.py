"""PADRe: of exactly its degree, linear where that is 1, and others' modulation where it is 2."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.higher_order.padre import SPEC, Padre, padre

KEY = jax.random.key(0)
run = jax.jit(padre)


def whole_numbers(degree):
    """Arguments of small whole numbers: then float32 rounds nothing."""
    args = SPEC.example(KEY, 4)
    small = {name: jnp.sign(jnp.round(x)) for name, x in args.items()}
    sizes = dict(a=degree, b=degree, w=degree, c=degree - 1, d=degree - 1)
    return small | {name: small[name][:size] for name, size in sizes.items()}


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_is_a_polynomial_of_exactly_its_degree(degree):
    """Along a line, the differences of order degree + 1 are zero and those before are constant."""
    args = whole_numbers(degree)
    step = jax.random.randint(KEY, args["x"].shape, -1, 2)
    line = jax.vmap(lambda s: padre(**(args | dict(x=args["x"] + s * step))))
    values = np.asarray(jax.jit(line)(jnp.arange(-2.0, 4)))
    assert np.abs(values).max() < 2**24
    last = np.diff(values, degree, axis=0)
    assert last.any() and (last == last[:1]).all()


def test_terms_of_degree_i_scale_like_the_power_i():
    args = SPEC.example(KEY, 4)
    for i in range(3):
        alone = args | dict(w=args["w"] * (jnp.arange(3) == i)[:, None], bias=jnp.zeros(4))
        doubled = alone | dict(x=2 * args["x"])  # what rounds nothing
        chex.assert_trees_all_equal(run(**doubled), 2 ** (i + 1) * run(**alone))


def identity(degree, D, side=1):
    kernel = jnp.zeros((side, side, D)).at[side // 2, side // 2].set(1.0)
    many = lambda x, count: jnp.stack([x] * count) if count else jnp.zeros((0, *x.shape))
    a, c = many(kernel, degree), many(kernel, degree - 1)
    return dict(a=a, b=many(jnp.eye(D), degree), c=c, d=many(jnp.eye(D), degree - 1))


def test_without_mixing_each_entry_is_a_polynomial_of_itself():
    x = jax.random.normal(KEY, (2, 5, 3, 4))
    w = jnp.array([[2.0], [-1], [1 / 6]]).repeat(4, 1)
    o = run(x, **identity(3, 4, side=3), w=w, bias=jnp.ones(4))
    chex.assert_trees_all_close(o, 1 + 2 * x - x**2 + x**3 / 6, rtol=1e-5, atol=1e-5)


def test_of_degree_one_it_is_one_linear_map():
    args = whole_numbers(1)
    zero = run(**(args | dict(x=0 * args["x"])))
    x, y = jax.random.randint(KEY, (2, *args["x"].shape), -3, 4).astype(jnp.float32)
    both, first, second = (run(**(args | dict(x=x))) - zero for x in (x + y, x, y))
    chex.assert_trees_all_equal(both, first + second)


def test_of_degree_two_it_is_the_modulation_of_conv2former():
    """A convolution of one linear map of the input, times another."""
    x = jax.random.normal(KEY, (2, 6, 5, 4))
    gate, value = jax.random.normal(jax.random.key(2), (2, 4, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4))
    maps = identity(2, 4, side=3)
    maps["a"] = maps["a"].at[0].set(kernel)
    maps["b"] = jnp.stack([gate, value])
    o = run(x, **maps, w=jnp.array([[0.0] * 4, [1.0] * 4]), bias=jnp.zeros(4))
    padded = jnp.pad(x @ gate, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = jax.vmap(lambda p, q: jax.lax.dynamic_slice(padded, (0, p, q, 0), x.shape))
    taps = near(jnp.arange(9) // 3, jnp.arange(9) % 3)
    modulation = jnp.einsum("KBXYD,KD->BXYD", taps, kernel.reshape(9, 4))
    chex.assert_trees_all_close(o, modulation * (x @ value), rtol=1e-4, atol=1e-5)


def test_parameters_of_the_module():
    """Those of the paper: 11 by 11 kernels and matrices, twice for each degree but the first."""
    count = lambda module: sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(jax.eval_shape(module.init, KEY, jnp.ones((1, 4, 4, 8))))
    )
    assert count(Padre()) == 5 * (11 * 11 * 8 + 8 * 8) + 3 * 8 + 8
    assert count(Padre(degree=1, size=3)) == 3 * 3 * 8 + 8 * 8 + 8 + 8


def test_each_map_begins_with_outputs_of_the_size_of_its_inputs():
    """So each degree, a product of maps, has size 1 as well, but at the border."""
    x = jax.random.normal(KEY, (4, 24, 24, 32))
    params = jax.jit(Padre(size=3).init)(KEY, x)["params"]
    table = {name: params[name]["table"] for name in params}
    for i in range(3):
        alone = table | dict(w=table["w"] * (jnp.arange(3) == i)[:, None])
        assert 0.75 < run(x, **alone).std() < 1.25


def test_arguments_that_do_not_fit():
    args = SPEC.example(KEY, 4)
    with pytest.raises(ValueError, match="must have odd sides P=2 and Q=5"):
        padre(**(args | dict(a=args["a"][:, :2], c=args["c"][:, :2])))
    with pytest.raises(ValueError, match="must be 2 maps for degree 3"):
        padre(**(args | dict(c=args["c"][:1], d=args["d"][:1])))
    with pytest.raises(ValueError, match="degree=0 must be at least 1"):
        Padre(degree=0).init(KEY, jnp.ones((1, 4, 4, 8)))
