"""Times torch's scaled_dot_product_attention on cuDNN at the shapes of tree_attention_test, sustained.

Prints one JSON line a shape. Half a second of load first, then the median of 21 runs: the power limit
then holds the clock where the other kernels run too.
"""
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS = 16384
HEADS = [(32, 8, 128), (32, 8, 64), (16, 4, 256)]


def median_ms(run, repeats=21):
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def sustained_ms(run):
    once = median_ms(run, 3)
    for _ in range(int(500 / once) + 1):
        run()
    return median_ms(run)


def main():
    for q_heads, kv_heads, dim in HEADS:
        q, k, v = (
            torch.randn(1, h, ROWS, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for h in (q_heads, kv_heads, kv_heads)
        )
        d_out = torch.randn_like(q)

        def attend():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        flops = 4 * q_heads * dim * ROWS * (ROWS + 1) / 2
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = attend()
            with torch.no_grad():
                forward = sustained_ms(attend)
            backward = sustained_ms(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
        for op, ms, factor in (("forward", forward, 1), ("backward", backward, 2.5)):
            print(json.dumps({
                "bench": "attention", "op": op, "shape": f"causal {ROWS}", "heads": f"{q_heads}/{kv_heads}",
                "head_dim": dim, "mode": "torch cudnn", "clock": "sustained", "ms": round(ms, 4),
                "tflops": round(factor * flops / ms * 1e-9, 1)}), flush=True)


if __name__ == "__main__":
    main()
