"""How a timed call finds the caches.

cold: before each call 64 MB are read and written, the same for every variant and untimed. In
training a loss runs once, after a model that has moved gigabytes: its inputs, its code and its
objects have left the caches. warm: the call is repeated, and finds everything where it left it.
"""

from __future__ import annotations

COLD, WARM = "cold", "warm"
# In the order in which they are timed and shown.
MODES = (COLD, WARM)
