"""Facts about this node: GPUs through NVML, the host, the installed software.

Values, checks, reports. This package only reads: it changes no settings, creates no CUDA context
and needs no privileges.
"""
