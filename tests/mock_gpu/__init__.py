"""A GPU in name: tensors on "cuda" whose numbers are on the CPU, so that what the host does for a GPU is tested without
one. Triton's kernels run in its interpreter.

What on a GPU is an error is one here: tensors of the host and of the device in one operation, a pointer of the host in
a kernel, NumPy's view of a device's tensor. Where a GPU would make the host wait is counted, and raises where
`torch.cuda.set_sync_debug_mode("error")` or the capture of a graph asks for it; a replayed graph runs the operations
and the launches of its capture again, with what their tensors hold then.

`tensor.py` has the tensors, `cuda.py` what else of torch.cuda is asked for, `device.cpp` tells torch's autograd that
there is such a device. Not shown: streams, asynchrony, speed, and how a GPU rounds.
"""

from mock_gpu.cuda import install

__all__ = ["install"]
