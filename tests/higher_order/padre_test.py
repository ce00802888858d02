"""PADRe: of exactly its degree, linear where that is 1, and others' modulation where it is 2."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.higher_order.padre import SPEC, Padre, padre
from tests.initial import initial

KEY = jax.random.key(0)
run = jax.jit(padre)
EXAMPLE = jax.device_get(jax.jit(SPEC.example, static_argnums=1)(KEY, 4))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole_numbers(degree):
    """Arguments of small whole numbers: then float32 rounds nothing."""
    small = {name: np.sign(np.round(x)) for name, x in EXAMPLE.items()}
    sizes = dict(a=degree, b=degree, w=degree, c=degree - 1, d=degree - 1)
    return small | {name: small[name][:size] for name, size in sizes.items()}


def without(args, name):
    return {key: x for key, x in args.items() if key != name}


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_is_a_polynomial_of_exactly_its_degree(degree):
    """Along a line, the differences of order degree + 1 are zero and those before are constant."""
    args = whole_numbers(degree)
    step = np.random.default_rng(0).integers(-1, 2, args["x"].shape)
    points = args["x"] + np.arange(-2, 4).reshape(-1, *[1] * step.ndim) * step
    line = jax.jit(jax.vmap(lambda x, rest: padre(x, **rest), (0, None)))
    values = jax.device_get(line(points.astype(np.float32), without(args, "x")))
    assert np.abs(values).max() < 2**24
    last = np.diff(values, degree, axis=0)
    assert last.any() and (last == last[:1]).all()


def test_terms_of_degree_i_scale_like_the_power_i():
    for i in range(3):
        one = EXAMPLE["w"] * (np.arange(3) == i)[:, None]
        alone = EXAMPLE | dict(w=one, bias=np.zeros(4, np.float32))
        doubled = alone | dict(x=2 * EXAMPLE["x"])  # what rounds nothing
        once, twice = jax.device_get([run(**alone), run(**doubled)])
        chex.assert_trees_all_equal(twice, 2 ** (i + 1) * once)


def identity(degree, D, side=1):
    kernel, eye = np.zeros((side, side, D), np.float32), np.eye(D, dtype=np.float32)
    kernel[side // 2, side // 2] = 1.0
    many = lambda x, count: np.broadcast_to(x, (count, *x.shape)).copy()
    a, c = many(kernel, degree), many(kernel, degree - 1)
    return dict(a=a, b=many(eye, degree), c=c, d=many(eye, degree - 1))


def test_without_mixing_each_entry_is_a_polynomial_of_itself():
    x = normal(2, 5, 3, 4)
    w = np.float32([[2.0], [-1], [1 / 6]]).repeat(4, 1)
    o = run(x, **identity(3, 4, side=3), w=w, bias=np.ones(4, np.float32))
    chex.assert_trees_all_close(o, 1 + 2 * x - x**2 + x**3 / 6, rtol=1e-5, atol=1e-5)


def test_of_degree_one_it_is_one_linear_map():
    args = whole_numbers(1)
    x, y = np.random.default_rng(0).integers(-3, 4, (2, *args["x"].shape)).astype(np.float32)
    of = lambda x: jax.device_get(run(**(args | dict(x=x))))
    zero = of(0 * x)
    both, first, second = (of(x) - zero for x in (x + y, x, y))
    chex.assert_trees_all_equal(both, first + second)


def test_of_degree_two_it_is_the_modulation_of_conv2former():
    """A convolution of one linear map of the input, times another."""
    x, (gate, value), kernel = normal(2, 6, 5, 4), normal(2, 4, 4, seed=2), normal(3, 3, 4, seed=1)
    maps = identity(2, 4, side=3)
    maps["a"][0], maps["b"] = kernel, np.stack([gate, value])
    w = np.float32([[0.0] * 4, [1.0] * 4])
    o = run(x, **maps, w=w, bias=np.zeros(4, np.float32))
    padded = np.pad(x @ gate, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [padded[:, p : p + 6, q : q + 5] for p, q in np.ndindex(3, 3)]
    modulation = np.einsum("KBXYD,KD->BXYD", near, kernel.reshape(9, 4))
    chex.assert_trees_all_close(o, modulation * (x @ value), rtol=1e-4, atol=1e-5)


def test_parameters_of_the_module():
    """Those of the paper: 11 by 11 kernels and matrices, twice for each degree but the first."""
    count = lambda module: sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(jax.eval_shape(module.init, KEY, normal(1, 4, 4, 8)))
    )
    assert count(Padre()) == 5 * (11 * 11 * 8 + 8 * 8) + 3 * 8 + 8
    assert count(Padre(degree=1, size=3)) == 3 * 3 * 8 + 8 * 8 + 8 + 8


def test_each_map_begins_with_outputs_of_the_size_of_its_inputs():
    """So each degree, a product of maps, has size 1 as well, but at the border."""
    x = jnp.asarray(normal(4, 24, 24, 32))
    params = jax.device_get(initial(Padre(size=3).init, KEY, x))["params"]
    table = {name: params[name]["table"] for name in params}
    for i in range(3):
        alone = table | dict(w=table["w"] * (np.arange(3) == i)[:, None])
        assert 0.75 < jax.device_get(run(x, **alone)).std() < 1.25


def test_arguments_that_do_not_fit():
    args = EXAMPLE
    with pytest.raises(ValueError, match="must have odd sides P=2 and Q=5"):
        run(**(args | dict(a=args["a"][:, :2], c=args["c"][:, :2])))
    with pytest.raises(ValueError, match="must be 2 maps for degree 3"):
        run(**(args | dict(c=args["c"][:1], d=args["d"][:1])))
    with pytest.raises(ValueError, match="degree=0 must be at least 1"):
        jax.eval_shape(Padre(degree=0).init, KEY, normal(1, 4, 4, 8))
