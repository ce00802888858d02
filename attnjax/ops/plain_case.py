"""What a library's own kernel of plain attention is asked to honour, and what not."""

import numpy as np

from attnjax.core import masks


def check(t, s, mask, *, by: str, **options):
    """NotImplementedError, naming `by`, for any option that is given, and for all but plain places.

    Those are queries and keys at positions (t and s) that count up from 0, with no mask, or a
    causal one and as many of either.
    """
    if asked := [name for name, option in options.items() if option is not None]:
        raise NotImplementedError(f"{by} can't honour {', '.join(asked)}")
    masks.select(mask, masks.Causal, by=by)
    for x in (t, s):
        if not (isinstance(x, np.ndarray) and np.array_equal(x, np.arange(len(x)))):
            raise NotImplementedError(f"{by} can't honour positions that don't count up from 0")
    if mask is not None and len(t) != len(s):
        raise NotImplementedError(
            f"{by}'s causal mask is for as many keys as queries, not {len(s)} and {len(t)}"
        )
