#!/usr/bin/env python3
"""Writes chat_golden.json beside this file: prompts as transformers renders and tokenizes them,
from the model's own template and from small ones that use what templates in the wild use.

Usage: make_chat_golden.py MODEL.gguf      (needs transformers, torch, gguf; the file says which)
"""

import json
import pathlib
import sys

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "Sort 3, 1, 2.\n  Then say <done> & 'bye' — 你好 🌱"}
REPLY = {"role": "assistant", "content": "1, 2, 3"}
CONVERSATIONS = {
    "user": [USER],
    "system_user": [SYSTEM, USER],
    "two_turns": [SYSTEM, USER, REPLY, {"role": "user", "content": ""}],
    "ends_with_reply": [USER, REPLY],
}
TOOL = {"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {}}}
TEMPLATES = {
    "blocks_are_trimmed": """{%- for m in messages %}
  {% if m.role == 'user' %}
    U: {{ m.content | trim }}
  {% else %}
O: {{ m.content }}
  {% endif %}
{% endfor %}
end
""",
    "tojson": "{% for m in messages %}{{ m | tojson }}|{{ m | tojson(indent=2) }}{% endfor %}"
    "{{ tools | tojson }}",
    "loop_controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ loop.index }}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation_block": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}",
    "namespace_and_slices": "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m['content'][:3] }}{% endfor %}"
    "{% if add_generation_prompt %}>>{% endif %}",
}


def model_cases(path: pathlib.Path) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cases = []
    for name, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            ids = tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
            )
            case = {"name": name, "messages": messages, "add_generation_prompt": prompt}
            cases.append({**case, "text": text, "token_ids": list(ids)})
    return cases


def template_cases() -> list[dict]:
    cases = []
    for name, template in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                tools=[TOOL],
                add_generation_prompt=True,
            )
            case = {"name": f"{name}/{conversation}", "template": template, "messages": messages}
            cases.append({**case, "tools": [TOOL], "text": rendered[0]})
    return cases


def main() -> None:
    golden = {
        "made_with": f"transformers {transformers.__version__}, {pathlib.Path(sys.argv[1]).name}",
        "model": model_cases(pathlib.Path(sys.argv[1])),
        "templates": template_cases(),
    }
    out = pathlib.Path(__file__).with_name("chat_golden.json")
    out.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(golden['model'])} + {len(golden['templates'])} cases")


if __name__ == "__main__":
    main()
