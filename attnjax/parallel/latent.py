"""Slices of a latent over devices: each attends by its own slices, and the outputs are summed.

For a function over slices (letter J) whose output is the sum of what each gives, as
`softmax.tpla`: a device holds no other part of the cache but its slices and what all share. One
sum of outputs is sent. Heads lie over the mesh axis `tensor`: with both, a slice is known to a row
of devices, of which each has some of the heads. Source: Tang et al., "TPLA", arXiv:2508.15881,
sections 4 and 4.4.
"""

from jax import lax

from attnjax.parallel import split


def _check(record, call, places):
    if not any("J" in letters for letters in call.letters.values()):
        name = record.fn.__name__
        raise NotImplementedError(f"latent needs an axis J of slices, which {name} hasn't")
    if (J := places.sizes["J"]) % places.size:
        raise NotImplementedError(
            f"latent can't split {J=} slices over {places.size} devices, gather can"
        )


def _run(record, call, places):
    return lax.psum(split.apply(record.fn, call), places.axis)


STRATEGY = split.Strategy(check=_check, run=_run, over=("J",))
