"""What this node is: GPUs through NVML, the host, the installed software. Values, checks, reports.

Everything here reads and nothing changes: no persistence mode, no CUDA context, no privilege.
"""
