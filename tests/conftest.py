"""What holds for every test: one thread for each process, and a garbage collector that looks less often."""

from __future__ import annotations

import gc
import os

# Tests run side by side, and models of this size are slower with a second thread: it spins between two tiny kernels.
# Before torch is imported, and for the processes that tests start; who sets it otherwise gets that.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Captures make and drop very many small objects: the default looks for cycles among torch's half a million again and
# again. Tests that need a collection ask for it.
gc.set_threshold(50_000, 20, 20)
