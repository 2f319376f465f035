"""The rest of torch around the mode: torch.cuda's functions, streams, events, graphs, generators, files."""

import contextlib
import functools
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tests.cuda_dry_run.autocast import Casts, Generator
from tests.cuda_dry_run.mode import CUDA, CudaDryRun, DeviceFault, zeros_like

PROPERTIES = SimpleNamespace(
    name="A device that is not there", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132,
    L2_cache_size=50 * 2**20, is_integrated=False, is_multi_gpu_board=False, warp_size=32, gcnArchName="",
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
)  # fmt: skip
MEMORY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
FOREACH = [*sys.modules["torch.optim.optimizer"]._foreach_supported_types, FakeTensor]
class Stream:
    """A stream; all run in the order of the program."""

    cuda_stream, device = 0, CUDA

    def __init__(self, *args, **kwargs) -> None: ...
    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


class Event:
    """An event; its time is the host's."""

    def __init__(self, *args, **kwargs) -> None:
        self.seconds = None

    def record(self, stream=None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e-3 + 1e3 * (end.seconds - self.seconds)  # never 0

    def wait(self, stream=None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


@contextlib.contextmanager
def cuda_dry_run() -> Iterator[CudaDryRun]:
    """While the block runs this process has a CUDA device, of which nothing is there but shapes, dtypes and waits."""
    torch._C._ensureCUDADeviceGuardSet()  # C++ asks a guard, not the driver, for the device
    mode = CudaDryRun()
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        for owner, names in (
            (torch.cuda, cuda_functions(mode)),
            (torch.cuda.memory, {"reset_peak_memory_stats": nothing, "empty_cache": nothing}),
            (torch, {"Generator": Generator, "compile": compile_eagerly(torch.compile), "load": from_host(torch.load),
                     "isfinite": marked(torch.isfinite)}),
            (torch.utils, {"swap_tensors": swap}),
            (torch.nn.Module, {"_apply": swapping(torch.nn.Module._apply)}),
            (torch.Tensor, {"pin_memory": pin, "is_pinned": is_pinned, "isfinite": marked(torch.Tensor.isfinite),
                            "record_stream": nothing, "to": moved(torch.Tensor.to),
                            "cuda": lambda x, *_, **how: x.to(CUDA, **how)}),
            (FakeTensor, {"is_cuda": property(lambda x: x.device.type == "cuda"),
                          "is_meta": property(lambda x: x.device.type == "meta"), "__deepcopy__": copied,
                          "numpy": on_host,
                          "data_ptr": lambda x: x.untyped_storage().data_ptr() + x.storage_offset() * x.itemsize,
                           "__reduce_ex__": lambda x, how: host(x).__reduce_ex__(how)}),
            (torch.UntypedStorage, {"data_ptr": addressed(torch.UntypedStorage.data_ptr)}),
            (F, {"scaled_dot_product_attention": attention(F.scaled_dot_product_attention)}),
            (fake_tensor, {"init_gpu_context": nothing}),
            (sys.modules["torch.optim.optimizer"], {"_foreach_supported_types": FOREACH}),
            (_BaseDataLoaderIter, {"__init__": requested(_BaseDataLoaderIter.__init__),
                                   "__next__": pinning(_BaseDataLoaderIter.__next__)}),
            (subprocess, {"run": under_dry_run(subprocess.run)}),
        ):  # fmt: skip
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made here and copied there
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        casts = stack.enter_context(Casts())
        for module in (torch.autograd, torch.autograd.graph):
            run_backward = casting(module._engine_run_backward, casts)
            stack.enter_context(mock.patch.object(module, "_engine_run_backward", run_backward))
        stack.enter_context(mode)
        yield mode


def cuda_functions(mode: CudaDryRun) -> dict:
    """What stands in torch.cuda."""

    @contextlib.contextmanager
    def graph(made, *args, **kwargs):
        if mode.capturing:
            raise DeviceFault("CUDA error: a capture within a capture")
        mode.capturing = True
        try:
            yield
        finally:
            mode.capturing = False
        made.captured = True

    class CUDAGraph:
        captured = False

        def replay(self) -> None:
            if not self.captured:
                raise DeviceFault("Called CUDAGraph::replay without a preceding successful capture.")

        def reset(self) -> None:
            self.captured = False

        def pool(self) -> tuple[int, int]:
            return 0, 1

    def set_sync_debug_mode(how: str | int) -> None:
        mode.sync_debug = ("default", "warn", "error")[how] if isinstance(how, int) else how

    def synchronize(device=None) -> None:
        if mode.capturing:
            raise DeviceFault("CUDA error: operation not permitted when stream is capturing (synchronize)")

    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "is_initialized": lambda: True, "init": nothing, "_lazy_init": nothing, "_is_in_bad_fork": lambda: False,
        "set_device": nothing, "device": lambda _: contextlib.nullcontext(), "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda _=None: PROPERTIES.name, "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": lambda _=None: PROPERTIES, "get_arch_list": lambda: ["sm_90"],
        "synchronize": synchronize, "Event": Event, "Stream": Stream, "current_stream": lambda _=None: Stream(),
        "default_stream": lambda _=None: Stream(), "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": CUDAGraph, "graph": graph, "is_current_stream_capturing": lambda: mode.capturing,
        "graph_pool_handle": lambda: (0, 1),
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: ("default", "warn", "error").index(mode.sync_debug),
        "empty_cache": nothing, "reset_peak_memory_stats": nothing, **dict.fromkeys(MEMORY, lambda _=None: 0),
        "mem_get_info": lambda _=None: (2**36, 2**36), "ipc_collect": nothing,
        "manual_seed": nothing, "manual_seed_all": nothing, "get_rng_state_all": list, "set_rng_state_all": nothing,
        "get_rng_state": lambda _=None: torch.zeros(16, dtype=torch.uint8), "set_rng_state": nothing,
    }  # fmt: skip


def nothing(*args, **kwargs) -> None: ...


def host(x: FakeTensor) -> torch.Tensor:
    kept = zeros_like(x)
    return torch.nn.Parameter(kept, x.requires_grad) if isinstance(x, torch.nn.Parameter) else kept


def on_host(x: FakeTensor, *, force: bool = False):
    """Tensor.numpy."""
    if not force:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")
    return x.detach().cpu().numpy()


def from_host(load):
    """torch.load, which copies to the device that `map_location` names."""

    @functools.wraps(load)
    def loading(file, map_location=None, **kwargs):
        place = torch.device(map_location) if isinstance(map_location, (str, torch.device)) else None
        loaded = load(file, map_location="cpu", **kwargs)
        if place is None or place.type != "cuda":
            return loaded
        return tree_map(lambda x: x.to(place) if torch.is_tensor(x) else x, loaded)

    return loading


def addressed(data_ptr):
    """A storage's address; of one that is not there its handle, so that files tell shared weights from others."""

    @functools.wraps(data_ptr)
    def address(storage) -> int:
        return storage._cdata if storage.device.type == "meta" else data_ptr(storage)

    return address


def marked(isfinite):
    """What is computed nowhere is finite."""

    @functools.wraps(isfinite)
    def finite(x):
        result = isfinite(x)
        if isinstance(result, FakeTensor):
            result.is_sound = True
        return result

    return finite


def copied(x: FakeTensor, memo: dict) -> torch.Tensor:
    if id(x) not in memo:
        with torch.no_grad():
            made = x.detach().clone()
        made.requires_grad_(x.requires_grad)
        memo[id(x)] = torch.nn.Parameter(made, x.requires_grad) if isinstance(x, torch.nn.Parameter) else made
    return memo[id(x)]


def swapping(apply):
    """Module.to, after which optimisers hold the same parameters, as where `set_data` takes a CUDA tensor."""

    @functools.wraps(apply)
    def applied(module, *args, **kwargs):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return applied


def swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """torch.utils.swap_tensors for tensors with weak references, which all fakes have."""
    kinds, notes = (type(a), type(b)), (a.__dict__, b.__dict__)
    a.__class__, b.__class__ = kinds[::-1]
    a.__dict__, b.__dict__ = notes[::-1]
    torch._C._swap_tensor_impl(a, b)


def compile_eagerly(compile):
    """torch.compile with dynamo alone: nothing could compile or run kernels for the device."""

    @functools.wraps(compile)
    def compiling(model=None, *, backend=None, mode=None, options=None, **kwargs):
        if model is None:
            return functools.partial(compiling, **kwargs)
        if kwargs.get("fullgraph"):
            # Guards in C++ see another device than dynamo does, and never hold. A whole network of one shape needs
            # none; elsewhere dynamo compiles eight times and then lets it be.
            kwargs["options"] = {"guard_filter_fn": lambda guards: [g.guard_type != "TENSOR_MATCH" for g in guards]}
        return compile(model, backend="eager", **kwargs)

    return compiling


def attention(kernel):
    """Attention written out for fakes: the kernels' choice asks the device."""

    @functools.wraps(kernel)
    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        if not isinstance(query, FakeTensor):
            return kernel(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
        if query.dtype != key.dtype or query.dtype != value.dtype:
            dtypes = query.dtype, key.dtype, value.dtype
            raise DeviceFault(f"Expected query, key and value to have the same dtype, but got {dtypes}")
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        return torch.ops.aten._scaled_dot_product_attention_math(*given, scale=scale, **kwargs)[0]

    return attend


def casting(run_backward, casts: Casts):
    """The engine, with the mode that Tensor.backward has left: what checkpoints compute again is cast again."""

    @functools.wraps(run_backward)
    def running(*args, **kwargs):
        with casts:
            return run_backward(*args, **kwargs)

    return running


def moved(to):
    """Tensor.to, which gives a fake itself where nothing changes: below Python its device is meta."""

    @functools.wraps(to)
    def moving(x, *args, **kwargs):
        if not isinstance(x, FakeTensor) or kwargs.get("copy"):
            return to(x, *args, **kwargs)
        if args and torch.is_tensor(args[0]):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cuda":
            device = None
        options = {} if memory_format is None else {"memory_format": memory_format}
        if device is None and dtype in (None, x.dtype) and not options:
            return x
        return to(x, device=device, dtype=dtype or x.dtype, non_blocking=non_blocking, copy=copy, **options)

    return moving


def pin(x: torch.Tensor, *_) -> torch.Tensor:
    if isinstance(x, FakeTensor):
        raise DeviceFault("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    pinned = x.clone()
    pinned.pinned_here = True
    return pinned


def is_pinned(x: torch.Tensor, *_) -> bool:
    return getattr(x, "pinned_here", False)


def requested(make):
    """A loader that notes whether pinned memory was asked for; torch itself asks whether there is an accelerator."""

    @functools.wraps(make)
    def making(iterator, loader):
        expected, loader.pin_memory = loader.pin_memory, False
        try:
            make(iterator, loader)
        finally:
            loader.pin_memory = expected
        iterator.pins = expected

    return making


def pinning(following):
    """A loader whose batches lie in pinned memory where it was asked for it."""

    @functools.wraps(following)
    def next_batch(loader):
        batch = following(loader)
        return tree_map(lambda x: pin(x) if torch.is_tensor(x) else x, batch) if loader.pins else batch

    return next_batch


def under_dry_run(run):
    """subprocess.run, whose Python modules have the device too."""

    @functools.wraps(run)
    def running(command, *args, **kwargs):
        if isinstance(command, list) and command[:2] == [sys.executable, "-m"]:
            command = [*command[:2], "tests.cuda_dry_run", *command[2:]]
        return run(command, *args, **kwargs)

    return running
