"""Tensors that say they are on a GPU, and the mode in which torch makes them."""

import warnings

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten.copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
#: Operations whose result, or its size, the host reads.
READ_BY_THE_HOST = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
)


class MockTensor(torch.Tensor):
    """A tensor on cuda:0 in name; `numbers` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        assert type(numbers) is torch.Tensor, type(numbers)
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **layout, device="cuda:0")
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **keywords):
        return f"MockTensor({self.numbers})"

    def __deepcopy__(self, memo):
        copied = MockTensor(self.numbers.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def data_ptr(self):
        return self.numbers.data_ptr()

    def untyped_storage(self):
        return self.numbers.untyped_storage()

    def tolist(self):
        wait("tolist")
        return self.numbers.tolist()

    def numpy(self, **keywords):
        raise TypeError("can't convert a tensor on cuda:0 to numpy; copy it to the host first")


class Device:
    """What the device is asked to do. `sync_mode` is that of torch.cuda.set_sync_debug_mode."""

    sync_mode = "default"
    captured = None  # while a graph is captured, the operations and launches of it


def wait(what):
    """The host waits for the device here."""
    if Device.sync_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if Device.sync_mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)
    if Device.captured is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def unwrapped(tree):
    return tree_map_only(MockTensor, lambda x: x.numbers, tree)


def run(func, args, kwargs):
    """`func` on the numbers; its result is on the device where a GPU's would be."""
    if func.namespace == "motab_kernels":  # asks its tensors where they are
        with MockMode():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    check(func, args, kwargs)
    on_device = is_on_device(func, args, kwargs)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu"), "pin_memory": None}
    own_args, own_kwargs = unwrapped((args, kwargs))
    if func is aten.mm.dtype:  # of 16 bits into float32, which the CPU has not
        func, own_args = aten.mm.default, [x.to(own_args[2]) for x in own_args[:2]]
    result = func(*own_args, **own_kwargs)
    if not on_device:
        return result
    if Device.captured is not None:
        Device.captured.append((func, own_args, own_kwargs, result))
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, MockTensor, result))


def tensors_of(args, kwargs):
    return [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]


def is_on_device(func, args, kwargs):
    """Whether the result is."""
    if func in COPIES:
        return isinstance(args[0], MockTensor)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == "cuda"
    return any(isinstance(x, MockTensor) for x in tensors_of(args, kwargs))


def check(func, args, kwargs):
    """Note where the host waits; refuse tensors of the host beside those of the device."""
    if func in COPIES or func is aten._to_copy.default:
        source = args[1] if func in COPIES else args[0]
        asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
        if isinstance(source, MockTensor) != is_on_device(func, args, kwargs) and source.numel() and not asynchronous:
            wait(f"{func} between the host and the device")
        return
    tensors = tensors_of(args, kwargs)
    of_host = [x for x in tensors if not isinstance(x, MockTensor) and x.dim()]
    if not any(isinstance(x, MockTensor) for x in tensors):
        return
    if func in INDEXING and isinstance(args[0], MockTensor):
        if of_host or any(x is not None and x.dtype == torch.bool for x in args[1]):
            wait(f"{func} by a mask or a tensor of the host")
    elif of_host:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {tensors}")
    if func in READ_BY_THE_HOST or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        wait(func)


class MockMode(TorchDispatchMode):
    """In it, what is made on "cuda" is a MockTensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
