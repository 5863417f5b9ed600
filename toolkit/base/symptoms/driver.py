"""Error texts about the driver, its libraries, and access to the driver from a container."""

from __future__ import annotations

from toolkit.base.symptoms import numbers
from toolkit.base.symptoms.symptom import entry

ENTRIES = (
    entry(
        "nvml-mismatch",
        "The driver was updated while its kernel module stayed loaded",
        "driver.present, driver.libcuda",
        "reload the NVIDIA modules or reboot the node; in a container, start it again after that",
        3,
        "Driver/library version mismatch",
        "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
        "API mismatch: the client has the version",
        "API mismatch: the NVIDIA kernel module has version",
    ),
    entry(
        "cuda-802",
        "CUDA error 802: the system is not yet initialised (the NVSwitch fabric is not ready)",
        "health.fabric",
        "start nvidia-fabricmanager of the driver's own version on the node and wait until "
        "`envcheck probe` shows the fabric as ready",
        3,
        "error 802:",
        "error: 802",
        "system not yet initialized",
        "cudaErrorSystemNotReady",
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "fabric manager NVIDIA GPU driver interface version {w} don't match with driver version",
    ),
    entry(
        "cuda-803",
        "CUDA error 803: libcuda.so.1 and the kernel module have different versions",
        "driver.libcuda",
        "a libcuda that is not the driver's is found first: remove compat or stubs folders from "
        "LD_LIBRARY_PATH, or reload the driver after its update",
        3,
        "error 803:",
        "error: 803",
        "unsupported display driver / cuda driver combination",
        "cudaErrorSystemDriverMismatch",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "CUDA driver is a stub library",
        "cudaErrorStubLibrary",
    ),
    entry(
        "cuda-804",
        "CUDA error 804: forward compatibility was tried on a card that does not support it",
        "driver.compat",
        "remove the cuda-compat folder from LD_LIBRARY_PATH, and use a CUDA that the driver itself "
        "supports",
        1,
        "error 804:",
        "error: 804",
        "forward compatibility was attempted on non supported H",
        "forward compatibility was attempted on non-supported H",
        "cudaErrorCompatNotSupportedOnDevice",
        "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    ),
    entry(
        "container-requirement",
        "The image requires a newer CUDA or driver than the node has",
        "driver.cuda, driver.required",
        "use a node with a newer driver, or an image with an older CUDA; on data centre cards "
        "the container's cuda-compat folder also works (NVIDIA_DISABLE_REQUIRE=1, then "
        "`envcheck check --only driver`)",
        3,
        "unsatisfied condition: cuda",
        "unsatisfied condition: driver",
        "unsatisfied condition: brand",
        read=numbers.driver_cuda,
    ),
    entry(
        "driver-too-old",
        "The driver is too old for the CUDA of the installed torch",
        "driver.cuda",
        "use a node with a newer driver, or the torch build of an older CUDA; on data centre "
        "cards the cuda-compat folder in LD_LIBRARY_PATH also works",
        3,
        "NVIDIA driver on your system is too old",
        "CUDA driver version is insufficient for CUDA runtime version",
        "cudaErrorInsufficientDriver",
        "PTX was compiled with an unsupported toolchain",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        read=numbers.driver_cuda,
    ),
    entry(
        "libcuda-missing",
        "The driver's library libcuda.so.1 is missing",
        "driver.libcuda, place.capabilities",
        "start the container with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility; on a "
        "bare node install the driver",
        3,
        "libcuda.so.1: cannot open shared object file",
        "libcuda.so: cannot open shared object file",
        "Unable to load libcuda",
        "Could not load dynamic library 'libcuda.so",
        "libcuda.so cannot found",
        "CUDA driver library not found",
    ),
    entry(
        "wsl-driver",
        "WSL cannot reach the Windows driver",
        "place.wsl",
        "do not install a Linux driver in WSL: update the Windows driver, run `wsl --shutdown`, "
        "and put /usr/lib/wsl/lib first in LD_LIBRARY_PATH",
        3,
        "GPU access blocked by the operating system",
        "/usr/lib/wsl/lib/libcuda.so.1 is not a symbolic link",
        "WSL environment detected but no adapters were found",
    ),
    entry(
        "container-without-gpu",
        "The container was started without the NVIDIA runtime",
        "place.runtime",
        "start it with --gpus all (docker), --device nvidia.com/gpu=all (podman) or --nv "
        "(apptainer), "
        "and install nvidia-container-toolkit on the node",
        3,
        "could not select device driver{..}capabilities: [[gpu]]",
        'could not select device driver "nvidia" with capabilities',
        "unresolvable CDI devices",
        "unknown or invalid runtime name: nvidia",
        "nvidia-container-cli: {..}error: {..}nvml error",
        "nvidia-container-cli: initialization error",
        "nvidia-container-cli: device error",
        "nvidia-container-cli: mount error",
        "The NVIDIA Driver was not detected. GPU functionality will not be available",
        'exec: "nvidia-container-runtime-hook": executable file not found',
        "could not find any nv files on this host",
    ),
    entry(
        "capabilities-missing",
        "The container runtime does not provide what NVIDIA_DRIVER_CAPABILITIES requests",
        "place.capabilities",
        "set NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        1,
        "unsupported driver capabilities",
        "unsupported capabilities found in",
    ),
    entry(
        "device-files",
        "This process has no access to the device files of the GPU",
        "driver.nodes",
        "give the container the /dev/nvidia* files again (it loses them when systemd reloads "
        "its cgroup: start it again, or use CDI); on the node run nvidia-modprobe and check the "
        "group of /dev/nvidia*",
        3,
        "Failed to initialize NVML: Unknown Error",
        "Failed to initialize NVML: Insufficient Permissions",
        "could not open the device file /dev/nvidia",
        "NVIDIA: failed to load the NVIDIA kernel module",
        "/dev/nvidiactl: Permission denied",
    ),
    entry(
        "driver-missing",
        "The NVIDIA driver is not loaded on this node",
        "driver.present",
        "load or install the driver on the node (`nvidia-smi` must work there first), or use "
        "another "
        "node",
        3,
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver",
        "Failed to initialize NVML: Driver Not Loaded",
        "NVML_ERROR_DRIVER_NOT_LOADED",
        "NVMLError_DriverNotLoaded",
        "Found no NVIDIA driver on your system",
        "NVML Shared Library Not Found",
        "NVMLError_LibraryNotFound",
        "libnvidia-ml.so.1: cannot open shared object file",
        "couldn't find libnvidia-ml.so library in your system",
        "No devices were found",
    ),
    entry(
        "cuda-unknown",
        "CUDA error 999: the driver could not be started in this process",
        "driver.nodes, health.lost",
        "load nvidia_uvm (`nvidia-modprobe -u -c 0`) and check for a lost GPU; after a suspend "
        "unload and reload nvidia_uvm, or reboot the node. Under WSL set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False",
        3,
        "CUDA unknown error - this may be due to an incorrectly set up environment",
        "error 999:",
        "CUDA_ERROR_UNKNOWN",
        "cudaErrorUnknown",
        "CUDA error: unknown error",
        "CUDA driver error: unknown error",
        "CUDA driver initialization failed, you might not have a CUDA gpu",
        "CUDA error: initialization error",
    ),
)
