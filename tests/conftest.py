"""Without a GPU, Triton kernels run in Triton's interpreter; it is asked for before triton is imported."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from motab_kernels.backend import HAS_LIBRARY, warn_once

if not HAS_LIBRARY:  # warned of once a process: here, where no test fails of it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_once()
