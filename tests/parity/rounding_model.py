"""A decoder whose every rounding to bf16 is a switch: where kernels/cuda and trainer store bf16 in forward and backward, and
nowhere else. All other arithmetic is that of the tensors' dtype.

`points` is a set of places. A place rounds to bf16 if its name is in the set, to f16 if NAME:f16 is.
"""

import dataclasses
import math

import torch

# What feeds a tensor core; more bits there take another product. "rotated": q and k after norm and RoPE; "d_branch": the residual
# gradient as o and down get it; "p_again", "d_s": P and dS of attention's backward.
OPERANDS = ["attn_in", "rotated", "v", "p", "attn_out", "mlp_in", "mlp_act", "hidden"]
BACK_OPERANDS = ["d_logits", "d_branch", "d_gate_up", "d_attn_out", "p_again", "d_s", "d_qkv"]
# What is only stored, and could be wider. "mid", "output": the residual stream after either half; "qk": before norm and RoPE;
# "d_rotated": dQ, dK and dV of attention; "delta": the output whose row sums with d_attn_out make dS.
STORED = ["mid", "output", "qk", "gate_up"]
BACK_STORED = ["d_hidden", "d_residual", "d_mlp_act", "d_mlp_in", "d_rotated", "d_attn_in", "delta"]
RESIDUAL = ["mid", "output"]
FORWARD = OPERANDS + STORED
EVERYWHERE = FORWARD + BACK_OPERANDS + BACK_STORED
# Besides, not in EVERYWHERE: "branch": what is added to a wider stream; "again": a wider stream as norms' backward reads it;
# "split_k": the halves of products that split k in two.


def bf16(x):
    return x.to(torch.bfloat16).to(x.dtype)


def f16(x):
    """The 11 bits of f16, to nearest even, without its limits: gradients are taken to be scaled into its range."""
    fraction, exponent = x.frexp()
    return torch.ldexp((fraction * 2048).round() / 2048, exponent)


def rounded(x, place, points):
    return bf16(x) if place in points else f16(x) if place + ":f16" in points else x


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, back, points):
        ctx.back, ctx.points = back, points
        return rounded(x, there, points).clone()

    @staticmethod
    def backward(ctx, d):
        return rounded(d, ctx.back, ctx.points), None, None, None


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, points):
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(rounded(x, "again", points) * rstd, rstd, weight)
        return x * rstd * weight

    @staticmethod
    def backward(ctx, d):
        unit, rstd, weight = ctx.saved_tensors
        g = d * weight
        d_weight = (d * unit).flatten(0, -2).sum(0)
        return rstd * (g - unit * (g * unit).mean(-1, keepdim=True)), d_weight, None, None


class Attention(torch.autograd.Function):
    """Causal. P is rounded as exp(s - max) before P V, and as exp(s - lse) in backward."""

    @staticmethod
    def forward(ctx, q, k, v, points):
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        e = (s - s.amax(-1, keepdim=True)).exp()
        total = e.sum(-1, keepdim=True)
        out = rounded(e, "p", points) @ v / total
        ctx.save_for_backward(q, k, v, e / total, rounded(out, "delta", points))
        ctx.points = points
        return rounded(out, "attn_out", points)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, p, out = ctx.saved_tensors
        d_s = p * (d_out @ v.transpose(-1, -2) - (d_out * out).sum(-1, keepdim=True))
        d_s, p = rounded(d_s, "d_s", ctx.points), rounded(p, "p_again", ctx.points)
        scale = 1 / math.sqrt(q.shape[-1])
        return d_s @ k * scale, d_s.transpose(-1, -2) @ q * scale, p.transpose(-1, -2) @ d_out, None


class HeadLoss(torch.autograd.Function):
    """-mean(advantage * log-prob) - 0.01 * mean entropy; the logits' gradient is formed in one step, as the head does."""

    @staticmethod
    def forward(ctx, logits, targets, advantages):
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
        ctx.save_for_backward(log_p, entropy, targets, advantages)
        return -(advantages * log_p.gather(1, targets[:, None])[:, 0] + 0.01 * entropy[:, 0]).mean()

    @staticmethod
    def backward(ctx, d):
        log_p, entropy, targets, advantages = ctx.saved_tensors
        p = log_p.exp()
        hot = torch.nn.functional.one_hot(targets, p.shape[1])
        d_logits = -advantages[:, None] * (hot - p) + 0.01 * p * (log_p + entropy)
        return d * d_logits / len(targets), None, None


@dataclasses.dataclass
class Model:
    q_heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    embedding: torch.Tensor
    head: torch.Tensor
    final_norm: torch.Tensor
    layers: list  # of dictionaries: attn_norm, qkv, [q_norm, k_norm], o, mlp_norm, gate_up, down

    def tensors(self):
        yield from [("embedding", self.embedding), ("head", self.head), ("final_norm", self.final_norm)]
        for i, layer in enumerate(self.layers):
            yield from ((f"layers.{i}.{name}", tensor) for name, tensor in layer.items())

    def qkv_sizes(self):
        return [self.q_heads * self.head_dim] + [self.kv_heads * self.head_dim] * 2


def rope_table(model, length, dtype):
    w = model.theta ** (-torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * w
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, table):
    (a, b), (cosine, sine) = x.chunk(2, -1), table
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def product(x, weight, points):
    if "split_k" not in points:
        return x @ weight.T
    k = x.shape[-1] // 2
    return bf16(x[..., :k] @ weight[:, :k].T) + bf16(x[..., k:] @ weight[:, k:].T)


def forward(model, tokens, rows, points):
    """Logits [number of rows, vocab] of tokens [sequences, length] at rows [sequences, length] bool."""
    at = lambda x, there, back="": Round.apply(x, there, back, points)
    norm = lambda x, weight: RmsNorm.apply(x, weight, model.eps, points)
    heads = lambda x: x.unflatten(-1, (-1, model.head_dim)).transpose(1, 2)
    for_q = lambda x: x.repeat_interleave(model.q_heads // model.kv_heads, 1)
    x = model.embedding[tokens]
    table = rope_table(model, tokens.shape[1], x.dtype)
    for w in model.layers:
        normed = at(norm(x, w["attn_norm"]), "attn_in", "d_attn_in")
        q, k, v = at(product(normed, w["qkv"], points), "", "d_qkv").split(model.qkv_sizes(), -1)
        q, k, v = heads(at(q, "qk")), heads(at(k, "qk")), heads(at(v, "v", "d_rotated"))
        if "q_norm" in w:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        q, k = at(rotate(q, table), "rotated", "d_rotated"), at(rotate(k, table), "rotated", "d_rotated")
        out = at(Attention.apply(q, for_q(k), for_q(v), points).transpose(1, 2).flatten(-2), "", "d_attn_out")
        x = at(x + at(product(out, w["o"], points), "branch", "d_branch"), "mid", "d_residual")
        normed = at(norm(x, w["mlp_norm"]), "mlp_in", "d_mlp_in")
        gate, up = at(product(normed, w["gate_up"], points), "gate_up", "d_gate_up").chunk(2, -1)
        act = at(torch.nn.functional.silu(gate) * up, "mlp_act", "d_mlp_act")
        x = at(x + at(product(act, w["down"], points), "branch", "d_branch"), "output", "d_residual")
    hidden = at(norm(x[rows], model.final_norm), "hidden", "d_hidden")
    return at(hidden @ model.head.T, "", "d_logits")
