"""The process that runs student code. It knows no test and no expected value: it gets arguments and sends back results.

grade.py starts `python runner.py` with a Unix socket as its standard input. torch is imported once; for every exercise
the process forks, and the child loads the student's file and answers calls on a socket of its own until it is closed.
Messages are JSON behind a length of 8 bytes, values as `encode` writes them: nothing that comes back is executed.

In the child an audit hook refuses sockets, processes, writing, and reading outside the Python installation. That stops
slips and curious code, not an attacker: for grades that matter, grade in a container, with --user (README.md).
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import site
import socket
import struct
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable

LARGEST = 1 << 24  # bytes of a message
MEMORY = 4 << 30  # bytes that a child may allocate

# ---- messages and values -------------------------------------------------------------------------------------------


def pack(message: dict) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!Q", len(data)) + data


def receive(read: Callable[[int], bytes]) -> dict | None:
    """The next message; None when the other side has closed. ValueError if it is too large or no JSON."""
    size = _exactly(read, 8)
    if size is None:
        return None
    (length,) = struct.unpack("!Q", size)
    if length > LARGEST:
        raise ValueError(f"a message of {length} bytes")
    data = _exactly(read, length)
    return None if data is None else json.loads(data)


def _exactly(read: Callable[[int], bytes], count: int) -> bytes | None:
    parts = []
    while count:
        part = read(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


@dataclasses.dataclass(frozen=True)
class Strange:
    """A result of a type that no exercise returns. It equals nothing that is expected."""

    type: str


def encode(value: object, tensors: list | None = None) -> object:
    """JSON of a value. Tensors that need a gradient are appended to `tensors` and carry their place in it."""
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors) for item in value]
        return items if isinstance(value, list) else {"kind": "tuple", "items": items}
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() <= 1_000_000:
        wide = value.detach().cpu()
        message = {"kind": "tensor", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if value.is_complex():
            return {"kind": "strange", "type": "a complex tensor"}
        message["values"] = (wide.double() if value.is_floating_point() else wide).flatten().tolist()
        if tensors is not None and value.requires_grad:
            message["needs_grad"] = len(tensors)
            tensors.append(value)
        return message
    if isinstance(value, random.Random):
        version, state, gauss = value.getstate()
        return {"kind": "random", "state": [version, list(state), gauss]}
    if dataclasses.is_dataclass(value) and type(value).__name__ == "Sample":
        return {"kind": "Sample", "fields": {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    return {"kind": "strange", "type": type(value).__name__}


def decode(message: object, Sample: type, tensors: list | None = None) -> object:
    """The value of a JSON; tensors that need a gradient are also put into `tensors`, at their place."""
    import torch

    if isinstance(message, list):
        return [decode(item, Sample, tensors) for item in message]
    if not isinstance(message, dict):
        return message
    kind = message.get("kind")
    if kind == "tuple":
        return tuple(decode(item, Sample, tensors) for item in message["items"])
    if kind == "tensor":
        tensor = torch.tensor(message["values"], dtype=getattr(torch, message["dtype"])).reshape(message["shape"])
        if tensors is not None and "needs_grad" in message:
            tensor.requires_grad_()
            tensors.append(tensor)
        return tensor
    if kind == "random":
        rng = random.Random()
        version, state, gauss = message["state"]
        rng.setstate((version, tuple(state), gauss))
        return rng
    if kind == "Sample":
        return Sample(**message["fields"])
    return Strange(str(message.get("type")))


# ---- the child: one exercise of one student ------------------------------------------------------------------------


class Scripts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of the project's scripts and packages, from memory."""

    def __init__(self, code: dict[str, types.CodeType | str]):
        self.code = code

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.code:
            package = any(name.startswith(f"{fullname}.") for name in self.code)
            return importlib.util.spec_from_loader(fullname, self, is_package=package)

    def exec_module(self, module):
        module.__file__ = f"/handout/{module.__name__.replace('.', '/')}.py"
        code = self.code[module.__name__]
        exec(compile(code, module.__file__, "exec") if isinstance(code, str) else code, module.__dict__)


FORBIDDEN = tuple(
    "socket. subprocess. ctypes. mmap. pty. syslog. shutil. signal. sys.addaudithook gc.get_referrers "
    "os.system os.exec os.fork os.posix_spawn os.spawn os.kill os.remove os.rename os.rmdir os.mkdir os.link "
    "os.symlink os.truncate os.chmod os.chown os.putenv".split()
)


def forbid() -> None:
    """From here on, for good: no sockets, no processes, no writing, no reading but of the installation."""
    folders = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), site.getusersitepackages()}
    folders |= {"/dev/urandom", "/dev/null", "/proc/self"}
    allowed = tuple(os.path.realpath(folder) for folder in folders if folder != "/")
    allowed = tuple(folder + os.sep if os.path.isdir(folder) else folder for folder in allowed)
    writing, real = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, os.path.realpath

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed in an exercise")
        if event in ("open", "os.listdir", "os.scandir"):
            path = arguments[0]
            if isinstance(path, int):  # a descriptor that is open already
                return
            flags = arguments[2] if event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) else 0
            place = real(os.fsdecode(path if path is not None else "."))
            if flags & writing or not place.startswith(allowed):
                raise PermissionError(f"{event} of {place} is not allowed in an exercise")
        if event == "object.__setattr__" and arguments[1] == "__code__":
            raise PermissionError("changing code is not allowed in an exercise")

    sys.addaudithook(hook)


