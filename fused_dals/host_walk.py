"""The compiled walk over tensors and groups (host_walk.cpp): an optional part, built for the torch and Python at hand.

A step costs the host less with it; nothing else differs. It needs a C++ compiler, Python's headers and 15 seconds,
once: the first optimizer that steps on a GPU starts the compiler in the background and goes on without it until it is
done, or for ever where it fails. The result is kept where Triton keeps its kernels.

``FUSED_DALS_HOST_WALK=0`` in the environment leaves it out. ``python -m fused_dals`` builds it ahead of time.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
HEADER = SOURCE.with_name("host_helpers.h")
MODULE = "host_walk_compiled"
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC")
LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch_python")
OFF = "FUSED_DALS_HOST_WALK"


class BuildError(RuntimeError):
    """The compiled walk cannot be had here; the message says why."""


class Build:
    """One run of the compiler in the background, unless the result is there already.

    Raises BuildError, in the constructor or in ``finish``, where there is no compiler or it fails.
    """

    def __init__(self) -> None:
        self._cache, self._name = _cache(), MODULE + str(sysconfig.get_config_var("EXT_SUFFIX"))
        self._process: subprocess.Popen[bytes] | None = None
        self._module: Any | None = None
        self._pid = os.getpid()
        path = self._cache.get_file(self._name)
        if path is not None:
            with suppress(ImportError):  # cut off, or of a machine with other libraries: another takes its place
                self._module = _load(path)
                return
        self._start()

    def _start(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise BuildError("there is no C++ compiler: install g++ or clang++, or name one in CXX")
        command = [*shlex.split(compiler), *FLAGS, *_paths(), str(SOURCE)]
        # No TemporaryDirectory: a forked copy of this process would remove it when it ends.
        self._folder = Path(tempfile.mkdtemp(prefix="fused_dals_"))
        self._output, self._log = self._folder / self._name, self._folder / "log"
        command += ["-o", str(self._output), *LIBRARIES]
        try:
            with self._log.open("wb") as log:
                # A session of its own: the compiler is several processes, and an interrupt is not meant for them.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._remove_folder()
            raise BuildError(f"{compiler} does not start: {error}") from None
        atexit.register(self._stop)

    def _stop(self) -> None:
        """At the end of the process."""
        if os.getpid() == self._pid and self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self._process.pid, number)
                    self._process.wait(timeout=5)
            self._remove_folder()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self, *, wait: bool) -> Any | None:
        """The module; None where the compiler still runs and is not to be waited for."""
        if self._process is not None:
            if (self._process.wait() if wait else self._process.poll()) is None:
                return None
            self._keep(self._process.returncode)
        if self._module is None:
            raise BuildError("the build was interrupted")
        return self._module

    def _keep(self, returncode: int) -> None:
        atexit.unregister(self._stop)
        try:
            if returncode:
                lines = self._log.read_text(errors="replace").splitlines()
                told = next((line for line in lines if "error" in line), *lines[-1:] or ["it says nothing"])
                raise BuildError(f"the compiler ends with status {returncode}: {told}")
            _load(str(self._output))  # what does not load is not kept
            self._module = _load(self._cache.put(self._output.read_bytes(), self._name, binary=True))
        except ImportError as error:
            raise BuildError(f"the compiler's result cannot be loaded: {error}") from None
        except OSError as error:
            raise BuildError(f"the result cannot be kept: {error}") from None
        finally:
            self._process = None
            self._remove_folder()


def _cache() -> Any:
    """Triton's cache, for this source, torch and Python: a torch of another version has other classes inside."""
    try:
        from triton.runtime.cache import get_cache_manager
    except ImportError:
        raise BuildError("Triton is not installed, and there are no kernels without it") from None
    versions = (torch.__version__, str(torch.version.git_version), sys.version)
    parts = (SOURCE.read_bytes(), HEADER.read_bytes(), *(part.encode() for part in (*versions, *FLAGS, *LIBRARIES)))
    try:
        return get_cache_manager(hashlib.sha256(b"\0".join(parts)).hexdigest())
    except (OSError, RuntimeError) as error:
        raise BuildError(f"Triton's cache cannot be written: {error}") from None


def _paths() -> list[str]:
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    return [*(f"-I{path}" for path in (*includes, sysconfig.get_path("include"))), f"-L{torch_folder / 'lib'}"]


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostWalk:
    """The compiled walk of this process: not wanted yet, being built, there, or not to be had."""

    def __init__(self) -> None:
        self.compiled: Any | None = None  # the module, once it is there; host_walk.cpp says what is in it
        self.why_not = ""  # why there never will be one
        self._build: Build | None = None
        self._lock = threading.Lock()

    def want(self, *, wait: bool = False) -> Any | None:
        """The module if it is there, or else None and, if nobody did, begin to build it; ``wait`` for the compiler.

        Raises nothing: a step has done its work when it asks.
        """
        if self.compiled is None and not self.why_not and self._lock.acquire(blocking=wait):
            try:
                self._go_on(wait)
            except Exception as error:  # a full disk, a file that is not there, somebody's own cache
                self.why_not = str(error) or repr(error)
            finally:
                if self.compiled is not None or self.why_not:
                    self._build = None
                self._lock.release()
        return self.compiled

    def _go_on(self, wait: bool) -> None:
        if os.environ.get(OFF) == "0":
            raise BuildError(f"{OFF} is 0 in the environment")
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            raise BuildError("this Python runs without a global lock, on which the compiled walk relies")
        if self.compiled is None and not self.why_not:
            self._build = self._build or Build()
            self.compiled = self._build.finish(wait=wait)

    def forget_build(self) -> None:
        """In a forked copy of this process: the compiler is the other's, and so is who held the lock."""
        self._build, self._lock = None, threading.Lock()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it there is no walk, and no step fetches one: to measure or test what Python does."""
        there = self.compiled, self.why_not
        self.compiled, self.why_not = None, "left out"
        try:
            yield
        finally:
            self.compiled, self.why_not = there

    def came(self) -> bool:
        """Whether the module is there, perhaps since a moment ago; begins nothing."""
        if self._build is not None:
            self.want()
        return self.compiled is not None


#: What all optimizers of this process use.
HOST_WALK = HostWalk()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=HOST_WALK.forget_build)


def increment_version(tensors: list[Tensor]) -> None:
    """Tell autograd that these were written to."""
    if HOST_WALK.compiled is None:
        torch.autograd.graph.increment_version(tensors)
    else:
        HOST_WALK.compiled.increment_version(tensors)
