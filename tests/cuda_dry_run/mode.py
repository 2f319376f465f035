"""What every operation passes through while the device that is not there is used.

Operations on CPU tensors run as ever. Those that meet a tensor of cuda:0 or ask for one give FakeTensors: shapes,
dtypes and devices without numbers. Mixed devices and mixed dtypes raise as CUDA's kernels do; a copy to the host is
zeros, and is noted as a wait, which raises under capture and under `set_sync_debug_mode("error")`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
CUDA, META = torch.device("cuda:0"), torch.device("meta")
ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).resolve().parent
# Kernels that take tensors of one floating dtype; elementwise ones promote, and batch norm mixes.
ONE_DTYPE = {
    aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.native_layer_norm, aten.native_group_norm,
    aten.index_put, aten.index_put_, aten._index_put_impl_, aten.lerp, aten.lerp_, aten._foreach_lerp_,
    aten.scatter, aten.scatter_, aten.index_copy, aten.index_copy_, aten.index_add, aten.index_add_, aten.dot,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

NEGATIONS = {aten.bitwise_not, aten.logical_not}


class DeviceFault(RuntimeError):
    """What CUDA would refuse."""


class CudaDryRun(TorchDispatchMode):
    """The mode; `waits` counts host synchronisations by the line of the project that caused them."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        self.capturing = False
        self.sync_debug = "default"

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else dynamo compiles nothing

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    # ---- waits ----

    def wait(self, what: str) -> None:
        """A host synchronisation; under capture and in sync debug mode it raises as on a GPU."""
        if self.capturing:
            raise DeviceFault(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.sync_debug == "error":
            raise DeviceFault(f"called a synchronizing CUDA operation ({what})")
        self.waits[f"{place()}: {what}"] += 1

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The waits of the block."""
        before, here = Counter(self.waits), Counter()
        yield here
        here.update(self.waits - before)

    # ---- operations ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # somebody's own fakes: dynamo at work
        if func is torch.ops.prim.device.default:
            return META  # to C++, whose autograd engine would look for streams of a CUDA device
        leaves = leaves_of(args, kwargs)
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            return self.on_host(func, args, kwargs)
        special = getattr(self, "do_" + func._schema.name.split("::")[1], None)
        if special is not None:
            return special(func, *args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                done = func.decompose(*args, **kwargs)
            if done is not NotImplemented:
                return done
        return self.on_device(func, args, kwargs, leaves)

    def on_host(self, func, args, kwargs) -> Any:
        """The CPU's own; what asks for pinned memory gets a note that it is."""
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "pin_memory": False})
        made.pinned_here = True
        return made

    def on_device(self, func, args, kwargs, leaves) -> Any:
        if func.overloadpacket in INDEXED:
            check_indexed(func, args)
            args = (args[0], [self.index_on_device(i) for i in args[1]], *args[2:])
            leaves = leaves_of(args, kwargs)
        made = {x: self.empty(x) for x in leaves if isinstance(x, Tensor) and x.is_meta}  # by C++, for this operation
        tensors = [made.get(x, x) for x in leaves if isinstance(x, Tensor)]
        check_devices(func, tensors)
        check_dtypes(func, tensors)
        fakes = made | {x: self.scalar_on_host(x) for x in tensors if not isinstance(x, FakeTensor)}
        if fakes or any(isinstance(x, torch._C.Generator) for x in leaves):
            args, kwargs = tree_map(
                lambda x: fakes.get(x, x) if isinstance(x, Tensor)
                else None if isinstance(x, torch._C.Generator) else x, (args, kwargs),
            )  # fmt: skip
        result = self.fake.dispatch(func, (), args, kwargs)
        if isinstance(result, FakeTensor) and result.dtype == torch.bool:
            sound = all(getattr(x, "is_sound", False) for x in tensors)
            result.is_sound = sound and func.overloadpacket not in NEGATIONS
            result.is_nowhere = sound and func.overloadpacket in NEGATIONS
        return result

    def empty(self, like: Tensor, dtype: torch.dtype | None = None, device: torch.device = CUDA) -> FakeTensor:
        """A fake of the same shape and strides."""
        with self.fake:
            return torch.empty_strided(like.shape, like.stride(), dtype=dtype or like.dtype, device=device)

    def scalar_on_host(self, x: Tensor) -> Tensor:
        """A number on the CPU, which kernels take as an argument."""
        return self.empty(x, device=torch.device("cpu"))

    def index_on_device(self, index: Tensor | None) -> Tensor | None:
        """An index from the host is copied, a mask is counted."""
        if index is None:
            return None
        if not isinstance(index, FakeTensor):
            self.wait("an index from the host")
            index = self.empty(index)
        if index.dtype in (torch.bool, torch.uint8):
            raise DeviceFault("an index by a mask waits and has no known size here: write torch.where")
        return index

    # ---- copies ----

    def do__to_copy(self, func, x: Tensor, **options):
        """Between devices: zeros on the host, no numbers on the device."""
        device = options.pop("device", None) or x.device
        waiting = not options.pop("non_blocking", False)
        dtype = options.get("dtype") or x.dtype
        if isinstance(x, FakeTensor) and device.type in ("cuda", "meta"):
            return self.fake.dispatch(func, (), (x,), {"device": CUDA, **options})
        if isinstance(x, FakeTensor):
            if waiting:
                self.wait("a copy to the host")
            return aten._to_copy.default(zeros_like(x), **options)
        if waiting:
            self.wait("a copy from the host")
        elif self.capturing and not x.is_pinned():
            self.wait("a copy from memory that is not pinned")
        shape = torch.empty_like(x, device="meta", memory_format=options.get("memory_format") or torch.preserve_format)
        return self.empty(shape, dtype)

    def do_copy_(self, func, to: Tensor, source: Tensor, non_blocking: bool = False):
        if isinstance(to, FakeTensor) and isinstance(source, FakeTensor):
            return self.fake.dispatch(func, (), (to, source, non_blocking), {})
        if source.is_meta:
            waiting = not to.ndim or any(source.stride())  # made by C++ for x[i] = y: a number fills a slice
        else:
            waiting = not non_blocking or (self.capturing and not source.is_pinned())
        if waiting:
            self.wait("a copy to the host" if isinstance(source, FakeTensor) else "a copy from the host")
        torch.broadcast_shapes(to.shape, source.shape)
        return to if isinstance(to, FakeTensor) else to.zero_()

    def do__local_scalar_dense(self, func, x: Tensor):
        self.wait("a number read by the host")
        return zeros_like(x).item()

    def do_equal(self, func, a: Tensor, b: Tensor) -> bool:
        check_devices(func, [a, b])
        self.wait("a comparison read by the host")
        return a.shape == b.shape  # zeros and zeros

    def do_nonzero(self, func, x: Tensor):
        """One place, as the one of a timestep; none where something is not finite."""
        self.wait("the size of a nonzero")
        with self.fake:
            return torch.empty(0 if getattr(x, "is_nowhere", False) else 1, x.ndim, dtype=torch.long, device=CUDA)

    def do__pin_memory(self, func, x: Tensor, *_):
        return x

    # ---- float16's loss scaling ----

    def do__amp_foreach_non_finite_check_and_unscale_(self, func, grads, found, scale):
        check_devices(func, [*grads, found, scale])

    def do__amp_update_scale_(self, func, scale, *rest):
        check_devices(func, [scale, *(x for x in rest if isinstance(x, Tensor))])
        return scale


