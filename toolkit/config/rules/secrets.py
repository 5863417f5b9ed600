"""A rule against secrets in a run file, because the file is copied into the run folder and
shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.secrets import find_secret, is_secret_key
from toolkit.config.finding import Fix
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

SHORTEST = 16
_WHERE = {
    "hf": "export HF_TOKEN in the shell, or hf auth login",
    "wandb": "export WANDB_API_KEY in the shell",
}


def _secret_in(value: object) -> str | None:
    """The kind of secret that a text contains. Short secrets are recognised only inside a URL."""
    if not isinstance(value, str) or (len(value) < SHORTEST and "://" not in value):
        return None
    return find_secret(value)


@rule(
    "SAFE001",
    "model dataset reward grpo runtime",
    example="model:\n  token: hf_0000000000000000000000",
    fix="export HF_TOKEN in the shell",
)
def no_secrets(run: Run) -> Iterator[RuleViolation]:
    """A run file contains no token, key or password.

    Secrets are recognised by the key's name or by the form of the value. A run file is copied into
    the run folder and shared. Put a secret into the environment, or log in with the tool of the
    service. The value is never printed.
    """
    for path, node in run.document.root.walk():
        name = path[-1] if path else ""
        if isinstance(name, str) and node.value and is_secret_key(name):
            kind = f"{name} holds a secret"
        else:
            found = _secret_in(node.value)
            if found is None:
                continue
            kind = f"the value contains a {found}"
        node.source.hide(node.mark)
        tool = "wandb" if "wandb" in f"{kind}{name}".lower() else "hf"
        known = "token" in kind.lower() or tool == "wandb"
        fix = _WHERE[tool] if known else "read it from the environment"
        yield RuleViolation(path, f"{kind}; a run file must not contain secrets", fixes=(Fix(fix),))
