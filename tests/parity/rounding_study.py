"""Which rounding to bf16 costs what: tables of each place alone, all together, all but one, and sets of changes. Places and what
they mean: rounding_model.py. What came of it: kernels/cuda/README.md.

    rounding_study.py logprobs    SmolLM2 on the parity prompts: mean and largest |log-prob - exact| (5 minutes)
    rounding_study.py gradients   the models of tests/trainer/cuda_gradient_test.cc: |got - want| / |want| (6 minutes a seed)
    rounding_study.py floor       transformers' own bf16 model beside either, for scale (1 minute)

"Exact" is the same model with no rounding, its weights in bf16. Needs what requirements.txt lists; `logprobs` and `floor` read
build/models (deploy/fetch_model.sh). One thread of the CPU, no GPU.
"""

import argparse
import pathlib
import statistics

import torch
import transformers
from safetensors.torch import load_file

from rounding_model import (BACK_STORED, EVERYWHERE, FORWARD, OPERANDS, RESIDUAL, STORED, HeadLoss, Model, bf16, forward)

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDEN = ROOT / "tests/parity/golden/smollm2.safetensors"


def to_f16(places):
    return [place + ":f16" for place in places]


def print_table(title, measure, places, changes, only_changes):
    """`changes`: name, places that round no more, places that round instead."""
    everywhere = frozenset(places)
    rows = [("everywhere", everywhere)]
    if not only_changes:
        rows += [(f"{p} alone", frozenset([p])) for p in places]
        rows += [(f"all but {p}", everywhere - {p}) for p in places]
    rows += [(name, everywhere - set(without) | set(instead)) for name, without, instead in changes]
    print(title)
    for name, points in rows:
        print(f"{name:48}" + "".join(f"{v:10.2e}" for v in measure(points)), flush=True)


# ---- Log-probs of SmolLM2

QKV_OPERANDS = ["rotated", "v", "p"]
LOGPROB_CHANGES = [
    ("residual f32", RESIDUAL, []),
    ("residual f32, branches bf16", RESIDUAL, ["branch"]),
    ("residual, gate_up f32", RESIDUAL + ["gate_up"], []),
    ("residual, qk f32", RESIDUAL + ["qk"], []),
    ("operands alone", STORED, []),
    ("rotated, v, p f16", QKV_OPERANDS, to_f16(QKV_OPERANDS)),
    ("residual f32; rotated, v, p f16", RESIDUAL + QKV_OPERANDS, to_f16(QKV_OPERANDS)),
    ("everywhere f16", FORWARD, to_f16(FORWARD)),
    ("residual f32, else f16", FORWARD, to_f16(OPERANDS + ["qk", "gate_up"])),
    ("everywhere, and split-k in halves", [], ["split_k"]),
    ("residual f32, and split-k in halves", RESIDUAL, ["split_k"]),
]


def load_smollm2():
    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32,
                                                             attn_implementation="eager")


