"""Chat templates, applied on the client: jinja2 in a sandbox, with the globals and filters that
model authors rely on."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from coppice.errors import FailedPreconditionError, InvalidArgumentError
from coppice.types import Message


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}..{% endgeneration %}` marks the assistant's tokens in some templates; its
    body is plain text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it escapes no HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    **variables: Any,
) -> str:
    """The prompt text of a conversation.

    Args:
        template: jinja2 source, from Status.model.chat_template.
        messages: the turns, oldest first; at least one.
        add_generation_prompt: end with the opening of an assistant turn.
        tools: JSON schemas of the tools on offer, for templates that know them.
        bos_token, eos_token: text that templates may insert.
        **variables: anything else that the template reads.

    Raises:
        FailedPreconditionError: the model ships no template.
        InvalidArgumentError: the template refused the messages, or does not parse.
    """
    if not template:
        raise FailedPreconditionError(
            "applying the chat template failed: the model ships none; "
            "pass the prompt as text or token ids"
        )
    if not messages:
        raise InvalidArgumentError(
            "applying the chat template failed: want at least one message, got 0"
        )
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=list(tools) if tools else None,
            bos_token=bos_token,
            eos_token=eos_token,
            **variables,
        )
    except jinja2.exceptions.TemplateError as error:
        raise InvalidArgumentError(
            f"applying the chat template failed: {error}; check roles and their order"
        ) from error
