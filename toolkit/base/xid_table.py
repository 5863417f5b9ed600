"""XID numbers of the driver, sorted by whose fault they are (NVIDIA's list)."""

from __future__ import annotations

FATAL_XIDS: dict[int, str] = {
    46: "the GPU stopped processing",
    48: "double-bit ECC error",
    61: "internal micro-controller breakpoint",
    62: "internal micro-controller halt",
    64: "a row remap or page retirement failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor failed",
    121: "C2C link error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "the GPU did not initialise",
}
USER_XIDS: dict[int, str] = {
    13: "graphics engine exception",
    31: "memory page fault",
    32: "corrupted push buffer",
    43: "the GPU stopped a channel",
    45: "preemptive cleanup",
    68: "video processor exception",
    69: "graphics engine class error",
}
