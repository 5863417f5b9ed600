"""The table of known cards with their memory sizes, and the MIG slices of the cards that support
MIG.

``nvml`` is the total memory that ``nvidia-smi`` prints, in MiB. ``cuda`` is the total memory that
CUDA reports (``cudaMemGetInfo``, and "total capacity" in torch's messages), in GiB. ``cuda`` is
smaller than ``nvml``, because the driver reserves a part of the memory. Each row names the source
of its sizes with one of these words:

- ``read``: both sizes were read on the card.
- ``log``: ``nvml`` is what ``nvidia-smi`` prints in public logs. ``cuda`` is what torch, vLLM,
  deviceQuery, Ollama or another engine prints in the public log at the address in card_sources.
- ``reserved``: ``cuda`` is ``nvml`` minus the size that ``nvidia-smi -q`` calls "Reserved" in the
  log at the address in card_sources.
- ``reported``: ``cuda`` is the size that is commonly reported for current drivers. No log that
  names the card was found. If card_sources has an address for the card, the log there shows
  ``nvml``, or it shows the ``cuda`` of an older driver, which reserved less memory.
- ``alike``: ``nvml`` is what ``nvidia-smi`` prints. ``cuda`` is copied from another card in this
  table with the same chip and the same memory.
- ``computed``: ``nvml`` is what ``nvidia-smi`` prints in public logs, or the size in the data
  sheet. ``cuda`` is ``nvml`` minus an assumed reserve of the driver: 500 MiB for cards up to 36
  GiB, 690 MiB for cards up to 100 GiB, 1000 MiB for larger cards. These are the largest reserves
  that were seen on cards of such sizes.
- ``host``: the card has integrated memory, which is a part of the host's memory.

The size of a MIG slice is the size that ``nvidia-smi mig -lgip`` prints, according to the public
logs in card_sources and NVIDIA's MIG guide. If drivers print different sizes, the smallest size is
used.

A size with ``~`` is computed, because no size of this slice was published. NVIDIA divides the
memory of a card into eighths, and a slice gets one or more eighths. For slices of other cards with
the same number of eighths, sizes were published. Each such size is divided by the memory of its
card. The smallest quotient, multiplied by the memory of this card, is the size of the slice.
"""

from __future__ import annotations

