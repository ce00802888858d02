"""A picture of how mechanisms attend: python -m experiments.gallery docs/pictures/gallery.png

Each panel is the attention matrix of one mechanism on the same random tokens, read off its module
with `core.edit`. Nothing is listed: every mechanism over sequences that has a matrix is drawn.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import edit, masks, registry
from attnjax.core.registry import Claim

T, D, SIDE = 36, 48, 6


def main(argv: list[str]) -> int:
    """Draws the gallery into the file that `argv` names."""
    from matplotlib.figure import Figure

    maps = {name.partition(".")[2]: w for name, w in matrices()}
    columns = 7
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(2 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(maps) :]:
        axes.axis("off")
    for axes, (name, w) in zip(panels, maps.items(), strict=False):
        axes.imshow(np.abs(w) ** 0.5, cmap="magma")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(xticks=[], yticks=[])
    figure.supxlabel("keys", fontsize=9)
    figure.supylabel("queries", fontsize=9)
    path = pathlib.Path(argv[0] if argv else "docs/pictures/gallery.png")
    figure.savefig(path, dpi=130)
    print(path)
    return 0


def matrices():
    """(name, (T T) weights of the first head) of each mechanism with a matrix."""
    for name, record in registry.of_kind(registry.Mechanism).items():
        if Claim.DENSE_TWIN in record.claims and record.layout in ("sequence", "grid"):
            yield name, matrix(record)


def matrix(record: registry.Mechanism) -> np.ndarray:
    """The first head's weights on smooth random tokens; causal where it can be."""
    module = record.module(**record.small)
    steps = jax.random.normal(jax.random.key(0), (1, T, D))
    x = jnp.cumsum(steps, 1) / jnp.sqrt(jnp.arange(1, T + 1))[None, :, None]
    options = dict(mask=masks.Causal()) if Claim.CAUSAL in record.claims else {}
    x = x.reshape(1, SIDE, SIDE, D) if record.layout == "grid" else x
    rngs = dict(params=jax.random.key(1), noise=jax.random.key(2))
    params = jax.jit(lambda: module.init(rngs, x, **options))()
    _, maps = jax.jit(edit.read(module.apply))(params, x, **options)
    return np.asarray(next(iter(maps.values()))[0, 0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
