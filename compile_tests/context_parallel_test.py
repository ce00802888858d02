"""What strategies of context parallelism send, as compiled for TPU: how much of what, and when.

n bytes are those of an array in one device, of queries as of keys and values; P devices.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnjax import parallel
from attnjax.core import masks, registry, sharding
from experiments import targets
from experiments.planning import accelerators, hlo, program
from experiments.planning import count as plan_count
from experiments.planning import mesh as plan_mesh

TARGET, P = "v5e:2x2", 4
B, T, N, H = 1, 8192, 4, 128
CAUSAL = masks.Causal()
n = B * T // P * N * H * 2  # bfloat16


@functools.cache
def counted(
    strategy, mechanism="multi_head_attention", *, mask, decay=None, target=TARGET, fsdp=1, P=P
):
    """What a mechanism and its gradient do on each device, each with as many tokens."""
    devices = plan_mesh.devices(target)
    mesh = sharding.make_mesh(fsdp=fsdp, context=P, devices=devices)
    fn = parallel.shard(strategy, registry.get(mechanism), mesh)
    place = NamedSharding(mesh, Spec("fsdp", "context"))
    shape = B * fsdp, n // (B * N * H * 2) * P, N, H
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def gradients(q, k, v, do):
        options = dict(mask=mask) | ({} if decay is None else dict(log_decay=jnp.full(N, decay)))
        o, pull = jax.vjp(functools.partial(fn, **options), q, k, v)
        return o, pull(do)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = targets.compile_for(target, gradients, x, x, x, x)
    return plan_count.count(
        hlo.read(program.text(compiled)),
        accelerators.of_target(target),
        devices=range(P),
        islands=[0] * len(devices),
    )


def kinds(count):
    """Bytes that a device sends, by kind of collective, in arrays of n bytes."""
    return {kind: traffic.bytes / n for kind, traffic in count.collectives.items()}


def test_a_ring_sends_to_its_neighbours_while_it_computes():
    count = counted("ring", mask=CAUSAL)
    # keys and values make P - 1 rotations in either pass and none to spare, of which the compiler
    # makes the first for both; their gradients as many in float32, and one home in bfloat16
    assert kinds(count) == {"collective-permute": 2 * (3 + 2 + 3 * 2 + 1)}
    permutes = count.collectives["collective-permute"]
    assert permutes.count == 2 * (3 + 2 + 3 + 1)
    assert permutes.exposed_bytes <= 2 * n  # home at most: nothing is left to compute then


@pytest.mark.parametrize(("target", "fsdp", "P"), [("v5e:8x8", 8, 8), ("v5p:4x4x4", 4, 16)])
def test_rotations_are_hidden_where_a_ring_has_a_part_of_a_pod(target, fsdp, P):
    """Along a part of an axis of a v5e none would be, and half of a v5p's were hidden by less."""
    count = counted("ring", mask=CAUSAL, target=target, fsdp=fsdp, P=P)
    permutes = count.collectives["collective-permute"]
    assert permutes.bytes == 2 * (4 * (P - 1)) * n
    assert permutes.exposed_bytes <= 2 * n


def test_zigzag_moves_tokens_once_and_evens_out_the_work():
    count = counted("ring(order='zigzag', gradients='bfloat16')", mask=CAUSAL)
    # queries, keys, values, the output and their gradients go to their places and back, in halves
    assert kinds(count) == {"collective-permute": 2 * (3 + 2 + 3 + 1) + 8}
    assert count.collectives["collective-permute"].exposed_bytes <= (2 + 8) * n
    assert count.mean_flops > 0.95 * count.flops
    # forward 2 products with a tile of scores and 7 in the backward pass: of half the tiles
    assert 0.5 < count.mean_flops / (9 * 2 * B * T * T // P * N * H) < 0.6


def test_ulysses_exchanges_heads_for_tokens():
    count = counted("all_to_all", mask=CAUSAL)
    assert kinds(count) == {"all-to-all": 8 * 3 / 4}  # q, k, v, o and their gradients


def test_gather_sends_keys_once():
    count = counted("gather", mask=CAUSAL)
    assert kinds(count) == {"all-gather": 2 * 3, "reduce-scatter": 2 * 3}


def test_halo_sends_what_the_window_sees():
    count = counted("halo", mask=masks.Window(255))
    assert kinds(count) == {"collective-permute": 2 * 2 * 255 / (T // P)}


def test_a_recurrence_sends_states():
    count = counted("pass_state", "lightning_attention_2", mask=CAUSAL, decay=-0.1)
    state = B * N * H * H * 4
    sent = sum(traffic.bytes for traffic in count.collectives.values())
    assert "collective-permute" not in count.collectives
    # gathered in the forward pass; in the backward pass its gradient is summed where it belongs
    assert 2 * 3 * state <= sent <= 3 * 3 * state


@pytest.mark.parametrize("strategy", ["ring", "all_to_all", "gather"])
def test_no_mask_is_held_in_memory(strategy):
    count = counted(strategy, mask=CAUSAL)
    masked = [row for row in count.buffers if row[1].startswith(("pred", "s", "u"))]
    assert all(size < n / 64 for *_, size in masked), masked
    assert max(size for *_, size in count.buffers) <= P * n
    assert not count.unknown and not count.kernels_in_full
