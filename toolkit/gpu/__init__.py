"""Read facts about this node (GPUs through NVML, the host, the installed software), check them, and
write reports.

This package only reads: it changes no settings, creates no CUDA context and needs no privileges.
"""
