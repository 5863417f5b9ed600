"""``toolkit generate RUN "prompt"``: print completions from the policy that a run trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from toolkit.base.errors import InputError
from toolkit.base.formatting import escape_unprintable
from toolkit.cli.check_request import TRUST_REMOTE_CODE_OPTION
from toolkit.cli.exit_codes import debug_requested


@click.command("generate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True)
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option(
    "-n",
    "count",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of completions per prompt.",
)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option(
    "--checkpoint",
    type=int,
    metavar="STEP",
    help="Use checkpoint-STEP instead of the final adapter.",
)
@click.option("--base", is_flag=True, help="Use the base model without the adapter.")
@click.option(
    "--chat/--plain",
    default=None,
    help="Apply the chat template to the prompts (--chat) or not (--plain).  "
    "[default: as in the run]",
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
)
@TRUST_REMOTE_CODE_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt.")
def generate(run: Path, prompts: tuple[str, ...], **options: Any) -> None:
    """Generate completions of PROMPTS with the policy of the run folder RUN.

    The prompt "-" stands for prompts on standard input, one per line.
    """
    from toolkit.train.logging_setup import prepare_environment, upstream_silenced  # noqa: PLC0415 - after the arguments are parsed

    as_json, texts = options.pop("as_json"), _read_prompts(prompts)
    prepare_environment()
    from toolkit.train.checkpointing.trained_run import generate_completions, open_run  # noqa: PLC0415 - loads torch

    trusted = options.pop("trust_remote_code")
    trained_run = open_run(run, step=options.pop("checkpoint"), trust_remote_code=trusted)
    with upstream_silenced(debug=debug_requested()):
        answers = generate_completions(trained_run, texts, n=options.pop("count"), **options)
    for text, completions in zip(texts, answers, strict=True):
        if as_json:
            row = {"prompt": text, "completions": completions}
            click.echo(json.dumps(row, ensure_ascii=False))
            continue
        if len(texts) > 1:
            click.echo(f"> {printable(text)}")
        for number, completion in enumerate(map(printable, completions), 1):
            click.echo(f"[{number}] {completion}" if len(completions) > 1 else completion)


def printable(text: str) -> str:
    """Return ``text`` as it is printed. On a terminal, control characters are replaced by their
    code points.
    """
    return escape_unprintable(text) if sys.stdout.isatty() else text


def _read_prompts(prompts: tuple[str, ...]) -> list[str]:
    """Return the prompts of the command line. The prompt "-" is replaced by the lines of stdin.

    Raises InputError if a prompt is not UTF-8 text or if there is no prompt.
    """
    texts: list[str] = []
    for prompt in prompts:
        try:
            lines = [line.rstrip("\n") for line in sys.stdin] if prompt == "-" else [prompt]
            "".join(lines).encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            where = "stdin" if prompt == "-" else "PROMPTS"
            what = f"a prompt is not UTF-8 text: {error.reason}"
            raise InputError(what, where=where, fix="convert the prompt to UTF-8") from None
        texts += lines
    if not any(texts):
        raise InputError(
            "no prompt is given",
            where="PROMPTS",
            fix='give a prompt, or give "-" to read prompts from stdin',
        )
    return [text for text in texts if text]