# name; nvml MiB; cuda GiB (0: computed); capability; machine (a: aarch64); MIG; source; aliases
CARDS = """
NVIDIA B300 SXM6 AC; 275040; 267.69; 10.3; ; b300; reported; b300 b300-sxm
NVIDIA GB300; 256703; 0; 10.3; a; ; computed; gb300
NVIDIA B200; 183359; 178.35; 10.0; ; b200; log; b200
NVIDIA GB200; 189471; 184.31; 10.0; a; gb200; reported; gb200
NVIDIA H200; 143771; 139.80; 9.0; ; h200; read; h200 h200-sxm
NVIDIA H200 NVL; 143771; 139.80; 9.0; ; h200; alike; h200-nvl
NVIDIA GH200 144G HBM3e; 146831; 0; 9.0; a; gh144; computed; gh200-144 gh200-144g gh200-144gb
NVIDIA GH200 480GB; 97871; 94.50; 9.0; a; h96; log; gh200 gh200-96 gh200-480gb
NVIDIA H100 80GB HBM3; 81559; 79.19; 9.0; ; h80; read; h100 h100-sxm
NVIDIA H100 PCIe; 81559; 79.10; 9.0; ; h80; reported; h100-pcie
NVIDIA H100 NVL; 95830; 93.00; 9.0; ; h94; log; h100-nvl
NVIDIA H800; 81559; 79.10; 9.0; ; h80; alike; h800
NVIDIA H20; 97871; 95.00; 9.0; ; h96; log; h20
NVIDIA A100-SXM4-80GB; 81920; 79.14; 8.0; ; a80; reported; a100 a100-80 a100-80gb
NVIDIA A100 80GB PCIe; 81920; 79.14; 8.0; ; a80; alike; a100-80-pcie
NVIDIA A100-SXM4-40GB; 40960; 39.39; 8.0; ; a40g; log; a100-40 a100-40gb
NVIDIA A100-PCIE-40GB; 40960; 39.39; 8.0; ; a40g; alike; a100-40-pcie
NVIDIA A800-SXM4-80GB; 81920; 79.14; 8.0; ; a80; alike; a800 a800-80
NVIDIA A800 80GB PCIe; 81920; 79.14; 8.0; ; a80; alike; a800-pcie
NVIDIA A30; 24576; 23.53; 8.0; ; a30; log; a30
NVIDIA A40; 46068; 44.34; 8.6; ; ; reported; a40
NVIDIA A10; 23028; 21.98; 8.6; ; ; alike; a10
NVIDIA A10G; 23028; 21.98; 8.6; ; ; log; a10g
NVIDIA A16; 15356; 0; 8.6; ; ; computed; a16
NVIDIA A2; 15356; 0; 8.6; ; ; computed; a2
NVIDIA L40S; 46068; 44.39; 8.9; ; ; reserved; l40s
NVIDIA L40; 46068; 44.40; 8.9; ; ; log; l40
NVIDIA L20; 46068; 44.39; 8.9; ; ; alike; l20
NVIDIA L4; 23034; 22.03; 8.9; ; ; log; l4
NVIDIA RTX PRO 6000 Blackwell Server Edition; 97887; 94.97; 12.0; ; pro6000; alike; rtx-pro-6000 pro-6000 rtx-pro-6000-server
NVIDIA RTX PRO 6000 Blackwell Workstation Edition; 97887; 94.97; 12.0; ; pro6000; log; rtx-pro-6000-workstation
NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition; 97887; 94.97; 12.0; ; pro6000; alike; rtx-pro-6000-max-q
NVIDIA RTX PRO 5000 Blackwell; 48935; 0; 12.0; ; ; computed; rtx-pro-5000 pro-5000
NVIDIA RTX PRO 4500 Blackwell; 32623; 0; 12.0; ; ; computed; rtx-pro-4500 pro-4500
NVIDIA RTX PRO 4000 Blackwell; 24467; 0; 12.0; ; ; computed; rtx-pro-4000 pro-4000
NVIDIA RTX PRO 2000 Blackwell; 16311; 0; 12.0; ; ; computed; rtx-pro-2000 pro-2000
NVIDIA RTX 6000 Ada Generation; 49140; 47.38; 8.9; ; ; reported; 6000-ada rtx-6000-ada
NVIDIA RTX 5880 Ada Generation; 49140; 0; 8.9; ; ; computed; 5880-ada rtx-5880-ada
NVIDIA RTX 5000 Ada Generation; 32760; 0; 8.9; ; ; computed; 5000-ada rtx-5000-ada
NVIDIA RTX 4500 Ada Generation; 24570; 0; 8.9; ; ; computed; 4500-ada rtx-4500-ada
NVIDIA RTX 4000 Ada Generation; 20475; 0; 8.9; ; ; computed; 4000-ada rtx-4000-ada
NVIDIA RTX 2000 Ada Generation; 16380; 0; 8.9; ; ; computed; 2000-ada rtx-2000-ada
NVIDIA RTX A6000; 49140; 47.40; 8.6; ; ; log; a6000 rtx-a6000
NVIDIA RTX A5500; 24564; 0; 8.6; ; ; computed; a5500 rtx-a5500
NVIDIA RTX A5000; 24564; 23.56; 8.6; ; ; alike; a5000 rtx-a5000
NVIDIA RTX A4500; 20470; 0; 8.6; ; ; computed; a4500 rtx-a4500
NVIDIA RTX A4000; 16376; 15.61; 8.6; ; ; log; a4000 rtx-a4000
NVIDIA RTX A2000 12GB; 12282; 11.53; 8.6; ; ; log; a2000 rtx-a2000
NVIDIA GeForce RTX 5090; 32607; 31.36; 12.0; ; ; log; 5090 rtx-5090
NVIDIA GeForce RTX 5090 D; 32607; 31.36; 12.0; ; ; alike; 5090d rtx-5090d
NVIDIA GeForce RTX 5090 Laptop GPU; 24463; 0; 12.0; ; ; computed; 5090-laptop
NVIDIA GeForce RTX 5080; 16303; 15.46; 12.0; ; ; reported; 5080 rtx-5080
NVIDIA GeForce RTX 5080 Laptop GPU; 16303; 0; 12.0; ; ; computed; 5080-laptop
NVIDIA GeForce RTX 5070 Ti; 16303; 15.46; 12.0; ; ; alike; 5070-ti rtx-5070-ti
NVIDIA GeForce RTX 5070 Ti Laptop GPU; 12227; 0; 12.0; ; ; computed; 5070-ti-laptop
NVIDIA GeForce RTX 5070; 12227; 11.48; 12.0; ; ; reserved; 5070 rtx-5070
NVIDIA GeForce RTX 5060 Ti; 16311; 15.44; 12.0; ; ; log; 5060-ti rtx-5060-ti
NVIDIA GeForce RTX 5060; 8151; 0; 12.0; ; ; computed; 5060 rtx-5060
NVIDIA GeForce RTX 4090; 24564; 23.52; 8.9; ; ; log; 4090 rtx-4090
NVIDIA GeForce RTX 4090 D; 24564; 23.52; 8.9; ; ; alike; 4090d rtx-4090d
NVIDIA GeForce RTX 4090 Laptop GPU; 16376; 0; 8.9; ; ; computed; 4090-laptop
NVIDIA GeForce RTX 4080 SUPER; 16376; 15.56; 8.9; ; ; reserved; 4080-super rtx-4080-super
NVIDIA GeForce RTX 4080; 16376; 15.56; 8.9; ; ; alike; 4080 rtx-4080
NVIDIA GeForce RTX 4080 Laptop GPU; 12282; 0; 8.9; ; ; computed; 4080-laptop
NVIDIA GeForce RTX 4070 Ti SUPER; 16376; 15.56; 8.9; ; ; alike; 4070-ti-super rtx-4070-ti-super
NVIDIA GeForce RTX 4070 Ti; 12282; 0; 8.9; ; ; computed; 4070-ti rtx-4070-ti
NVIDIA GeForce RTX 4070 SUPER; 12282; 0; 8.9; ; ; computed; 4070-super rtx-4070-super
NVIDIA GeForce RTX 4070; 12282; 0; 8.9; ; ; computed; 4070 rtx-4070
NVIDIA GeForce RTX 4060 Ti; 16380; 0; 8.9; ; ; computed; 4060-ti rtx-4060-ti
NVIDIA GeForce RTX 4060; 8188; 0; 8.9; ; ; computed; 4060 rtx-4060
NVIDIA GeForce RTX 3090 Ti; 24564; 23.56; 8.6; ; ; alike; 3090-ti rtx-3090-ti
NVIDIA GeForce RTX 3090; 24576; 23.56; 8.6; ; ; log; 3090 rtx-3090
NVIDIA GeForce RTX 3080 Ti; 12288; 0; 8.6; ; ; computed; 3080-ti rtx-3080-ti
NVIDIA GeForce RTX 3080; 10240; 9.65; 8.6; ; ; reported; 3080 rtx-3080
NVIDIA GeForce RTX 3070; 8192; 0; 8.6; ; ; computed; 3070 rtx-3070
NVIDIA GeForce RTX 3060 Ti; 8192; 0; 8.6; ; ; computed; 3060-ti rtx-3060-ti
NVIDIA GeForce RTX 3060; 12288; 11.63; 8.6; ; ; reported; 3060 rtx-3060
NVIDIA GeForce RTX 3060 Laptop GPU; 6144; 0; 8.6; ; ; computed; 3060-laptop
NVIDIA GeForce RTX 2080 Ti; 11264; 10.57; 7.5; ; ; reported; 2080-ti rtx-2080-ti
NVIDIA GeForce RTX 2080 SUPER; 8192; 7.60; 7.5; ; ; reserved; 2080-super rtx-2080-super
NVIDIA GeForce RTX 2070; 8192; 0; 7.5; ; ; computed; 2070 rtx-2070
NVIDIA GeForce RTX 2060; 6144; 0; 7.5; ; ; computed; 2060 rtx-2060
NVIDIA TITAN RTX; 24576; 23.46; 7.5; ; ; reported; titan-rtx
Quadro RTX 8000; 46080; 0; 7.5; ; ; computed; rtx-8000 quadro-8000
Quadro RTX 6000; 23040; 0; 7.5; ; ; computed; quadro-6000
Tesla T4; 15360; 14.56; 7.5; ; ; log; t4
NVIDIA T4G; 15360; 14.56; 7.5; a; ; alike; t4g
Tesla V100-SXM2-32GB; 32768; 31.74; 7.0; ; ; log; v100 v100-32 v100-32gb
Tesla V100-SXM2-16GB; 16384; 15.78; 7.0; ; ; log; v100-16 v100-16gb
Tesla P100-PCIE-16GB; 16384; 15.89; 6.0; ; ; reported; p100
NVIDIA GB10; 122480; 119.61; 12.1; a; ; host; gb10 dgx-spark spark
NVIDIA Thor; 125772; 122.82; 11.0; a; ; host; thor agx-thor jetson-thor
NVIDIA Jetson AGX Orin 64GB; 62841; 61.36; 8.7; a; ; host; orin agx-orin orin-64 jetson-orin
NVIDIA Jetson AGX Orin 32GB; 30698; 29.97; 8.7; a; ; host; orin-32
"""  # noqa: E501 - a row is a card

