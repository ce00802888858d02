"""Softmax attention by cuDNN, which JAX calls on GPUs: the plain case, of 16 bits."""

import jax

from attnjax.ops import plain_case


def cudnn_attention(q, k, v, t, s, *, mask, bias, scale, softcap, sinks, dropout, score_mod):
    """(output, None) as `ops.dot_product_attention` defines it, without lse; no forward-mode.

    t (T) and s (S) are the positions of queries and keys. Raises NotImplementedError for what is
    not honoured: another option than a causal mask, positions that don't count up from 0, values of
    another width or dtype than keys; and for what JAX itself refuses: dtypes, widths of heads, and
    where there is no cuDNN.

    It gives no lse: JAX would round that, and drop its gradient.
    """
    options = dict(bias=bias, softcap=softcap, sinks=sinks, dropout=dropout, score_mod=score_mod)
    plain_case.check(t, s, mask, by="cuDNN", **options)
    if len({(x.dtype, x.shape[-1]) for x in (q, k, v)}) > 1:
        given = ", ".join(f"{x.dtype} {x.shape}" for x in (q, k, v))
        raise NotImplementedError(f"cuDNN needs one dtype and one width of heads, not {given}")
    causal = mask is not None
    options = dict(scale=float(scale), is_causal=causal, implementation="cudnn")
    try:
        return jax.nn.dot_product_attention(q, k, v, **options), None
    except RuntimeError as error:  # NotImplementedError is one, a cuDNN that isn't found another
        raise NotImplementedError(f"cuDNN can't be had: {error}") from None
