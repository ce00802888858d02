"""Known relations of a plan, in steps that are compiled for TPU and H100.

D features, F of the MLP, L layers, N heads, H head dim, T tokens, B sequences, V vocabulary. The
matrices of a model take 6 operations a parameter and token (forward 2, backward 4); of attention,
where it is dense, 12 N H T a layer and token. A compiler may compute a product again rather than
store it, and never leaves one out but what nothing needs.
"""

import pytest

from experiments import config as configs
from experiments import plan_mesh, plan_program

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
    return plan_program.make(config, target, plan_mesh.make_mesh(config, target), strategy)


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


def test_a_kernel_counts_as_it_says():
    made = make("v5e:1x1", mixer="retention", length=1024)
    assert made.count.kernel_flops > 0 and not made.count.kernels_without_cost


@pytest.mark.parametrize("target", ["v5e:1x1", "h100:1"])
def test_a_program_that_is_too_large(target):
    made = make(target, batch=2**20)
    assert not made.fits and made.over > 2**30
    assert made.memory["parameters"] == 4 * (MATRICES + OTHERS)
