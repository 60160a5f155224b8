"""Golden files of models: logits, greedy continuations and parameter gradients by transformers, fp32, eager attention.

Writes golden/tiny/<name>/ (a model directory as transformers saves it, and golden.safetensors) and golden/smollm2.safetensors.
Every array is f32, token ids included. Names: tests/parity/README.md.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/parity/golden"
SMOLLM2 = ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 32
GREEDY_PROMPTS = 20
# A greedy choice counts only if rounding cannot turn it: best minus second best logit.
MIN_MARGIN = 2e-3

SHAPE = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=128, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
DEFAULT = dict(rope_type="default", rope_theta=50000.0)

# name: configuration, extra fields, storage dtype, bytes per shard
TINY = {
    "llama_llama3_sharded": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3), torch.float32, "60KB"),
    "llama_linear_tied": (transformers.LlamaConfig, dict(rope_parameters=LINEAR, tie_word_embeddings=True),
                          torch.bfloat16, "1GB"),
    "qwen2_tied": (transformers.Qwen2Config, dict(rope_parameters=DEFAULT, tie_word_embeddings=True),
                   torch.float32, "1GB"),
    "qwen2_untied": (transformers.Qwen2Config, dict(rope_parameters=DEFAULT, rms_norm_eps=1e-5), torch.float16, "1GB"),
    "qwen3_tied": (transformers.Qwen3Config, dict(rope_parameters=DEFAULT, head_dim=16, tie_word_embeddings=True),
                   torch.float16, "1GB"),
    "qwen3_untied_mha": (transformers.Qwen3Config,
                         dict(rope_parameters=DEFAULT, head_dim=16, num_key_value_heads=4), torch.float32, "1GB"),
}

SMOLLM2_TEXTS = [
    "The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return", "Water boils at",
    "Once upon a time, in a small village,", "The three primary colours are", "import numpy as np\n\n",
    "Q: What is 12 + 30?\nA:", "Roses are red,", "To make a cup of tea, first", "The mitochondria is",
    "In 1969, the first human", "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nCount from one to ten.<|im_end|>\n<|im_start|>assistant\n", "SELECT name FROM users WHERE",
    "The quick brown fox", "A triangle has three", "My favourite season is", "Dear Sir or Madam,\n\n",
    "The speed of light is approximately", "1, 2, 3, 4, 5,", "int main(int argc, char** argv) {\n",
    "Photosynthesis is the process by which", "The largest planet in the solar system is", "Paris, London, Berlin,",
    "<|im_start|>user\nSay hello in French.<|im_end|>\n<|im_start|>assistant\n", "If x = 3 and y = 4, then x * y =",
    "The opposite of hot is", "# Introduction\n\nMachine learning", "Monday, Tuesday,", "The cat sat on the",
    "Breathing is important because", "Shakespeare wrote", "The Pacific Ocean is", "An apple a day",
]


def randomize(model, generator):
    """Weights of order one, so that every term of the forward pass matters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * (0.5 if "embed_tokens" in name else 1.2 * p.shape[1] ** -0.5))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def greedy(model, prompt):
    """The continuation, or None if one of its choices is closer than MIN_MARGIN."""
    tokens = list(prompt)
    out = None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            step = torch.tensor([tokens if out is None else tokens[-1:]])
            out = model(step, past_key_values=None if out is None else out.past_key_values, use_cache=True)
            top = out.logits[0, -1].topk(2)
            if top.values[0] - top.values[1] < MIN_MARGIN:
                return None
            tokens.append(int(top.indices[0]))
    return tokens[len(prompt):]


def add_greedy(golden, model, prompts):
    found = 0
    for prompt in prompts:
        continuation = greedy(model, prompt) if found < GREEDY_PROMPTS else None
        if continuation is not None:
            golden[f"greedy.{found}.prompt"] = np.array(prompt, np.float32)
            golden[f"greedy.{found}.continuation"] = np.array(continuation, np.float32)
            found += 1
    if found < GREEDY_PROMPTS:
        raise SystemExit(f"only {found} prompts with margins above {MIN_MARGIN}: add prompts")


