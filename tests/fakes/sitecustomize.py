"""Python loads this module at start-up if its folder is on PYTHONPATH. The commands then read a
recorded node instead of this machine.

TOOLKIT_TEST_NODE names a file with {"node": ..., "quirks": ...}. The function table of pynvml
answers from this file, and recorded readings replace those of driver files, host and packages.
"""

import json
import os
import sys

_PATH = os.environ.get("TOOLKIT_TEST_NODE")
if _PATH:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import nvml as fake_nvml

    import toolkit.gpu.driver_files as driver_files
    import toolkit.gpu.host as host
    import toolkit.gpu.software as software
    from toolkit.gpu.snapshot import DriverSnapshot
    from toolkit.gpu.snapshot_json import readings_from_json

    with open(_PATH, encoding="utf-8") as _file:
        _CASE = json.load(_file)
    _NODE = _CASE["node"]
    fake_nvml.install(_NODE, _CASE.get("quirks"))
    _DRIVER = readings_from_json(DriverSnapshot, _NODE["driver"])
    _FILES = {
        name: reading for name, reading in _DRIVER.items() if name not in ("nvml", "version", "p2p")
    }
    _HOST = host.HostSnapshot(**readings_from_json(host.HostSnapshot, _NODE["host"]))
    driver_files.read = lambda environ, root=None: _FILES
    host.read = lambda environ, paths, root=None: _HOST
    host.read_memory = lambda root=None: _HOST.memory
    software.read = lambda environ: software.SoftwareSnapshot(
        **readings_from_json(software.SoftwareSnapshot, _NODE["software"])
    )