def model_of(hf):
    """The same weights, those of qkv and of gate and up merged."""
    c, state = hf.config, hf.state_dict()
    layers = []
    for i in range(c.num_hidden_layers):
        get = lambda *names: torch.cat([state[f"model.layers.{i}.{name}.weight"] for name in names])
        layers.append({"attn_norm": get("input_layernorm"),
                       "qkv": get("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": get("self_attn.o_proj"),
                       "mlp_norm": get("post_attention_layernorm"), "gate_up": get("mlp.gate_proj", "mlp.up_proj"),
                       "down": get("mlp.down_proj")})
    return Model(c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads, c.rms_norm_eps,
                 c.rope_parameters["rope_theta"], state["model.embed_tokens.weight"], state["lm_head.weight"],
                 state["model.norm.weight"], layers)


def parity_sequences():
    """Tokens [20, length], padded on the right, and the rows whose next token belongs to a continuation."""
    golden = load_file(GOLDEN)
    pairs = [(golden[f"greedy.{i}.prompt"].long(), golden[f"greedy.{i}.continuation"].long()) for i in range(20)]
    length = max(len(p) + len(c) for p, c in pairs)
    tokens, rows = torch.zeros(20, length, dtype=torch.long), torch.zeros(20, length, dtype=torch.bool)
    for i, (prompt, continuation) in enumerate(pairs):
        tokens[i, :len(prompt) + len(continuation)] = torch.cat([prompt, continuation])
        rows[i, len(prompt) - 1:len(prompt) + len(continuation) - 1] = True
    return tokens, rows


def logprobs(logits, tokens, rows):
    return logits.double().log_softmax(-1).gather(1, tokens.roll(-1, 1)[rows][:, None])[:, 0]


def distance(got, want):
    gap = (got - want).abs()
    return gap.mean().item(), gap.max().item()


def round_weights(hf):
    for p in hf.parameters():
        p.copy_(bf16(p))
    return hf


@torch.no_grad()
def study_logprobs(only_changes):
    tokens, rows = parity_sequences()
    run = lambda model, points: logprobs(forward(model, tokens, rows, points), tokens, rows)
    unrounded = run(model_of(load_smollm2()), frozenset())
    model = model_of(round_weights(load_smollm2()))
    exact, all_rounded = run(model, frozenset()), run(model, frozenset(FORWARD))
    print("against weights in f32: weights alone mean %.2e, largest %.2e" % distance(exact, unrounded))
    print("weights and everywhere mean %.2e, largest %.2e" % distance(all_rounded, unrounded))
    print_table("SmolLM2, nats: mean, largest", lambda points: distance(run(model, points), exact), FORWARD, LOGPROB_CHANGES,
                only_changes)


@torch.no_grad()
def floor_of_logprobs():
    tokens, rows = parity_sequences()
    hf = round_weights(load_smollm2())
    exact = logprobs(hf(tokens).logits[rows], tokens, rows)
    ours = logprobs(forward(model_of(hf), tokens, rows, frozenset()), tokens, rows)
    print("rounding_model.py against transformers, both f32: mean %.2e, largest %.2e" % distance(ours, exact))
    got = logprobs(hf.to(torch.bfloat16)(tokens).logits[rows], tokens, rows)
    print("transformers bf16 against f32: mean %.2e, largest %.2e" % distance(got, exact))


# ---- Gradients of small models

# Prompt and response lengths of the test's cases, run flat.
CASES = {"PromptBeyondATile": (129, [40] * 3), "ResponsesOfOneToken": (100, [1] * 4), "ResponsesBelowATile": (256, [7] * 3),
         "UnequalResponses": (77, [1, 130, 64, 3]), "OneSample": (200, [33])}
ATTENTION = ["rotated", "v", "p", "p_again", "d_s", "d_attn_out", "delta"]
GRADIENT_CHANGES = [
    ("residual f32", RESIDUAL, []),
    ("residual, d_residual f32", RESIDUAL + ["d_residual"], []),
    ("qk, d_rotated f32", ["qk", "d_rotated"], []),
    ("delta f32", ["delta"], []),
    ("residual, delta f32", RESIDUAL + ["delta"], []),
    ("residual, delta f32, again in bf16", RESIDUAL + ["delta"], ["again"]),
    ("residual, delta, qk f32", RESIDUAL + ["delta", "qk"], []),
    ("residual, delta, qk, d_residual, d_rotated f32", RESIDUAL + ["delta", "qk", "d_residual", "d_rotated"], []),
    ("operands alone", STORED + BACK_STORED, []),
    ("operands alone but attn_in", STORED + BACK_STORED + ["attn_in"], []),
    ("operands alone but attn_in, v", STORED + BACK_STORED + ["attn_in", "v"], []),
    ("operands alone but attn_in, v, rotated", STORED + BACK_STORED + ["attn_in", "v", "rotated"], []),
    ("attention f16", ATTENTION, to_f16(ATTENTION)),
    ("attention, qk f16", ATTENTION + ["qk"], to_f16(ATTENTION + ["qk"])),
    ("attention, qk f16, residual f32", RESIDUAL + ATTENTION + ["qk"], to_f16(ATTENTION + ["qk"])),
    ("forward, delta f16", FORWARD + ["delta"], to_f16(FORWARD + ["delta"])),
    ("everywhere f16", EVERYWHERE, to_f16(EVERYWHERE)),
    ("residual f32, else f16", EVERYWHERE, to_f16([place for place in EVERYWHERE if place not in RESIDUAL])),
]


def random_model(qk_norm, head_dim, gain_one, seed):
    """The test's models: norms around 1, matrices of deviation 0.02 or gain 1, all of it in bf16."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight = lambda x: bf16(x).requires_grad_()
    matrix = lambda n, k: weight(normal(n, k) * (k ** -0.5 if gain_one else 0.02))
    norm = lambda n: weight(1 + 0.2 * normal(n))
    hidden, ffn, vocab, q_heads, kv_heads = 256, 384, 509, 4, 2
    layers = []
    for _ in range(3):
        layer = {"attn_norm": norm(hidden), "qkv": matrix((q_heads + 2 * kv_heads) * head_dim, hidden)}
        if qk_norm:
            layer |= {"q_norm": norm(head_dim), "k_norm": norm(head_dim)}
        layers.append(layer | {"o": matrix(hidden, q_heads * head_dim), "mlp_norm": norm(hidden),
                               "gate_up": matrix(2 * ffn, hidden), "down": matrix(hidden, ffn)})
    return Model(q_heads, kv_heads, head_dim, 1e-5, 10000.0, matrix(vocab, hidden), matrix(vocab, hidden), norm(hidden), layers)


def make_request(case, vocab, seed):
    """Tokens, rows that have a target, targets, advantages."""
    prompt_length, responses = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, vocab, (n,), generator=generator)
    prompt, shape = draw(prompt_length), (len(responses), prompt_length + max(responses))
    tokens, rows = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, n in enumerate(responses):
        tokens[i, :prompt_length + n] = torch.cat([prompt, draw(n)])
        rows[i, prompt_length - 1:prompt_length + n - 1] = True
    advantages = torch.randn(len(responses), generator=generator, dtype=torch.float64)
    return tokens, rows, tokens.roll(-1, 1)[rows], advantages.repeat_interleave(torch.tensor(responses))


def gradients(model, request, points):
    tokens, rows, targets, advantages = request
    loss = HeadLoss.apply(forward(model, tokens, rows, points), targets, advantages)
    return torch.autograd.grad(loss, [tensor for _, tensor in model.tensors()])


def relative_errors(model, got, want):
    return {name: ((a - b).norm() / b.norm()).item() for (name, _), a, b in zip(model.tensors(), got, want)}


def worst(errors, *endings):
    return max(error for name, error in errors.items() if name.endswith(endings))


def others(errors):
    return max(error for name, error in errors.items() if not name.endswith(("q_norm", "k_norm")))


def study_gradients(qk_norm, head_dim, gain_one, seeds, only_changes):
    models = [random_model(qk_norm, head_dim, gain_one, seed) for seed in range(seeds)]
    runs = [(model, make_request(case, len(model.head), 11 + i)) for i, model in enumerate(models) for case in CASES]
    exact = [gradients(*run, frozenset()) for run in runs]

    def measure(points):
        errors = [relative_errors(run[0], gradients(*run, points), want) for run, want in zip(runs, exact)]
        columns = [[worst(e, "q_norm") for e in errors], [worst(e, "k_norm") for e in errors]] if qk_norm else []
        return [f(column) for column in columns + [[others(e) for e in errors]] for f in (min, statistics.mean, max)]

    print_table(f"head_dim {head_dim}, {'qk-norm' if qk_norm else 'no qk-norm'}, {'gain 1' if gain_one else 'initial'}: least, "
                f"mean, largest of {len(runs)} runs for {'q_norm; k_norm; ' if qk_norm else ''}the worst other tensor",
                measure, EVERYWHERE, GRADIENT_CHANGES, only_changes)


# Our tensors' names in transformers, and what is merged here.
HF_NAMES = {"embedding": ["model.embed_tokens"], "head": ["lm_head"], "final_norm": ["model.norm"],
            "attn_norm": ["input_layernorm"], "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "q_norm": ["self_attn.q_norm"], "k_norm": ["self_attn.k_norm"], "o": ["self_attn.o_proj"],
            "mlp_norm": ["post_attention_layernorm"], "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}


def transformers_gradients(model, request, dtype):
    tokens, rows, targets, advantages = request
    hf = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=model.q_heads,
        num_key_value_heads=model.kv_heads, head_dim=model.head_dim, rms_norm_eps=model.eps, vocab_size=len(model.head),
        tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": model.theta})).to(dtype)
    parameters = dict(hf.named_parameters())
    parts = []
    for name, tensor in model.tensors():
        prefix, _, last = name.rpartition(".")
        parts.append([parameters[".".join(filter(None, ["model" if prefix else "", prefix, part, "weight"]))]
                      for part in HF_NAMES[last]])
        for p, values in zip(parts[-1], tensor.detach().split([len(p) for p in parts[-1]])):
            p.data.copy_(values)
    HeadLoss.apply(hf(tokens).logits[rows].double(), targets, advantages).backward()
    return [torch.cat([p.grad.double() for p in ours]) for ours in parts]


def floor_of_gradients():
    model = random_model(True, 128, False, 0)
    for case in CASES:
        request = make_request(case, len(model.head), 11)
        want = gradients(model, request, frozenset())
        for dtype in (torch.float32, torch.bfloat16):
            errors = relative_errors(model, transformers_gradients(model, request, dtype), want)
            print(f"{case}, transformers {dtype}: q_norm %.2e, k_norm %.2e, the worst other tensor %.2e" %
                  (worst(errors, "q_norm"), worst(errors, "k_norm"), others(errors)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["logprobs", "gradients", "floor"])
    parser.add_argument("--changes", action="store_true", help="all places together and the sets of changes only")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--no_qk_norm", action="store_true")
    parser.add_argument("--gain_one", action="store_true", help="matrices that pass on all of the size of what they get")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.study == "logprobs":
        study_logprobs(args.changes)
    elif args.study == "gradients":
        study_gradients(not args.no_qk_norm, args.head_dim, args.gain_one, args.seeds, args.changes)
    else:
        floor_of_logprobs()
        floor_of_gradients()


if __name__ == "__main__":
    main()
