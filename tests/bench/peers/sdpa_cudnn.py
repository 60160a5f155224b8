"""Times torch's scaled_dot_product_attention on cuDNN at the shapes of tree_attention_test, sustained.

sdpa_cudnn.py [time] [dualkv]; default: both. Prints one JSON line a shape. Half a second of load
first, then the median of 21 runs (7 when long): the power limit then holds the clock where the other
kernels run too. A prompt with responses is composed of three calls: the prompt causal, the responses
dense over the prompt, the responses causal over themselves; merging their results is left out.
"""
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CAUSAL = 16384
HEADS = [(32, 8, 128), (32, 8, 64), (16, 4, 256)]
RESPONSE = 2048
DUALKV = [(28, 4096), (28, 16384), (16, 32768), (28, 32768)]


def median_ms(run, repeats):
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def sustained_ms(run, repeats):
    once = median_ms(run, 3)
    for _ in range(int(500 / once) + 1):
        run()
    return median_ms(run, repeats)


class Call:
    """One attention of `rows` query rows over `keys` keys, `batch` times."""

    def __init__(self, heads, batch, rows, keys, causal):
        q_heads, kv_heads, dim = heads
        self.causal = causal
        self.inputs = tuple(
            torch.randn(batch, h, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for h, n in ((q_heads, rows), (kv_heads, keys), (kv_heads, keys))
        )
        self.d_out = torch.randn_like(self.inputs[0])
        self.pairs = batch * (rows * (rows + 1) / 2 if causal else rows * keys)

    def forward(self):
        return torch.nn.functional.scaled_dot_product_attention(
            *self.inputs, is_causal=self.causal, enable_gqa=True)

    def backward(self, out):
        return torch.autograd.grad(out, self.inputs, self.d_out, retain_graph=True)


def time_calls(shape, heads, calls):
    q_heads, kv_heads, dim = heads
    flops = 4 * q_heads * dim * sum(call.pairs for call in calls)
    repeats = 7 if flops > 1e13 else 21
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        outs = [call.forward() for call in calls]
        with torch.no_grad():
            forward = sustained_ms(lambda: [call.forward() for call in calls], repeats)
        backward = sustained_ms(
            lambda: [call.backward(out) for call, out in zip(calls, outs)], repeats)
    for op, ms, factor in (("forward", forward, 1), ("backward", backward, 2.5)):
        print(json.dumps({
            "bench": "attention", "op": op, "shape": shape, "heads": f"{q_heads}/{kv_heads}",
            "head_dim": dim, "mode": "torch cudnn", "clock": "sustained", "ms": round(ms, 4),
            "tflops": round(factor * flops / ms * 1e-9, 1)}), flush=True)


def main():
    words = sys.argv[1:] or ["time", "dualkv"]
    if "time" in words:
        for heads in HEADS:
            time_calls(f"causal {CAUSAL}", heads, [Call(heads, 1, CAUSAL, CAUSAL, True)])
    if "dualkv" in words:
        for responses, prompt in DUALKV:
            heads = HEADS[0]
            time_calls(f"{prompt} + {responses} x {RESPONSE}", heads, [
                Call(heads, 1, prompt, prompt, True),
                Call(heads, 1, responses * RESPONSE, prompt, False),
                Call(heads, responses, RESPONSE, RESPONSE, True)])


if __name__ == "__main__":
    main()
