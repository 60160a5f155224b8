"""Chat templates: the globals, filters and refusals that templates in the wild rely on."""

import datetime
import json
import pathlib

import coppice
import pytest
from coppice import chat

USER = [{"role": "user", "content": "hi"}]
# Made by transformers, see make_chat_golden.py.
GOLDEN = json.loads(
    pathlib.Path(__file__).with_name("chat_golden.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", GOLDEN["templates"], ids=lambda case: case["name"])
def test_renders_what_transformers_renders(case):
    assert chat.render(case["template"], case["messages"], tools=case["tools"]) == case["text"]


def test_trims_blocks_like_transformers():
    template = "{% for m in messages %}\n  {{ m['content'] }}\n{% endfor %}\n"
    assert chat.render(template, USER) == "  hi\n"


def test_tojson_keeps_html_and_unicode():
    assert chat.render("{{ {'a': '<é>'} | tojson }}", USER) == '{"a": "<é>"}'


def test_strftime_now_and_tokens():
    template = "{{ bos_token }}{{ strftime_now('%Y') }}{{ eos_token }}"
    year = datetime.datetime.now().year
    text = chat.render(template, USER, bos_token="<s>", eos_token="</s>")
    assert text in {f"<s>{year}</s>", f"<s>{year + 1}</s>"}


def test_raise_exception_is_an_invalid_argument():
    with pytest.raises(coppice.InvalidArgumentError, match="roles must alternate"):
        chat.render("{{ raise_exception('roles must alternate') }}", USER)


def test_loop_controls_generation_blocks_tools_and_own_variables():
    template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}"
        "{% endfor %}{{ tools | length }}{{ thinking }}"
    )
    assert chat.render(template, USER * 2, tools=[{}], thinking="on") == "hi1on"


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"]
)
def test_templates_run_in_a_sandbox(template):
    with pytest.raises(coppice.InvalidArgumentError):
        chat.render(template, USER)


def test_a_broken_template_and_an_absent_one_say_so():
    with pytest.raises(coppice.InvalidArgumentError, match="chat template failed"):
        chat.render("{% for %}", USER)
    with pytest.raises(coppice.FailedPreconditionError, match="ships none"):
        chat.render("", USER)
    with pytest.raises(coppice.InvalidArgumentError, match="at least one message"):
        chat.render("x", [])
