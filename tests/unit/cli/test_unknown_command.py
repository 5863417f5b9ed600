"""The error for a misspelled command, or for a command of the other program, names the right
command.
"""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from toolkit.cli.envcheck import cli as envcheck
from toolkit.cli.train import cli as toolkit


@pytest.mark.parametrize(
    ("program", "command", "expected"),
    [
        (toolkit, "trian", "No such command 'trian'. Did you mean `train`?"),
        (toolkit, "validate", "No such command 'validate'. Did you mean `envcheck validate`?"),
        (envcheck, "validat", "No such command 'validat'. Did you mean `validate`?"),
        (envcheck, "train", "No such command 'train'. Did you mean `toolkit train`?"),
        (envcheck, "xyz", "No such command 'xyz'."),
        (toolkit, "--xyz", "No such option '--xyz'."),
    ],
)
def test_the_error_names_the_command_that_was_meant(program, command, expected):
    result = CliRunner().invoke(program, [command, "run.yaml"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == f"Error: {expected}"
