"""A file uses private names of its own classes only. Private names of upstream that have no public
alternative are listed here.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import toolkit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(toolkit.__file__).parent

STANDARD = ("_replace", "_field_defaults", "_exit", "_Hash")
"""Documented names of Python itself: of named tuples, of os, and of hashlib's type stubs."""

UPSTREAM = {
    "_run_exitfuncs": "Python 3.14's atexit: a worker that leaves with os._exit runs them itself",
    "_C": "torch 2.13: settings of the CUDA allocator",
    "_accelerator_setAllocatorSettings": "torch 2.13: settings of the CUDA allocator",
    "_foreach_copy_": "torch 2.13: one kernel for all tensors of an adapter",
    "_foreach_mul": "torch 2.13: one kernel for all tensors of an adapter",
    "_update_default_pg": "torch 2.13: the default group while a mesh is open",
    "_lazy_init": "torch 2.13: a process that must not use the GPU",
    "_last_lr": "torch 2.13: the rate that a scheduler reports",
    "_sample": "transformers 5.17: sampling with a generator for each row",
    "_name_or_path": "transformers 5.17: the name that a model was loaded by",
    "_keys_to_ignore_on_load_unexpected": "transformers 5.17: tensors that a model does not have",
    "_from_config": "transformers 5.17: a model without weights",
    "_model_mapping": "transformers 5.17: the class of a config",
    "_n_gpu": "transformers 5.17: the trainer on one GPU",
    "_can_set_attn_implementation": "transformers 5.17: whether attention can be exchanged",
    "_attn_implementation": "transformers 5.17: the attention of a config",
    "_adapters_disabled": "PEFT 0.21.2: inside disable_adapter()",
    "_register_custom_module": "PEFT 0.21.2: registration of custom layers",
    "_hf_hook": "accelerate: a layer whose weights a hook moves",
    "_registry": "vLLM 0.25: backends of sleep",
    "_all_group_ranks_share_shm_group_name": "vLLM 0.25: groups of one process",
    "_finalizer": "vLLM 0.25: the end of an engine",
    "_global_graph_pool": "vLLM 0.25: the memory of CUDA graphs",
    "_adapter_manager": "vLLM 0.25: the slots of adapters",
    "_WORLD": "vLLM 0.25: the groups of the process",
    "_LORA_A_PTR_DICT": "vLLM 0.25: addresses that LoRA kernels keep",
    "_LORA_B_PTR_DICT": "vLLM 0.25: addresses that LoRA kernels keep",
    "_LOAD_FORMAT_TO_MODEL_LOADER": "vLLM 0.25: loaders by format",
    "_cpu_skip_gemm_dispatch": "vllm 0.31: weights are not packed, so they can be shared",
}
"""Private names of upstream, with the version and what it is used for."""

BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """The private names that a file defines: functions, classes, variables, attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and own(node.value)
        ):
            found.add(node.attr)
    return found


def own(node: ast.expr) -> bool:
    """Whether an expression is the object itself: ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def uses(text: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of another object that a file uses and does not define."""
    tree = ast.parse(text)
    defined = own_names(tree)
    for node in ast.walk(tree):
        name, of = "", None
        if isinstance(node, ast.Attribute):
            name, of = node.attr, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            if node.func.id in BY_NAME and isinstance(node.args[1], ast.Constant):
                name, of = str(node.args[1].value), node.args[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if is_private(alias.name):
                    yield node.lineno, alias.name
        if of is not None and is_private(name) and not own(of) and name not in defined:
            yield node.lineno, name


def found() -> dict[str, str]:
    """{private name: the place of one use} in the whole package."""
    return {
        name: f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        for line, name in uses(path.read_text(encoding="utf-8"))
        if name not in STANDARD
    }


def test_only_the_listed_private_names_of_others_are_used() -> None:
    names = found()
    assert {name: place for name, place in names.items() if name not in UPSTREAM} == {}
    assert set(UPSTREAM) - set(names) == set(), "these names are listed, but not used"


def test_a_use_is_found() -> None:
    text = (
        "from a import _b\nclass C:\n    def __init__(self): self._own = other._theirs\n"
        "getattr(x, '_named', 0); y._own; z.__class__; x._put = 1"
    )
    assert {name for _, name in uses(text)} == {"_b", "_theirs", "_named", "_put"}
