"""Every address that a Triton kernel loads or stores in the interpreter lies in an element of one of its tensors.

The interpreter reads past a tensor's end in silence. Here a launch's tensors are noted byte by byte, so that the gap
between padded rows counts as outside too, and each load and store is looked up.
"""

import numpy as np
import torch
from ptx.memory import allow


class Sanitizer:
    def __init__(self):
        self.tensors = []  # beside the arguments: a kernel may be given addresses
        self.storages = {}  # address of the first byte to whether each may be touched

    def patch(self, monkeypatch):
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        begin, load, store = (
            GridExecutor._init_args_hst,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        def begun(executor, args, kwargs):
            on_host = begin(executor, args, kwargs)
            self.storages = {}
            for x in (*on_host[0], *on_host[1].values(), *self.tensors):
                if isinstance(x, torch.Tensor):
                    self.allow(x)
            return on_host

        def loaded(builder, pointers, mask, *rest):
            self.check(executed="load", pointers=pointers, mask=mask)
            return load(builder, pointers, mask, *rest)

        def stored(builder, pointers, value, mask, *rest):
            self.check(executed="store", pointers=pointers, mask=mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(GridExecutor, "_init_args_hst", begun)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stored)

    def allow(self, x):
        storage = x.untyped_storage()
        allow(x, self.storages.setdefault(storage.data_ptr(), np.zeros(storage.nbytes(), dtype=bool)))

    def check(self, executed, pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        last = pointers.get_element_ty().primitive_bitwidth // 8 - 1
        for start, allowed in self.storages.items():
            if not addresses.size:
                return
            inside = (addresses >= start) & (addresses + last < start + len(allowed))
            offsets = addresses[inside] - start
            inside[inside] = allowed[offsets] & allowed[offsets + last]
            addresses = addresses[~inside]
        if addresses.size:
            raise IndexError(f"{executed} of {addresses.size} elements outside of the kernel's tensors")
