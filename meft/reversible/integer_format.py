"""The format of integer streams: the size of a quantum, the greatest value.

A number x is stored as round(x 2^fraction_bits), in 32 bits or in 64.
"""

import torch

FRACTION_BITS = {torch.float16: 14, torch.bfloat16: 14}
"""Fraction bits per compute dtype. The quantum is below the dtype's own rounding for
values of ordinary size, and the range is 32768 in 32 bits.
"""
FRACTION_BITS_WIDE = 18
"""Fraction bits for float32 and wider: range 2048 in 32 bits, 8.8e12 in 64."""
LIMITS = {torch.int32: 2.0**29, torch.int64: 2.0**61}
"""Greatest value of one addition, in quanta, by the dtype of streams."""