def leaves_of(args: Iterable, kwargs: Mapping[str, Any]) -> list:
    """The arguments of an operation, whose lists are flat."""
    leaves = []
    for x in (*args, *kwargs.values()):
        leaves.extend(x if isinstance(x, (list, tuple)) else (x,))
    return leaves


def zeros_like(x: Tensor) -> Tensor:
    """What the host gets of a fake: zeros in its shape and strides; of what tells finite from not, ones."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(getattr(x, "is_sound", False))


def check_devices(func, tensors: list[Tensor]) -> None:
    """DeviceFault where CPU and CUDA meet; a number on the CPU may."""
    host = [x for x in tensors if not isinstance(x, FakeTensor) and x.ndim]
    if host and len(host) < len(tensors) or host and not any(isinstance(x, FakeTensor) for x in tensors):
        raise DeviceFault(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(the one on the CPU has shape {tuple(host[0].shape)})"
        )


def check_indexed(func, args) -> None:
    """DeviceFault for an index on the GPU into a tensor of the CPU."""
    if not isinstance(args[0], FakeTensor):
        raise DeviceFault(f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")


def check_dtypes(func, tensors: list[Tensor]) -> None:
    """DeviceFault where a kernel would meet two floating dtypes."""
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
    if func.overloadpacket in ONE_DTYPE and len(dtypes) > 1:
        raise DeviceFault(f"{func}: expected one scalar type but found {sorted(map(str, dtypes))}")


def place() -> str:
    """The innermost line of the project on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_ours(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a library"


@cache
def is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and not path.is_relative_to(HARNESS) and "site-packages" not in path.parts
