"""CUDA tensors that compute on the CPU, in a CPU build of torch.

Import this before torch, in a process of its own. Inside `with Pretend() as device:`, `device="cuda"` works
everywhere. A mix of devices raises, and `device` counts kernel launches, waits of the host, and copies to
and from the device, these by the line of ours that caused them. What it cannot show: kernels, NCCL, memory,
speed.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def build() -> Path:
    """Return the guard as a shared library; it is built once per version of torch and of its source.

    Raises:
        FileNotFoundError: there is no g++.
    """
    source = Path(__file__).with_name("guard.cpp")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    version = f"{importlib.metadata.version('torch')}-{source.stat().st_mtime_ns}"
    target = Path(tempfile.gettempdir(), f"diffray-guard-{os.getuid()}-{version}.so")
    if not target.exists():
        aside = target.with_suffix(f".{os.getpid()}")
        include = torch_folder / "include"
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", str(aside)]
        command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{torch_folder}/lib"]
        command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
        subprocess.run(command, check=True)
        aside.replace(target)
    return target


assert "torch" not in sys.modules, "import this before torch"
_library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

_library.install_guard()

# Operations that launch nothing.
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"),
    *("squeeze", "detach", "split", "split_with_sizes", "narrow", "alias", "as_strided", "unbind", "chunk"),
    *("_reshape_alias", "lift_fresh", "unfold", "empty", "empty_like", "empty_strided", "new_empty"),
    *("diagonal", "_local_scalar_dense", "set_", "new_empty_strided", "view_as_real", "view_as_complex"),
    *("is_same_size", "view_as"),
}
# Operations whose result's size or value the host needs.
WAITS = {
    *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"),
    *("unique_consecutive", "repeat_interleave"),
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_"}
# Operations that take no number from the CPU in place of a tensor on the device.
NO_SCALARS = {
    *("embedding", "native_group_norm", "convolution", "addmm", "mm", "bmm", "cat", "stack"),
    *("index_copy", "index_select", "gather", "scatter"),
}


class Cuda(torch.Tensor):
    """A tensor that says it is on cuda:0; its values are in `values`, on the CPU."""

    values: torch.Tensor  # type: ignore[assignment]  # those of sparse tensors are a method
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False, **_: Any) -> Any:
        if isinstance(values, Cuda):
            values = values.values
        if values.device.type == "meta":
            return torch.nn.Parameter(values, requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device("cuda:0"),
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Cuda({self.values!r})"

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.values = value.values if isinstance(value, Cuda) else value

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    def tolist(self) -> Any:
        Pretend.current.waits[f"tolist {caller()}"] += 1
        return self.values.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a device has no numpy form")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Pretend.current.__torch_dispatch__(func, types, args, kwargs)


def caller() -> str:
    """Return the line of ours, or else of a library of this field, that is running."""
    frame: types.FrameType | None = sys._getframe(1)
    of_library = "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages" in name:
            if of_library == "elsewhere" and ("deepspeed" in name or "diffusers" in name):
                of_library = f"{name.split('site-packages/')[-1]}:{frame.f_lineno}"
        elif name.startswith(f"{ROOT}{os.sep}") and name != __file__:
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return of_library


class Pretend(TorchDispatchMode):
    """The pretended device, and what was done with it since `reset`.

    Attributes:
        launches: kernels.
        waits, to_device, to_host: waits of the host for the device, and copies, by the line that caused them.
        pageable: the copies to the device that do not come from pinned memory, for which the host waits.
    """

    current: "Pretend"

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.launched = 0  # ever
        self.reset()

    def reset(self) -> None:
        self.launches = 0
        self.waits: Counter[str] = Counter()
        self.to_device: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()

    def __enter__(self) -> "Pretend":
        torch._C._set_only_lift_cpu_tensors(True)
        Pretend.current = self
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in ("_pin_memory", "pin_memory"):
            return args[0]
        if name == "is_pinned":
            return True
        there: list[Cuda] = []
        here: list[torch.Tensor] = []
        values = _values(args, there, here)
        options = {key: _values(each, there, here) for key, each in kwargs.items()}
        pinned = options.pop("pin_memory", False)
        device = torch.device(options["device"]) if options.get("device") is not None else None
        result_there = device.type == "cuda" if device else bool(there)
        if device and device.type == "cuda":
            options["device"] = torch.device("cpu")
        if name == "_to_copy":
            self._count_copy(args[0], result_there)
        elif name == "copy_":
            result_there = isinstance(args[0], Cuda)
            self._count_copy(args[1], result_there, kwargs.get("non_blocking", args[2:]))
        elif there and here:
            self._check(name, here, there)
        if there and (name in WAITS or (name == "index" and _has_mask(args[1]))):
            self.waits[f"{name} {caller()}"] += 1
        if (there or result_there) and name not in VIEWS:
            self.launches += 1
            self.launched += 1
        out = func(*values, **options)
        if pinned:
            self.pinned.add(out.untyped_storage().data_ptr())
        if func._schema.name.startswith("aten::") and _in_place(name, kwargs):
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Cuda):
                return target if target.shape == target.values.shape else Cuda(target.values)
            if isinstance(target, torch.Tensor):
                return target
            if isinstance(target, (list, tuple)):
                return None if out is None else target
        return _on_device(out) if result_there else out

    def _count_copy(self, source: torch.Tensor, to_device: bool, asynchronous: Any = False) -> None:
        from_device = isinstance(source, Cuda)
        if to_device and not from_device:
            self.to_device[caller()] += 1
            if source.untyped_storage().data_ptr() not in self.pinned:
                self.pageable[caller()] += 1
        if from_device and not to_device:
            self.to_host[caller()] += 1
            if not asynchronous:
                self.waits[f"copy {caller()}"] += 1

    def _check(self, name: str, here: list[torch.Tensor], there: list[Cuda]) -> None:
        """Raise RuntimeError where CUDA would refuse tensors of both devices."""
        if name in INDEXING:
            if any(tensor.dim() for tensor in here):
                self.to_device[f"index {caller()}"] += 1
            return
        if name in NO_SCALARS or any(tensor.dim() for tensor in here):
            shapes = [tuple(tensor.shape) for tensor in here], [tuple(tensor.shape) for tensor in there]
            raise RuntimeError(f"{name} at {caller()}: {shapes[0]} on cpu with {shapes[1]} on cuda")


def _values(each: Any, there: list[Cuda], here: list[torch.Tensor]) -> Any:
    """Return an argument with tensors of the CPU only; add its tensors to those of their devices.

    Arguments nest tuples and lists only, so this takes a tenth of the time of torch's `tree_map`.
    """
    if isinstance(each, Cuda):
        there.append(each)
        return each.values
    if isinstance(each, torch.Tensor):
        here.append(each)
    elif type(each) in (tuple, list):
        return type(each)([_values(inner, there, here) for inner in each])
    return each


def _on_device(each: Any) -> Any:
    if isinstance(each, torch.Tensor):
        return each if isinstance(each, Cuda) else Cuda(each)
    return type(each)([_on_device(inner) for inner in each]) if type(each) in (tuple, list) else each


def _in_place(name: str, kwargs: dict[str, Any]) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or "out" in kwargs


def _has_mask(indices: Any) -> bool:
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices or [])


class Stream:
    """A CUDA stream; all are one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def synchronize(self) -> None:
        Pretend.current.waits[f"stream {caller()}"] += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """A CUDA event. To wait for it counts only where nothing was launched since: the device then runs dry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.launched = 0

    def record(self, *args: Any) -> None:
        self.launched = Pretend.current.launched

    def synchronize(self) -> None:
        if Pretend.current.launched == self.launched:
            Pretend.current.waits[f"event {caller()}"] += 1

    def query(self) -> bool:
        return True

    def wait(self, *args: Any) -> None:
        pass


def _pretend_module() -> None:
    """Make torch.cuda say that an H100 is there."""

    def synchronize(device: Any = None) -> None:
        Pretend.current.waits[f"synchronize {caller()}"] += 1

    properties = types.SimpleNamespace(
        total_memory=80 << 30, major=9, minor=0, name="NVIDIA H100", multi_processor_count=132
    )
    state = torch.zeros(1, dtype=torch.uint8)
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "_is_in_bad_fork": lambda: False,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: {},
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100",
        "get_device_properties": lambda device=None: properties,
        "set_per_process_memory_fraction": lambda *args, **kwargs: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: state,
        "set_rng_state": lambda state, device=None: None,
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replaced[name] = lambda device=None: 0
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"):
        replaced[name] = lambda device=None: None
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_init = lambda: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]


def _move(
    self: torch.nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    """Stand in for `Module._apply`: a parameter that moves to the device becomes a new one."""
    for child in self.children():
        _move(child, convert)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            moved = convert(parameter)
        if moved is parameter:
            continue
        if isinstance(parameter, Cuda) == isinstance(moved, Cuda):
            parameter.data = moved
        else:
            self._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = convert(buffer)
    return self


_pretend_module()
torch.nn.Module._apply = _move  # type: ignore[method-assign]
torch.__future__.set_overwrite_module_params_on_conversion(True)