# the MIG slices of a family of cards: profile -> GiB, with "~" before a computed size
SLICES = {
    "a30": "1g.6gb 5.81, 2g.12gb 11.69, 4g.24gb 23.44",
    "a40g": "1g.5gb 4.75, 1g.10gb 9.75, 2g.10gb 9.75, 3g.20gb 19.62, 4g.20gb 19.62, 7g.40gb 39.50",
    "a80": "1g.10gb 9.50, 1g.20gb 19.50, 2g.20gb 19.50, 3g.40gb 39.25, 4g.40gb 39.25, "
    "7g.80gb 79.00",
    "h80": "1g.10gb 9.75, 1g.20gb 19.62, 2g.20gb 19.62, 3g.40gb 39.50, 4g.40gb 39.50, "
    "7g.80gb 79.25",
    "h94": "1g.12gb 10.75, 1g.24gb 21.62, 2g.24gb 21.62, 3g.47gb 46.38, 4g.47gb 46.38, "
    "7g.94gb 93.12",
    "h96": "1g.12gb 11.00, 1g.24gb 23.00, 2g.24gb 23.00, 3g.48gb 46.50, 4g.48gb 46.50, "
    "7g.96gb 93.00",
    "h200": "1g.18gb 16.00, 1g.35gb 32.25, 2g.35gb 32.25, 3g.71gb 69.50, 4g.71gb 69.50, "
    "7g.141gb 139.75",
    "gh144": "1g.18gb 17.50, 1g.36gb 35.25, 2g.36gb 35.25, 3g.72gb ~70.00, 4g.72gb ~70.00, "
    "7g.144gb ~142.41",
    "b200": "1g.23gb 20.50, 1g.45gb 44.25, 2g.45gb 44.25, 3g.90gb ~88.50, 4g.90gb ~88.50, "
    "7g.180gb ~178.35",
    "gb200": "1g.23gb 22.00, 1g.47gb 45.50, 2g.47gb 45.50, 3g.93gb ~90.70, 4g.93gb ~90.70, "
    "7g.189gb ~184.31",
    "b300": "1g.34gb ~30.59, 1g.67gb ~62.14, 2g.67gb ~62.14, 3g.135gb ~132.90, 4g.135gb ~132.90, "
    "7g.269gb ~267.69",
    "pro6000": "1g.24gb 23.12, 2g.48gb 47.38, 4g.96gb 95.00",
}
