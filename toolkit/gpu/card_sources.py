"""The sources of memory sizes in ``card_table``: web addresses of public logs and reports. The key
of an entry is the first alias of its card.

A card without an entry has no such source. ``card_table`` then copies the size from another card
(``alike``), computes the size (``computed``), uses a commonly reported size (``reported``), or uses
the host's memory (``host``). The docstring of ``card_table`` explains these words.
"""

from __future__ import annotations

_CAPTURES = "utkuozdemir/nvidia_gpu_exporter/tree/main/internal/captures"
_TOTALS = "modal-labs/modal-client/pull/2797"  # log with NVML's totals of seven data-center cards

# alias of the card -> paths at github.com, or whole addresses
ADDRESSES: dict[str, str] = {
    "b200": "unslothai/unsloth/issues/3872 scitix/sichek/pull/113",
    "h200": _CAPTURES,
    "gh200-144": "vllm-project/vllm/issues/18390",
    "gh200": "vllm-project/vllm/issues/9630",
    "h100": f"{_CAPTURES} {_TOTALS}",
    "h100-nvl": "ali-vilab/VACE/issues/56",
    "h20": "unslothai/unsloth/issues/2962 scitix/sichek/pull/113",
    "a100": f"{_TOTALS} HiDream-ai/VAREdit/issues/6",
    "a100-40": f"bottlerocket-os/bottlerocket/pull/3873 {_TOTALS}",
    "a30": "google/RB-Modulation/issues/5",
    "a10": _TOTALS,
    "a10g": "batteries-included/batteries-included/pull/1663",
    "l40s": f"{_CAPTURES} {_TOTALS}",
    "l40": "QwenLM/Qwen3-VL/issues/2097",
    "l4": f"ArcInstitute/evo2/issues/190 {_TOTALS}",
    "rtx-pro-6000-workstation": "antirez/ds4/issues/431",
    # cards with ECC, which takes a sixteenth of the memory
    "6000-ada": "DINGYANB/MTVCrafter/issues/21",
    "a6000": "flashinfer-ai/flashinfer/issues/5479",
    "a4000": "DengKaiCQ/VGGT-Long/issues/6",
    "a2000": "vllm-project/vllm/issues/12030",
    "5090": "TrajectoryCrafter/TrajectoryCrafter/issues/20",
    "5080": "vllm-project/vllm/issues/14452",
    "5070": "shkhln/libc6-shim/issues/14",
    "5060-ti": "Luce-Org/lucebox/issues/407",
    "4090": "Soul-AILab/SoulX-FlashTalk/issues/5 RLinf/RLinf/issues/255",
    "4080-super": _CAPTURES,
    "4080": "ultralytics/ultralytics/issues/4215",
    "3090": "noonghunna/club-3090/issues/535",
    "3080": "zai-org/CogVideo/issues/34",
    "3060": "Kunhao-Liu/StyleGaussian/issues/12 geerlingguy/raspberry-pi-pcie-devices/issues/790",
    "2080-ti": "ispc-lab/TMA/issues/5",
    "2080-super": _CAPTURES,
    "titan-rtx": "lambdal/lambda-tensorflow-benchmark/pull/11",
    "t4": f"Zheng-Chong/CatVTON/issues/133 {_TOTALS}",
    "v100": "liucongg/ChatGLM-Finetuning/issues/73",
    "v100-16": "kchengiva/Shift-GCN/issues/34",
}

_HYPERPOD = "aws/sagemaker-hyperpod-cli"
_GUIDE = "https://docs.nvidia.com/datacenter/tesla/mig-user-guide/"

# family of MIG slices -> paths or whole addresses
SLICE_ADDRESSES: dict[str, str] = {
    "a30": _GUIDE,
    "a40g": _GUIDE,
    "a80": _GUIDE,
    "h80": _CAPTURES,
    "h94": "NVIDIA/gpu-operator/pull/900",
    "h96": _GUIDE,
    "h200": f"NVIDIA/mig-parted/issues/120 {_CAPTURES}",
    "gh144": "NVIDIA/mig-parted/pull/139",
    "b200": "NVIDIA/gpu-operator/pull/1351",
    "gb200": "NVIDIA/mig-parted/issues/227",
    "b300": f"{_HYPERPOD}/pull/403",
    "pro6000": "bigstack-oss/cubecos/issues/312",
}


def web_addresses(paths: str) -> tuple[str, ...]:
    """Return the full web addresses of one entry of ``ADDRESSES``. A path such as
    ``owner/name/issues/1`` becomes an address at github.com.
    """
    return tuple(
        path if path.startswith("https://") else f"https://github.com/{path}"
        for path in paths.split()
    )
