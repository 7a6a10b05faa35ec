"""A GPU whose tensors have no data, so that none is needed: traced by torch.compile, or watched for waits."""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_gpu(monkeypatch):
    """A GPU of compute capability 9.0 whose tensors have no data."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        # Without a GPU torch.autocast("cuda") would switch itself off.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def move_to_fake_gpu(model):
    """Replace parameters and buffers: `Module.to` cannot turn real tensors into fake ones."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(data)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


_WAITING = {"_local_scalar_dense", "bincount", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
"""Operators whose result, or its size, the host reads."""


class NoHostWaits(TorchDispatchMode):
    """Raise AssertionError for an operator for which the host waits for a GPU, or copies from its memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if name == "_to_copy":
            devices.add(torch.device(kwargs.get("device") or tensors[0].device).type)
        if "cuda" in devices:
            assert name not in _WAITING, f"{name} waits for the device"
            indices = args[1] if name in ("index", "index_put", "index_put_") else ()
            has_mask = any(index is not None and index.dtype == torch.bool for index in indices)
            assert not has_mask, f"{name} with a mask waits for the device"
        if len(devices) > 1:
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) == 3 and args[2])
            assert is_async, f"{name} between devices waits"
        return func(*args, **kwargs)
