"""Softmax attention by cuDNN, which JAX calls on GPUs: the plain case, of 16 bits."""

import jax
import numpy as np

from attnjax.core import masks


def cudnn_attention(q, k, v, t, s, *, mask, bias, scale, softcap, sinks, dropout, score_mod):
    """(output, None) as `ops.dot_product_attention` defines it, without lse; no forward-mode.

    t (T) and s (S) are the positions of queries and keys. Raises NotImplementedError for what is
    not honoured: another option than a causal mask, positions that don't count up from 0, values of
    another width or dtype than keys; and for what JAX itself refuses: dtypes, widths of heads, and
    where there is no cuDNN.

    It gives no lse: JAX would round that, and drop its gradient.
    """
    options = dict(bias=bias, softcap=softcap, sinks=sinks, dropout=dropout, score_mod=score_mod)
    if asked := [name for name, option in options.items() if option is not None]:
        raise NotImplementedError(f"cuDNN can't honour {', '.join(asked)}")
    _check(q, k, v, t, s, mask)
    causal = mask is not None
    options = dict(scale=float(scale), is_causal=causal, implementation="cudnn")
    try:
        return jax.nn.dot_product_attention(q, k, v, **options), None
    except RuntimeError as error:  # NotImplementedError is one, a cuDNN that isn't found another
        raise NotImplementedError(f"cuDNN can't be had: {error}") from None


def _check(q, k, v, t, s, mask):
    if not all(isinstance(part, masks.Causal) for part in masks.parts(mask)):
        raise NotImplementedError(f"cuDNN can't honour {mask}; it can Causal")
    for x in (t, s):
        if not (isinstance(x, np.ndarray) and np.array_equal(x, np.arange(len(x)))):
            raise NotImplementedError("cuDNN can't honour positions that don't count up from 0")
    if mask is not None and len(t) != len(s):
        raise NotImplementedError(
            f"cuDNN's causal mask is for as many keys as queries, not {len(s)} and {len(t)}"
        )
    if len({(x.dtype, x.shape[-1]) for x in (q, k, v)}) > 1:
        given = ", ".join(f"{x.dtype} {x.shape}" for x in (q, k, v))
        raise NotImplementedError(f"cuDNN needs one dtype and one width of heads, not {given}")
