"""Times PyTorch's attention on request; runs under any interpreter that has torch, and no jax.

Each line on stdin is [length, head_dim, heads, causal, backward, threads] in JSON; the answer is a
line with the seconds of one run. The first answer is the version of torch.
"""

import json
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention


def main():
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        length, head_dim, heads, causal, backward, threads = json.loads(line)
        torch.set_num_threads(threads)
        shape = 1, heads, length, head_dim
        q, k, v = (torch.randn(shape, requires_grad=backward) for _ in range(3))
        gradient = torch.randn(shape)
        start = time.perf_counter()
        o = scaled_dot_product_attention(q, k, v, is_causal=causal)
        if backward:
            torch.autograd.grad(o, (q, k, v), gradient)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
