"""Record the Triton kernels of a run for ``toolkit/engine/kernel_records.py``.

Run this on a GPU after an update of vLLM, TRL, liger-kernel or Triton, with the settings of a
benchmark (``toolkit bench --shape llama-1b --arms ours`` writes them to bench/out/settings.json)::

    TOOLKIT_KERNEL_PROCESS=off TRITON_CACHE_DIR=$(mktemp -d) \
        python tests/gpu/record_kernels.py bench/out/settings.json

Triton's cache must be empty, because only kernels that are compiled are recorded. The result is the
file of the installed version of vLLM in ``toolkit/engine/recorded/``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit.engine.kernel_records import records_file

PACKAGES = ("vllm", "triton", "trl", "liger-kernel")
LORA_KERNELS = ("_lora_shrink_kernel", "_lora_expand_kernel")  # depend on the layers and the table
TARGET_OPTIONS = {
    "arch",
    "ptx_version",
    "supported_fp8_dtypes",
    "deprecated_fp8_dot_operand_dtypes",
    "max_num_imprecise_acc_default",
    "extern_libs",
}
"""The options of a variant that Triton derives from the GPU."""
HEADS, KEY_HEADS, HEAD = "num_attention_heads", "num_key_value_heads", "head_dim"
_SWIGLU = {
    "n_cols": {"size": "intermediate_size"},
    "BLOCK_SIZE": {"power_of_2": "intermediate_size"},
    "num_warps": {"warps": "intermediate_size"},
}
_RMS_NORM = {"BLOCK_SIZE": {"power_of_2": "hidden_size"}, "num_warps": {"warps": "hidden_size"}}
SIZES: dict[str, dict[str, dict[str, str]]] = {
    "_triton_rope": {
        "n_qh": {"size": HEADS},
        "n_kh": {"size": KEY_HEADS},
        "hd": {"size": HEAD},
        "rd": {"size": HEAD},
        "pad_n_qh": {"power_of_2": HEADS},
        "pad_n_kh": {"power_of_2": KEY_HEADS},
        "pad_hd": {"power_of_2": HEAD},
        "pad_rd": {"power_of_2": HEAD},
        "BLOCK_SIZE": {"power_of_2": HEADS},
    },
    "_swiglu_forward_kernel": _SWIGLU,
    "_swiglu_backward_kernel": _SWIGLU,
    "_rms_norm_forward_kernel": _RMS_NORM,
    "_rms_norm_backward_kernel": _RMS_NORM,
}
"""The constants of liger-kernel's kernels that are sizes of the model."""
CHECKED_HEADS = {"n_qh", "n_kh", "pad_n_qh", "pad_n_kh", "BLOCK_SIZE"}
"""``policy.fused_kernels`` compares rotary kernels with fewer heads than the model has."""


def to_record(module: str, name: str, specialization_data: str, heads: int) -> dict[str, Any]:
    """Return the record of a variant. The arguments come from Triton's ``jit_post_compile_hook``,
    and ``heads`` is the number of attention heads of the model.
    """
    from triton.backends.nvidia.compiler import CUDAOptions

    variant = json.loads(specialization_data)
    names = list(variant["signature"])
    constants = {names[key[0]]: value for key, value in constants_of(variant)}
    sizes = dict(SIZES.get(name, {}))
    if name == "_triton_rope" and constants["n_qh"] != heads:
        sizes = {
            constant: size for constant, size in sizes.items() if constant not in CHECKED_HEADS
        }
    variant["constant_vals"] = [
        sizes.get(names[key[0]], value) for key, value in constants_of(variant)
    ]
    defaults = {
        option: json.loads(json.dumps(field.default))  # tuples become lists
        for option, field in CUDAOptions.__dataclass_fields__.items()
    }
    variant["options"] = {
        option: sizes.get(option, value)
        for option, value in variant["options"].items()
        if option not in TARGET_OPTIONS and value != defaults[option]
    }
    variant["key"] = "recorded"  # Triton needs a text here, and uses it only in memory
    return {"module": module, "kernel": name, "variant": variant}


def constants_of(variant: dict[str, Any]) -> list[tuple[list[int], Any]]:
    return list(zip(variant["constant_keys"], variant["constant_vals"], strict=True))


def write_records(records: list[dict[str, Any]], versions: dict[str, str], path: Path) -> None:
    lines = sorted({json.dumps(record) for record in records})
    path.write_text(
        f'{{"versions": {json.dumps(versions)},\n"kernels": [\n' + ",\n".join(lines) + "\n]}\n"
    )


def main(settings: str) -> None:
    from triton import knobs

    from toolkit.train.bench.arm_settings import Settings
    from toolkit.train.bench.arms import main as run_arm

    model = Path(Settings.read(Path(settings)).model)
    heads = json.loads((model / "config.json").read_text())["num_attention_heads"]
    records: list[dict[str, Any]] = []

    def record(*_: object, **facts: Any) -> None:
        module, name = facts["fn"].module, facts["fn"].name
        if name not in LORA_KERNELS:
            data = facts["compile"]["specialization_data"]
            records.append(to_record(module, name, data, heads))

    knobs.runtime.jit_post_compile_hook = record
    with tempfile.TemporaryDirectory() as folder:
        run_arm("ours", settings, str(Path(folder, "result.json")))
    versions = {package: version(package) for package in PACKAGES}
    path = records_file(versions["vllm"])
    write_records(records, versions, path)
    print(f"{len(records)} kernels recorded in {path}")


if __name__ == "__main__":
    main(sys.argv[1])
