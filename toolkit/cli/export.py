"""``toolkit export RUN --to DIR``: write the adapter of a run, or the base model with merged
weights.
"""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.cli.check_request import TRUST_REMOTE_CODE_OPTION
from toolkit.cli.exit_codes import debug_requested


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder that does not exist yet.",
)
@click.option("--merge", is_flag=True, help="Merge the adapter into the base weights.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Number format of the merged weights; auto is the format of the base checkpoint.",
)
@click.option(
    "--checkpoint",
    type=int,
    metavar="STEP",
    help="Export checkpoint-STEP instead of the final adapter.",
)
@click.option(
    "--push",
    metavar="OWNER/NAME",
    help="Also upload DIR to this repository of the Hugging Face hub, with a model card.",
)
@click.option("--private", is_flag=True, help="Make the repository of --push private.")
@TRUST_REMOTE_CODE_OPTION
def export(  # noqa: PLR0913 - one argument per option
    run: Path,
    to: Path,
    merge: bool,
    dtype: str,
    checkpoint: int | None,
    push: str | None,
    private: bool,
    trust_remote_code: bool,
) -> None:
    """Write the adapter of the run folder RUN (PEFT, safetensors) to DIR. With --merge, write a
    transformers checkpoint with merged weights.

    The last line of the output is a command that serves the exported files with vLLM.
    """
    from toolkit.train.logging_setup import prepare_environment, upstream_silenced  # noqa: PLC0415 - after the arguments are parsed

    if dtype != "auto" and not merge:
        raise click.UsageError("--dtype needs --merge")
    if private and push is None:
        raise click.UsageError("--private needs --push")
    prepare_environment()
    from toolkit.train.checkpointing.trained_run import export_run, open_run  # noqa: PLC0415 - loads torch
    from toolkit.train.model_card import push_export, serve_line  # noqa: PLC0415 - as above

    trained_run = open_run(run, step=checkpoint, trust_remote_code=trust_remote_code)
    with upstream_silenced(debug=debug_requested()):
        export_run(trained_run, to, merge=merge, dtype=dtype)
    source = trained_run.adapter or trained_run.checkpoint
    kind = "merged weights" if merge else "the adapter"
    click.echo(f"wrote {kind} of {source} to {to}")
    if push is not None:
        with upstream_silenced(debug=debug_requested()):
            address = push_export(trained_run, to, push, private=private)
        click.echo(f"uploaded {to} to {address}")
    click.echo(f"serve it: {serve_line(trained_run.config, to, merged=merge)}")
