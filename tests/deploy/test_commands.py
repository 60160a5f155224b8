"""Commands that README and notes tell an operator to type are those of the client."""

import pathlib
import re
import sys

import pytest
from conftest import CHART, ROOT, run


@pytest.mark.parametrize("path", [ROOT / "deploy/README.md", CHART / "templates/NOTES.txt"])
def test_the_client_accepts_the_commands(path):
    commands = re.findall(r"\bcoppice ((?:[a-z]+ )?--[^`\n]*)", path.read_text())
    assert commands
    for command in commands:
        # With --help the client checks what comes before it, and ends.
        result = run(pathlib.Path(sys.executable).with_name("coppice"), *command.split(), "--help")
        assert result.code == 0, f"{command}: {result.stderr}"
