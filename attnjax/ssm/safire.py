r"""SaFiRe: an image is read in the light of a sentence, as a whole and then by regions, repeatedly.

Paper: Mao et al., "SaFiRe: Saccade-Fixation Reiteration with Mamba for Referring Image
Segmentation", arXiv:2510.10160, section 3.

    in each of C cycles, with weights of its own:
    z <- layer_norm(x) * (1 + scale) + shift,   [scale, shift] = sentence W         saccade
    x <- x + scan([z_1, text, z_2, text, ..., z_n, text]) at the cells of z         fixation

z_1 ... z_n are regions, runs of cells; the sentence is the mean of its tokens. `scan` is a
selective scan (S6) from both ends, summed: its state meets the text anew at each region, so that no
region is far from it, and brings what other regions said. The cost is linear in the cells.

Shapes: B batch, T cells, S tokens of the text, H channels, C cycles, M entries of a channel's
state, R rank of the steps, F = R + 2M, E = 2H, D model dim; an axis of 2 is forward and backward.
Unlike the paper: it is known here by its abstract and by summaries, without its code. Those give
the cycles, the modulation by the sentence, and text among the regions of a scan. The place of the
text, the scan from both ends, that the text stays as it is, and the form of both updates are
choices of this file. Encoders and the decoder of masks are left out; accuracy is not tested.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, registry, selection
from attnjax.core.registry import Claim
from attnjax.ops import cross_scan
from attnjax.ops import selective_scan as ops
from pallas_kernels import selective_scan as kernels


def safire(
    x: Float[Array, "B T H"],
    text: Float[Array, "B S H"],
    saccade: Float[Array, "C H E"],
    select: Float[Array, "C 2 H F"],
    widen: Float[Array, "C 2 R H"],
    bias: Float[Array, "C 2 H"],
    log_rate: Float[Array, "C 2 H M"],
    skip: Float[Array, "C 2 H"],
    *,
    region: int = 16,
    mask: masks.Mask | None = None,
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B T H"]:
    """x after all cycles, in x's dtype; float32 between them.

    Args:
      saccade: W of each cycle; scale first.
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for each cycle
        and direction.
      region: cells of a region; the last may have fewer.
      mask: Valid says which tokens of the text are no padding; NotImplementedError for others.
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for a region below 1 and for weights that don't fit each other.
    """
    if region < 1:
        raise ValueError(f"{region=} must be at least 1")
    (valid,) = masks.select(mask, masks.Valid, by="safire")
    seen = functools.reduce(
        jnp.logical_and, (m.keys for m in valid), jnp.ones(text.shape[:2], bool)
    )
    text = jnp.where(seen[..., None], text, 0).astype(jnp.float32)
    sentence = text.sum(1) / jnp.maximum(seen.sum(1), 1)[:, None]

    def cycle(x, weights):
        saccade, *scan = weights
        scale, shift = jnp.split((sentence @ saccade.astype(jnp.float32))[:, None], 2, -1)
        z = jax.nn.standardize(x, epsilon=1e-6) * (1 + scale) + shift
        run = functools.partial(ops.selected_scan, implementation=implementation, by="safire")
        return x + _fixation(z, text, seen, scan, region, run), None

    weights = saccade, select, widen, bias, log_rate, skip
    return jax.lax.scan(cycle, x.astype(jnp.float32), weights)[0].astype(x.dtype)


def _fixation(z, text, seen, weights, region, run):
    """The scans, by `run`, of regions and text from both ends, summed, at the cells (B T H)."""
    B, T, H = z.shape
    count = -(-T // region)
    end = ((0, 0), (0, count * region - T))
    line = _interleave(jnp.pad(z, (*end, (0, 0))), text, count)
    real = _interleave(jnp.pad(jnp.ones((B, T), bool), end), seen, count)

    def scan(line, real, way):
        one_head = [w[way][None] for w in weights]
        y, _ = run(line[:, :, None], *one_head, mask=masks.Valid(real))
        return y[:, :, 0]

    y = scan(line, real, 0) + scan(line[:, ::-1], real[:, ::-1], 1)[:, ::-1]
    return y.reshape(B, count, -1, H)[:, :, :region].reshape(B, -1, H)[:, :T]


def _interleave(cells, text, count):
    """(B, cells, ...) and (B S ...) as one line: a region, the text, a region, and so on."""
    regions = cells.reshape(len(cells), count, -1, *cells.shape[2:])
    texts = jnp.broadcast_to(text[:, None], (len(text), count, *text.shape[1:]))
    return jnp.concatenate([regions, texts], 2).reshape(len(cells), -1, *cells.shape[2:])


class Safire(nn.Module):
    """All cycles over x (B T D) and a text (B S F): for an image, x is its cells region by region.

    `region` as in `safire`, `state` and `rank` as in `core.selection`.
    """

    cycles: int = 2
    region: int = 16
    state: int = 16
    rank: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = safire

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S F"],
        *,
        mask: masks.Mask | None = None,
    ) -> Float[Array, "B T D"]:
        """`mask` says which tokens of the text are no padding."""
        C, D = self.cycles, x.shape[-1]
        text = layers.Dense(D, False, self.dtype, name="text")(context)
        many = nn.initializers.lecun_normal(batch_axis=0)
        saccade = layers.Table((C, D, 2 * D), many, name="saccade")()
        weights = selection.Selection(2 * C, D, self.state, self.rank, name="selection")()
        weights = [w.reshape(C, 2, *w.shape[1:]) for w in weights]
        options = dict(region=self.region, mask=mask)
        y = layers.Attend(self.fn, name="attend")(x, text, saccade, *weights, **options)
        return layers.Dense(D, False, self.dtype, name="out")(y)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 8)
    return dict(
        x=jax.random.normal(keys[0], (2, T, 4)),
        text=jax.random.normal(keys[1], (2, min(T, 8), 4)),
        saccade=jax.random.normal(keys[2], (2, 4, 8)) / 8,
        select=jax.random.normal(keys[3], (2, 2, 4, 5)) / 4,
        widen=jax.random.normal(keys[4], (2, 2, 1, 4)),
        bias=jax.random.normal(keys[5], (2, 2, 4)) - 1,
        log_rate=jax.random.normal(keys[6], (2, 2, 4, 2)),
        skip=jax.random.normal(keys[7], (2, 2, 4)),
    )


def _oracle(x, text, saccade, select, widen, bias, log_rate, skip, *, region=16):
    """Token by token along a line that is put together region by region."""
    T, S = x.shape[1], text.shape[1]
    line, at = [], []  # where tokens of the line are in [x, text], and where x is in the line
    for start in range(0, T, region):
        cells = list(range(start, min(start + region, T)))
        at += [len(line) + i for i in range(len(cells))]
        line += cells + list(range(T, T + S))
    ends = jnp.array([range(len(line)), range(len(line))[::-1]])
    for n in range(len(saccade)):
        scale, shift = jnp.split((text.mean(1) @ saccade[n])[:, None], 2, -1)
        z = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        tokens = jnp.concatenate([z * (1 + scale) + shift, text], 1)[:, jnp.array(line)]
        weights = [w[n] for w in (select, widen, bias, log_rate, skip)]
        y = jax.vmap(cross_scan.walk, (None, *[0] * 6))(tokens, ends, *weights)
        x = x + y.sum(0)[:, jnp.array(at)]
    return x


SPEC = registry.Mechanism(
    fn=safire,
    module=Safire,
    layout="cross",
    small=dict(region=3, state=4, rank=2),
    papers=("safire",),
    example=_example,
    oracle=_oracle,
    variants=(dict(region=3),),
    claims=frozenset(
        {
            Claim.MASKABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FUSED,
            Claim.FORWARD_MODE,
        }
    ),
)
