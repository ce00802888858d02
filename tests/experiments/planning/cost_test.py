import jax
import jax.numpy as jnp
import pytest

from experiments.planning import cost, hlo, program


def module_of(fn, *args):
    return hlo.read(program.text(jax.jit(fn).lower(*args).compile()))


def read(*lines, fused=()):
    """A module of these lines of HLO, and its instruction that is called x."""
    inner = ["%inner (a: f32[]) -> f32[] {", *(f"  {line}" for line in fused), "}"] if fused else []
    body = (f"  {line}" for line in lines)
    module = hlo.read("\n".join([*inner, "ENTRY %main () -> f32[] {", *body, "}"]))
    main = module.computations["main"]
    return main.by_name["x"], main, module


@pytest.mark.parametrize(
    ("spec", "shapes", "products"),
    [
        ("ij,jk->ik", [(3, 5), (5, 7)], 3 * 5 * 7),
        ("bij,bkj->bik", [(2, 3, 5), (2, 7, 5)], 2 * 3 * 5 * 7),
        ("bijd,kjd->bik", [(2, 3, 5, 4), (7, 5, 4)], 2 * 3 * 5 * 4 * 7),
    ],
)
def test_products_of_matrices(spec, shapes, products):
    module = module_of(lambda *x: jnp.einsum(spec, *x), *map(jnp.ones, shapes))
    main = module.computations[module.entry]
    assert sum(cost.flops(i, main, module) for i in main.instructions) == 2 * products


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "products"),
    [
        # as TPU's compiler writes a product to heads, and batches of products
        ("4,512,256,1", "256,4,64,1", "4,512,4,64",
         "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
         4 * 512 * 256 * 4 * 64),
        ("4,512,64", "4,64,512", "4,512,512",
         "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf", 4 * 512 * 64 * 512),
        ("4,512,512", "4,64,512", "4,64,512",
         "window={size=4 stride=4 pad=3_3 lhs_dilate=3 rhs_reversal=1}, dim_labels=0fb_0oi->0fb",
         4 * 512 * 64 * 512),
        ("2,9,9,3", "5,5,3,8", "2,5,5,8", "window={size=5x5}, dim_labels=b01f_01io->b01f",
         2 * 25 * 25 * 3 * 8),
        ("1,5,1", "3,1,1", "1,5,1", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 13),
        ("2,8,6", "4,3,9", "2,5,9", "window={size=4}, dim_labels=b0f_0io->b0f, "
         "feature_group_count=2", 2 * 5 * 4 * 3 * 9),
    ],
)  # fmt: skip
def test_products_as_convolutions(left, right, out, attributes, products):
    x = read(
        f"%l = f32[{left}] parameter(0)",
        f"%r = f32[{right}] parameter(1)",
        f"ROOT %x = f32[{out}] convolution(%l, %r), {attributes}",
    )
    assert cost.flops(*x) == 2 * products


def test_a_kernel_says_its_cost():
    config = '"cost_estimate": {"flops": "120", "transcendentals": 7, "bytes_accessed": 4096}'
    call = 'ROOT %x = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"'
    known = read("%a = f32[8] parameter(0)", f"{call}, backend_config={{{config}}}")
    silent = read("%a = f32[8] parameter(0)", call)
    assert cost.is_kernel(known[0]) and cost.is_kernel(silent[0])
    assert cost.flops(*known) == 120 and cost.moved(*known) == 4096
    assert cost.flops(*silent) == 0 and cost.moved(*silent) == 2 * 32
    assert cost.kernel_cost(silent[0]) == {}


def test_a_fusion_reads_the_slice_it_needs_and_writes_the_update_it_makes():
    fusion = read(
        "%big = f32[64,100] parameter(0)",
        "%at = s32[] parameter(1)",
        "%old = f32[64,100] parameter(2)",
        "ROOT %x = f32[64,100] fusion(%big, %at, %old), kind=kLoop, calls=%inner",
        fused=(
            "%p.0 = f32[64,100] parameter(0)",
            "%p.1 = s32[] parameter(1)",
            "%p.2 = f32[64,100] parameter(2)",
            "%z = s32[] constant(0)",
            "%row = f32[1,100] dynamic-slice(%p.0, %p.1, %z), dynamic_slice_sizes={1,100}",
            "%n = f32[1,100] negate(%row)",
            "ROOT %u = f32[64,100] dynamic-update-slice(%p.2, %n, %p.1, %z)",
        ),
    )
    assert cost.moved(*fusion) == 400 + 4 + 400
    assert cost.moved(*fusion, larger_than=10_000) == 800  # of large arrays alone
    assert cost.moved(*fusion, larger_than=64 * 400) == 0


def test_what_stays_on_the_chip_does_not_move():
    x = read("%a = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)",
             "ROOT %x = f32[8,128]{1,0:T(8,128)} negate(%a)")  # fmt: skip
    assert cost.moved(*x) == 8 * 128 * 4
