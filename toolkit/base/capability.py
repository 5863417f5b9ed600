"""The compute capability that a number format needs, for rules (a card by its name) and for checks
(the card that is here).
"""

from __future__ import annotations

FOUR_BIT = (7, 0)  # bitsandbytes' NF4 kernels begin at Volta
BFLOAT16 = (8, 0)  # Ampere
FLOAT8_CACHE = (8, 0)  # stored in 8 bits and converted for every use ...
FLOAT8_NATIVE = (8, 9)  # ... before Ada, which computes with it