def limit(job: dict) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"] + 1, job["seconds"] + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the limit is not kept, or cannot be set
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if job["user"] is not None:
        os.setgroups([])
        os.setgid(job["user"][1])
        os.setuid(job["user"][0])


def serve(fd: int, job: dict, cache: dict) -> None:
    """Load the student's file and answer calls on `fd` until it is closed."""
    import torch

    def send(message: dict) -> None:
        data = memoryview(pack(message))
        while data:
            data = data[os.write(fd, data) :]

    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what the student prints goes nowhere
        os.dup2(null, standard)
    code = {name: cache.get(digest) or text for name, (digest, text) in job["scripts"].items()}
    cache.clear()  # no other version of a script is in memory: above all not the reference's of this exercise
    sys.meta_path.insert(0, Scripts(code))
    torch.set_num_threads(job["threads"])
    limit(job)
    forbid()
    try:
        modules = {name: importlib.import_module(name) for name in ("pseudo_reward", job["module"])}
        del code
    except BaseException as error:
        send({"error": describe(error)})
        return
    Sample, module, calls = modules["pseudo_reward"].Sample, modules[job["module"]], []
    send({"ready": True})
    while (request := receive(functools.partial(os.read, fd))) is not None:
        try:
            if "call" in request:
                send(answer(request, module, Sample, calls))
            else:  # gradients of an earlier call
                inputs, outputs = calls[request["backward"]]
                gradients = decode(request["gradients"], Sample)
                found = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
                send({"gradients": encode(list(found))})
        except BaseException as error:
            send({"error": describe(error)})


def answer(request: dict, module: types.ModuleType, Sample: type, calls: list) -> dict:
    """The result of one call, and what became of its arguments."""
    inputs, outputs, target = [], [], module
    arguments = decode(request["arguments"], Sample, inputs)
    keywords = {name: decode(value, Sample, inputs) for name, value in request["keywords"].items()}
    for part in request["call"].split("."):
        target = getattr(target, part)
    if request["module_of"] is not None:  # a method: build its module, as (constructor arguments, parameters)
        built, parameters = decode(request["module_of"], Sample, inputs)
        owner = getattr(module, request["call"].split(".")[0])(*built)
        for name, tensor in parameters:
            delattr(owner, name)
            setattr(owner, name, tensor)
        arguments = [owner, *arguments]
    result = target(*arguments, **keywords)
    message = {"result": encode(result, outputs)}
    left = arguments[1:] if request["module_of"] is not None else arguments
    message["arguments"] = [encode(argument) for argument in left]
    calls.append((inputs, outputs))
    return message | {"number": len(calls) - 1}


def describe(error: BaseException) -> dict:
    """Type, message, and where: lines count from each function's `def`, as the rest of the file is the reference's."""
    where = [
        f"{os.path.basename(frame.f_code.co_filename)}, {frame.f_code.co_name}, "
        f"line {line - frame.f_code.co_firstlineno + 1} of it"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename.startswith("/handout/")
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        where.append(f"{os.path.basename(str(error.filename))}, line {error.lineno}")
    return {"type": type(error).__name__, "message": str(error)[:300], "where": where[-5:]}


# ---- the server: forks -----------------------------------------------------------------------------------------------


def main() -> None:
    """Jobs on standard input, each with a socket for its child; 'end' waits for, or kills, the child."""
    control = socket.socket(fileno=0)
    cache: dict[str, types.CodeType] = {}
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        message = receive(control.recv)
        if message is None:
            return
        if "preload" in message:  # scripts without solutions: their imports, and the patterns that they compile
            stubs = {name: compile(text, f"/handout/{name}.py", "exec") for name, text in message["preload"].items()}
            finder = Scripts(stubs)
            sys.meta_path.insert(0, finder)
            for name in stubs:
                importlib.import_module(name)
            sys.meta_path.remove(finder)
            for name in stubs:
                del sys.modules[name]
            with contextlib.suppress(ImportError):  # the first gradient would import it, half a second in every child
                importlib.import_module("torch.fx.experimental.symbolic_shapes")
            for digest, name, text in message["cache"]:
                cache[digest] = compile(text, f"/handout/{name}.py", "exec")
            gc.freeze()  # collections in the children leave these objects alone, and their memory shared
            control.send(b"x")
            continue
        pid = os.fork()
        if pid == 0:
            try:
                control.detach()
                os.close(0)
                serve(fds[0], message, cache)
            finally:
                os._exit(0)
        os.close(fds[0])
        wanted = control.recv(1)  # the grader is done with this child, or has waited long enough, or is gone
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, 9)
        os.waitpid(pid, 0)
        if not wanted:
            return
        control.send(b"x")


if __name__ == "__main__":
    main()
