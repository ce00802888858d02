"""Heads over devices, each with all tokens: nothing is sent where arrays lie so outside.

Any mechanism whose heads don't know of each other is called as it is, with any mask and option.
With every strategy heads lie over the mesh axis `tensor`; here they lie over `axis` as well, in the
place of the sequence. The heads of queries must divide by the devices; key heads that don't are
repeated. Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3. The projections before
and after are split by where their parameters lie (`core.sharding`), and XLA adds the sum.

The paper "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies"
splits attention over GPUs too; whether by heads, by sequence or both could not be found out. Here
it is by heads, and in `ring` by sequence.
"""

from attnjax.parallel import split


def _check(record, call, places):
    split.heads(record, call, places.sizes["N"], places.heads, by="tensor")


def _run(record, call, places):
    return split.apply(record.fn, call)


STRATEGY = split.Strategy(check=_check, run=_run, over=split.HEADS, papers=("distributed-mha",))
