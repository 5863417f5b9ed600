"""Compile several variants of Triton kernels at the same time, without launching them (Triton 3.6).

A variant is the machine code of a kernel for certain types of arguments and certain constants.
Triton compiles a variant when it is first launched, and keeps it in its cache folder. A later
process, or a later launch, finds the variant there.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from triton import AsyncCompileMode
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MAX_THREADS = 8


@contextmanager
def compiled_together() -> Iterator[Callable[[Any], None]]:
    """A context manager that yields a function. In the body, call this function with each result of
    ``JITFunction.warmup`` and ``JITFunction.preload``. These two methods then return at once, and
    threads compile the variants. When the body ends, the context manager also compiles the
    launchers, and waits for the threads. If a variant does not compile, no error is raised here.
    """
    variants: list[Any] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        with AsyncCompileMode(pool, ignore_errors=True):
            yield variants.append
        for kernel in _one_per_launcher(variants):
            pool.submit(_build_launcher, kernel)


def _one_per_launcher(variants: Iterable[Any]) -> Iterable[Any]:
    """Return compiled kernels, one for each launcher. Kernels whose arguments have the same types
    have the same launcher.
    """
    kernels = {}
    for variant in variants:
        kernel = variant.result(ignore_errors=True) if hasattr(variant, "result") else variant
        if kernel is not None:
            kernels[str(kernel.src.signature)] = kernel
    return kernels.values()


def _build_launcher(kernel: Any) -> None:
    """Compile the C function that launches ``kernel``. Triton finds it in its cache at the first
    launch. Without this, a C compiler runs for about 0.3 s at that time.
    """
    driver.active.launcher_cls(kernel.src, kernel.metadata)
