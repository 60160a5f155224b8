"""Golden files of tokenizers: ids and decoded text of 2,000 strings by Hugging Face tokenizers.

Writes golden/tokenizers/strings.bin, <name>.ids.bin and <name>.json for each small tokenizer trained here; SmolLM2's is
read from its GGUF. Formats: tests/parity/README.md.
"""

import pathlib
import random
import struct

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/parity/golden/tokenizers"
SMOLLM2 = ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20261121
COUNT = 2000

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

WORDS = """the of and to in is that it was for on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down only
way find use may water long little very after words called just where most know get through back much before go good new
write our used me man too any day same right look think also around another came come work three word must because does
part even place well such here take why things help put years different away again off went old number great tell men say
small every found still between name should home big give air line set own under read last never us left end along while
might next sound below saw something thought both few those always looked show large often together asked house world going
want school important until form food keep children feet land side without boy once animals life enough took sometimes four
head above kind began almost live page got earth need far hand high year mother light parts country father let night
""".split()
NON_LATIN = ["你好世界", "東京都に行きました", "한국어 문장입니다", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
             "Привет, мир", "Γειά σου Κόσμε", "ჰამარჯობა", "Xin chào thế giới", "ﬁne ﬀ ſo K Å", "İstanbul ıi", "ﷺ ﷽", "ⅷ ½ ² ٣ ๓ 万"]
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☕", "🧑‍🚀", "1️⃣", "⌚️", "🤷🏿‍♀️", "\U0001FAE0", "\U0001F9D1\u200d\U0001F4BB"]
CODE = ["def f(x):\n\treturn x**2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\n", "<div class=\"x\">&amp;</div>\r\n",
        "SELECT * FROM t WHERE id='1';--", "a->b::c<d>()...", "#include <vector>\n\n\n", "{\"k\": [1, 2.5e-3, null]}", "x = 'it''s'",
        "$ ls -la | grep \"foo\" > /dev/null 2>&1", "λx.x ∘ ∀y∃z ≤ ≥ ≠ → ⇒ √2 ≈ 1.414", "https://example.org/a?b=c&d=%20#e"]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>", "<empty_output>", "<|begin_of_text|>",
            "<mask>", "<left>", "<right>", "word_tok", "\u304ctok", "\u304b\u3099tok", "<|im_start", "im_end|>", "<|im_end|><|im_end|>"]
SPACES = [" ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u180e", "\u0085", "\u2028", "\ufeff", "\v", "\f"]
INVALID = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\x80",
           b"\xf8\x88\x80\x80\x80", b"\xe2\x28\xa1", b"\xf0\x28\x8c\xbc", b"\xfe\xfe\xff\xff"]
MARKS = ["\u0301", "\u0323", "\u0308", "\u0327", "\u0345", "\u3099", "\u05b0", "\u0651", "\u093c", "\u1161", "\u11a8", "\u20dd"]


def code_point(rng):
    while True:
        c = rng.choice([rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x20000)])
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def piece(rng):
    """One random bit of a string, as bytes."""
    kind = rng.randrange(13)
    if kind <= 2:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
        text = rng.choice([str.lower, str.upper, str.title, str.swapcase])(text) + rng.choice(["", ".", "!?", "'s", "'LL", "’t", "\u017f", "'\u017f"])
    elif kind == 3:
        text = rng.choice(NON_LATIN)
    elif kind == 4:
        text = rng.choice(EMOJI) * rng.randint(1, 3)
    elif kind == 5:
        text = rng.choice(CODE)
    elif kind == 6:
        text = rng.choice(SPECIALS)
    elif kind == 7:
        text = rng.choice(SPACES) * rng.choice([1, 1, 2, 3, 7, 40, 200]) + rng.choice(["", rng.choice(SPACES)])
    elif kind == 8:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 15)))
    elif kind == 9:
        return rng.choice(INVALID)
    elif kind == 10:
        text = "".join(code_point(rng) for _ in range(rng.randint(1, 8)))
    elif kind == 11:
        text = rng.choice("aeioncAEOうは\u0915\u1100\uac00") + "".join(rng.choice(MARKS) for _ in range(rng.randint(1, 6)))
    else:
        text = "".join(chr(rng.randrange(0x21)) for _ in range(rng.randint(1, 5)))
    return text.encode()


def make_strings():
    rng = random.Random(SEED)
    strings = [b"", b" ", b"\n", b"\x00", b"a", b"  a", b"a" * 3000, b" " * 2000, b"ab" * 1500, "é".encode() * 500, b"\xff" * 100]
    while len(strings) < COUNT:
        strings.append(rng.choice([b"", b" "]).join(piece(rng) for _ in range(rng.randint(1, 7))))
    return strings


def corpus():
    rng = random.Random(SEED + 1)
    for _ in range(3000):
        words = " ".join(rng.choice(WORDS) for _ in range(20))
        yield words + rng.choice([". ", "\n", "\n\n    "]) + rng.choice(NON_LATIN + EMOJI + CODE) + str(rng.randrange(10**6))


def train(pre_tokenizer, vocab_size, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def qwen2_style():
    tokenizer = train(split_then_bytes(QWEN2), 1200, normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["\u304b\u3099tok", AddedToken("word_tok", single_word=True, normalized=False)])
    return tokenizer


def llama3_style():
    """ignore_merges, a bos token from the template, and added tokens with every flag."""
    tokenizer = train(split_then_bytes(LLAMA3), 1000)
    tokenizer.model.ignore_merges = True
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|im_end|>", AddedToken("<left>", lstrip=True, special=True),
                                  AddedToken("<right>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("word_tok", single_word=True)])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])])
    return tokenizer


def gpt2_style():
    """A space before every text, digits in runs, another normal form."""
    tokenizer = train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=True)]),
                      800, normalizers.NFD())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def smollm2_tokenizer(path):
    """SmolLM2's tokenizer from the fields of its GGUF."""
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types) if kind == 3])
    return tokenizer


def write_ids(name, tokenizer, strings):
    with open(OUT / f"{name}.ids.bin", "wb") as out:
        for data in strings:
            ids = tokenizer.encode(data.decode("utf-8", errors="replace"), add_special_tokens=True).ids
            decoded = tokenizer.decode(ids, skip_special_tokens=True).encode()
            out.write(struct.pack(f"<I{len(ids)}HI", len(ids), *ids, len(decoded)) + decoded)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    strings = make_strings()
    (OUT / "strings.bin").write_bytes(b"".join(struct.pack("<I", len(s)) + s for s in strings))
    for build in [qwen2_style, llama3_style, gpt2_style]:
        # Loaded again from its file: that is what the C++ reads.
        tokenizer = build()
        tokenizer.save(str(OUT / f"{build.__name__}.json"), pretty=False)
        write_ids(build.__name__, Tokenizer.from_file(str(OUT / f"{build.__name__}.json")), strings)
    write_ids("smollm2", smollm2_tokenizer(SMOLLM2), strings)
    print(f"{len(strings)} strings, {sum(map(len, strings))} bytes")


if __name__ == "__main__":
    main()