def backward(model, golden, prompt, responses, advantages):
    """loss = - sum over responses of advantage * sum of log-probs; each sequence runs on its own."""
    model.zero_grad()
    total = 0.0
    for i, (response, advantage) in enumerate(zip(responses, advantages)):
        tokens = torch.tensor([list(prompt) + list(response)])
        logprobs = torch.log_softmax(model(tokens).logits[0, len(prompt) - 1:-1], -1)
        picked = logprobs.gather(1, tokens[0, len(prompt):, None])[:, 0]
        loss = -advantage * picked.sum()
        loss.backward()
        total += loss.item()
        golden[f"group.response.{i}"] = np.array(response, np.float32)
        golden[f"group.logprobs.{i}"] = picked.detach().numpy()
    golden["group.prompt"] = np.array(prompt, np.float32)
    golden["group.advantages"] = np.array(advantages, np.float32)
    golden["group.loss"] = np.array([total], np.float32)


def signs(n):
    """[n] uint32 whose low 16 bits are 16 independent random signs of element i; the same hash as in golden.cc."""
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint32) + np.uint32(0x9E3779B9)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    return x


def digest(array):
    """Norm, 16 random projections and 64 entries of a tensor too large to store."""
    flat = array.reshape(-1).astype(np.float64)
    bits = signs(flat.size)
    total = flat.sum()
    projections = [total - 2.0 * flat[(bits & np.uint32(1 << b)) != 0].sum() for b in range(16)]
    entries = flat[np.arange(64, dtype=np.int64) * 1000003 % flat.size]
    return np.concatenate([[np.linalg.norm(flat)], projections, entries]).astype(np.float32)


def make_tiny(name, seed):
    config_class, fields, dtype, shard = TINY[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **fields}))
    randomize(model, generator)
    directory = GOLDEN / "tiny" / name
    shutil.rmtree(directory, ignore_errors=True)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    # Loaded again: the golden numbers belong to the stored, rounded weights.
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    draw = lambda n: [int(t) for t in rng.integers(3, SHAPE["vocab_size"], n)]

    golden = {}
    tokens = draw(150)
    golden["logits.tokens"] = np.array(tokens, np.float32)
    golden["logits"] = logits_of(model, tokens).numpy()
    add_greedy(golden, model, [draw(int(n)) for n in rng.integers(1, 60, 400)])
    backward(model, golden, draw(37), [draw(9), draw(1), draw(20)], [1.5, -0.75, 0.25])
    for key, p in model.named_parameters():
        golden[f"grad.{key}"] = p.grad.numpy()
    save_file(golden, directory / "golden.safetensors")
    print(f"{name}: loss {golden['group.loss'][0]:.6f}, largest logit {np.abs(golden['logits']).max():.3f}")


def make_smollm2():
    from golden_tokenizers import smollm2_tokenizer

    tokenizer = smollm2_tokenizer(SMOLLM2)
    encode = lambda text: tokenizer.encode(text).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(
        SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32, attn_implementation="eager")
    # The GGUF names token 2 (<|im_end|>) as padding, whose gradient torch would drop; here it is a token like any other.
    model.model.embed_tokens.padding_idx = None
    golden = {}
    for i, text in enumerate(SMOLLM2_TEXTS[:4]):
        tokens = encode(text * (1 if i < 3 else 12))
        logits = logits_of(model, tokens).numpy()
        golden[f"logits.{i}.tokens"] = np.array(tokens, np.float32)
        golden[f"logits.{i}.rows"] = np.stack([digest(row) for row in logits])
        if i < 2:
            golden[f"logits.{i}.last"] = logits[-1]
    add_greedy(golden, model, [encode(text) for text in SMOLLM2_TEXTS])
    prompt = encode("<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n")
    responses = [encode(t) for t in ["7 + 5 is equal to 12.<|im_end|>", "The answer is 13", "12"]]
    backward(model, golden, prompt, responses, [1.0, -0.5, 0.75])
    for key, p in model.named_parameters():
        golden[f"grad_digest.{key}"] = digest(p.grad.numpy())
    save_file(golden, GOLDEN / "smollm2.safetensors")
    print(f"smollm2: loss {golden['group.loss'][0]:.6f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    for index, tiny in enumerate(TINY):
        make_tiny(tiny, 1000 + index)
    make_smollm2()
