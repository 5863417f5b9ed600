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

MIN_SECRET_LENGTH = 16
_TOKEN_ADVICE = {
    "hf": "export HF_TOKEN in the shell, or run hf auth login",
    "wandb": "export WANDB_API_KEY in the shell",
}


def _secret_in(value: object) -> str | None:
    """The kind of secret that a text contains; None if it contains no secret. A text shorter than
    ``MIN_SECRET_LENGTH`` is checked only if it is a URL.
    """
    if not isinstance(value, str) or (len(value) < MIN_SECRET_LENGTH and "://" not in value):
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

    A run file is copied into the run folder and shared. Put a secret into an environment variable,
    or log in with the tool of the service. Secrets are recognised by the name of the key or by the
    form of the value. The finding never shows the value.
    """
    for path, node in run.document.root.walk():
        name = path[-1] if path else ""
        if isinstance(name, str) and node.value and is_secret_key(name):
            fault = f"{name} is a secret"
        else:
            secret_kind = _secret_in(node.value)
            if secret_kind is None:
                continue
            fault = f"the value contains a {secret_kind}"
        node.source.hide_secret(node.position)
        tool = "wandb" if "wandb" in f"{fault}{name}".lower() else "hf"
        is_known_service = "token" in fault.lower() or tool == "wandb"
        fix = (
            _TOKEN_ADVICE[tool]
            if is_known_service
            else "put the secret into an environment variable"
        )
        yield RuleViolation(
            path, f"a run file must not contain secrets, but {fault}", fixes=(Fix(fix),)
        )
