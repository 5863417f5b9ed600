"""``toolkit tune``: measure vLLM's LoRA kernels on this card, and write a table with the fastest
kernel settings.
"""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.base.errors import MissingExtraError


@click.command()
@click.argument("model", nargs=-1, required=True)
@click.option("--rank", "ranks", type=int, multiple=True, default=(16, 64), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--limit-s", type=float, default=600, show_default=True, help="Time limit in seconds."
)
def tune(*, model: tuple[str, ...], ranks: tuple[int, ...], out: Path, limit_s: float) -> None:
    """Measure vLLM's LoRA kernels for the matrix shapes of MODEL, and write the fastest kernel
    settings to a table.

    MODEL is a folder, a config.json file or a cached hub id. A run uses the table if the
    environment variable TOOLKIT_LORA_TABLE is set to its path. A table is used only by the version
    of vLLM that it was measured with.
    """
    from toolkit.engine.rollout_engine import vllm_available  # noqa: PLC0415 - after parsing
    from toolkit.sizing.lora_bytes import fused_shapes, legal_rank  # noqa: PLC0415
    from toolkit.sizing.spec import read_spec  # noqa: PLC0415

    layer_shapes = {shape for name in model for shape in fused_shapes(read_spec(name))}
    legal_ranks = sorted({legal_rank(rank) for rank in ranks})
    if not vllm_available():
        raise MissingExtraError(
            "vLLM is not installed", where="tune", fix="run pip install 'grpo-toolkit[cuda]'"
        )
    from toolkit.engine.open_engine import prepare_environment  # noqa: PLC0415

    prepare_environment()
    from toolkit.engine.lora_tables import LayerShape, write_table  # noqa: PLC0415
    from toolkit.engine.lora_tune import tune_card  # noqa: PLC0415 - imports torch and vLLM

    shapes = [LayerShape(rows, wide, rank) for rows, wide in layer_shapes for rank in legal_ranks]
    table, before, after = tune_card(shapes, limit_s, lambda text: click.echo(text, err=True))
    write_table(table, out)
    click.echo(
        f"{out}: all measured kernels together took {before * 1e6:.0f} us before tuning and "
        f"{after * 1e6:.0f} us after tuning. Set TOOLKIT_LORA_TABLE={out} to use the table"
    )
