"""Known relations of a plan, in steps that are compiled for TPU and H100.

D features, F of the MLP, L layers, N heads, H head dim, T tokens, B sequences, V vocabulary. The
matrices of a model take 6 operations a parameter and token (forward 2, backward 4); of attention,
where it is dense, 12 N H T a layer and token. A compiler may compute a product again rather than
store it, and never leaves one out but what nothing needs.
"""

import pytest

from attnjax.core import sharding
from experiments import config as configs
from experiments.planning import mesh as plan_mesh
from experiments.planning import program

V, D, L, N, F, T, B = 128, 64, 2, 2, 256, 64, 8
MATRICES = L * (4 * D * D + 3 * D * F) + V * D
OTHERS = V * D + (2 * L + 1) * D


def make(target, *, strategy=None, mixer="multi_head_attention", batch=B, length=T, mesh=None,
         remat="none"):  # fmt: skip
    config = configs.Experiment(
        task=f"mqar(vocab_size={V}, length={length}, num_pairs=8)",
        model=f"lm(features={D}, depth={L}, num_heads={N}, scan=True, remat='{remat}')",
        mixers=(mixer,),
        batch_size=batch,
        mesh=configs.Mesh(**mesh or {}),
    )
    return program.make(config, target, plan_mesh.make_mesh(config, target), strategy)


@pytest.mark.parametrize("target", ["v5e:2x2", "h100:2x2"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_and_operations(target, remat):
    made, tokens = make(target, remat=remat), B * T // 4
    assert made.fits and not made.count.unknown
    assert made.memory["parameters"] == 4 * (MATRICES + OTHERS)
    assert made.memory["optimiser"] == 8 * (MATRICES + OTHERS) + 8
    assert made.memory["batch"] == 3 * 4 * tokens
    assert made.memory["all"] >= sum(made.memory[k] for k in ("parameters", "optimiser", "batch"))
    attention = 12 * L * D * T * tokens
    least = 6 * MATRICES * tokens + attention
    # again: a layer's forward pass, but for its last product, whose output nothing needs
    layers = MATRICES - V * D
    again = 2 * (layers - L * D * F) * tokens + attention / 3 if remat == "full" else 0
    # what may be computed once more is the weights of attention: one product in each pass
    most = least + again + attention / 6 * (3 if remat == "full" else 2)
    assert least + again <= made.count.flops <= most


def test_parameters_are_split():
    made = make("v5e:2x2", mesh=dict(fsdp=4))
    split = L * (4 * D * D + 3 * D * F) + 2 * V * D
    assert made.memory["parameters"] == split + 4 * (2 * L + 1) * D
    # a parameter is gathered for use (of 4 bytes, by 3 of 4) and its gradient is reduced
    sent = sum(t.bytes for t in made.count.collectives.values())
    assert sent >= 2 * 3 * split


@pytest.mark.parametrize("target", ["v5e:2x2", "h100:2x2"])
def test_ring_and_gather_send_what_their_formulas_say(target):
    piece = B * (T // 4) * D * 4  # bytes of keys, as of values, on a device
    mesh = dict(context=4)
    ring = make(target, strategy="ring", mesh=mesh).count.collectives
    # keys and values go to each other device; in the backward pass once more, and their gradients
    # come back to where the keys are: no turn to spare. On TPU keys and values only enter products
    # of bfloat16, and are sent as that, as are gradients on their last way home
    narrow = piece // 2 if target.startswith("v5e") else piece
    expected = L * (2 * (3 + 3 + 1) * narrow + 2 * 3 * piece)
    assert ring["collective-permute"].bytes == expected
    gather = make(target, strategy="gather", mesh=mesh).count.collectives
    assert gather["all-gather"].bytes >= L * 2 * 3 * narrow


@pytest.mark.parametrize(("target", "tile"), [("v5e:2x2", 1024), ("h100:4", 512)])
def test_a_causal_ring_counts_the_tiles_that_each_device_computes(target, tile):
    """By the kernel on TPU, and by loops whose ends depend on the device on H100."""
    length = 8192
    count = make(target, strategy="ring", batch=1, length=length, mesh=dict(context=4)).count
    assert not count.unknown and not count.kernels_in_full
    side = length // 4 // tile  # tiles of a piece along each axis
    each = side**2 * 2 * tile**2 * D * L  # one product of all heads, with each of its tiles
    last, mean = 3 + (side + 1) / (2 * side), 1.5 + (side + 1) / (2 * side)
    # forward 2 products, backward 7 by kernels (two of which compute weights) or 5 by loops
    products = 2 + (7 if target.startswith("v5e") else 5)
    matrices = 6 * MATRICES * length // 4
    assert count.flops == pytest.approx(matrices + products * each * last, rel=0.03)
    assert count.mean_flops == pytest.approx(matrices + products * each * mean, rel=0.03)


def test_zigzag_evens_out_what_devices_compute_on_a_pod():
    """Where a v5p looks up positions by a core of its own, which the count follows."""
    mesh, piece = dict(fsdp=4, context=16), 65536 // 16
    options = dict(strategy="ring(order='zigzag')", batch=4, length=65536, mesh=mesh)
    count = make("v5p:4x4x4", remat="full", **options).count
    assert not count.unknown and not count.kernels_in_full
    assert count.flops == pytest.approx(count.mean_flops)
    each = 2 * piece**2 * D * L  # one product of all heads and of two whole pieces
    half, products = 16 / 2, 2 + 2 + 7  # forward twice, and backward
    # of tiles of 1024 those on the diagonal are computed whole: two in each of a piece's halves
    diagonal = 4 / 2 * (1024 / piece) ** 2
    matrices = 6 * MATRICES * piece
    expected = matrices + products * each * (half + diagonal)
    assert count.flops == pytest.approx(expected, rel=0.03)


def test_a_kernel_counts_as_it_says():
    made = make("v5e:1x1", mixer="retention", length=1024)
    assert made.count.kernel_flops > 0 and not made.count.kernels_without_cost


@pytest.mark.parametrize("target", ["v5e:1x1", "h100:1"])
def test_a_program_that_is_too_large(target):
    made = make(target, batch=2**20)
    assert not made.fits and made.over > 2**30
    assert made.memory["parameters"] == 4 * (MATRICES + OTHERS)


def test_a_mesh_may_take_a_part_of_an_axis_of_the_torus():
    """16 is no product of 4, 8 and 8: JAX alone refuses it."""
    there = plan_mesh.devices("v5p:4x8x8")
    mesh = sharding.make_mesh(fsdp=16, context=16, devices=there)
    assert dict(mesh.shape) == dict(data=1, fsdp=16, context=16, tensor=1)
    assert set(mesh.devices.flat) == set(there)
