"""``envcheck schema``: print a JSON Schema of the toolkit, for editors and validators."""

from __future__ import annotations

import click

from toolkit.config.schemas import schema_names, schema_path


@click.command("schema")
@click.argument("name", default="run", metavar="[NAME]")
@click.option("--path", "only_path", is_flag=True, help="Print the path of the schema file.")
@click.option("--list", "only_names", is_flag=True, help="Print the names of all schemas.")
def schema(name: str, only_path: bool, only_names: bool) -> None:
    """Print the JSON Schema NAME (draft 2020-12). The default NAME is `run`, the schema of run
    files.

    An editor with a YAML language server completes and checks keys if the run file starts with

    \b
        # yaml-language-server: $schema=PATH

    where PATH is the output of `envcheck schema --path`.
    """
    if only_names:
        click.echo("\n".join(schema_names()))
        return
    path = schema_path(name)
    click.echo(str(path) if only_path else path.read_text(encoding="utf-8"), nl=only_path)
