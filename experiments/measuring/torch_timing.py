"""Times PyTorch's attention, and flash-linear-attention, for a benchmark in another process.

It runs under any interpreter that has torch, and needs no jax. Its first line is the version of
torch. Each line on stdin is a request in JSON, the arguments of `prepare` with `calls`; the answer
is {"seconds": of one call} or {"refused": why}.
"""

import functools
import json
import os
import sys
import time

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    print(torch.__version__, file=answers, flush=True)
    torch.set_num_threads(os.cpu_count())
    for line in sys.stdin:
        request = json.loads(line)
        calls = request.pop("calls")
        try:
            answer = {"seconds": seconds(prepare(**request), calls, request["device"])}
        except Exception as error:  # a library may raise anything, and the next request may do
            answer = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def seconds(run, calls, device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


@functools.lru_cache(maxsize=1)
def prepare(
    *, operation, batch, length, heads, kv_heads, head_dim, value_dim, mask, way, dtype, device
):
    """A function that runs once; what the forward keeps for "backward" is made before."""
    shapes = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)
    options = dict(dtype=getattr(torch, dtype), device=device)
    draw = functools.partial(torch.randn, **options)
    if operation == "attention":
        inputs = [draw(batch, heads, length, size) for heads, size in shapes]
        grouped = {"enable_gqa": True} if heads != kv_heads else {}
        attend = functools.partial(
            scaled_dot_product_attention, is_causal=mask == "causal", **grouped
        )
    else:
        inputs = [draw(batch, length, *shape) for shape in shapes]
        features = [head_dim] * (operation == "channel")
        decay = torch.randn(batch, length, heads, *features, device=device)
        inputs.append(logsigmoid(decay))
        attend = linear(operation)
    if way == "forward":
        return lambda: attend(*inputs)
    for x in inputs:
        x.requires_grad_()
    out = attend(*inputs)
    gradient = torch.randn_like(out)
    gradients = functools.partial(torch.autograd.grad, inputs=inputs, grad_outputs=gradient)
    if way == "backward":
        return lambda: gradients(out, retain_graph=True)
    return lambda: gradients(attend(*inputs))


def linear(operation):
    """flash-linear-attention with a decay of the head ("scalar") or of each key channel."""
    if operation == "scalar":
        from fla.ops.simple_gla import chunk_simple_gla as attend
    else:
        from fla.ops.gla import chunk_gla as attend
    return lambda q, k, v, decay: attend(q, k, v, decay)[0]


if __name__ == "__main__":
    main()
