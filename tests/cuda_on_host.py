"""CUDA kernels on the host: the C++ source of a kernel, compiled by g++ and run one block after another.

Blocks run from the last to the first, the threads of every other block backward: a result that depends on an order shows.
Where a kernel waits for the other threads of its block, every thread is a fiber with a stack of its own, switched at each
``__syncthreads()`` (by ``_setjmp``, which costs about 20 ns); else the threads are a loop. What a kernel may use is what
`_HEADER` defines, and less than g++ knows: no standard library, since NVRTC has none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_HEADER = """
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>
#include <type_traits>

#undef INFINITY
#undef NAN
#undef M_PI

#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() cuda_on_host::barrier(__LINE__)

struct Index { unsigned int x; };
Index blockIdx, threadIdx, blockDim, gridDim;

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

namespace cuda_on_host {

struct Fiber { ucontext_t context; jmp_buf at; bool started, done; int line; };
Fiber fibers[1024];
jmp_buf scheduler;
void** passed;

// Back to `resume`, until it comes here again.
void leave() {
    if (!_setjmp(fibers[threadIdx.x].at)) _longjmp(scheduler, 1);
}
void wait_at(int line) {
    fibers[threadIdx.x].line = line;
    leave();
}
// Through a pointer that may change: the compiler must expect all memory to be another afterwards.
void (*volatile barrier)(int) = wait_at;

void resume(unsigned int thread) {
    Fiber& fiber = fibers[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

struct Parameter { int pointer, size, kind; };
template <typename V> constexpr int kind() {
    return std::is_integral<V>::value ? 0 : std::is_floating_point<V>::value ? 1 : 2;
}
template <typename V> constexpr Parameter describe() {
    using Value = typename std::remove_pointer<V>::type;
    return {std::is_pointer<V>::value, (int)sizeof(Value), kind<Value>()};
}

}
"""

_DRIVER = """
namespace cuda_on_host {

extern "C" const Parameter parameters[] = {PARAMETERS};

void call() { NAME(ARGUMENTS); }

void live() {
    for (;;) {
        call();
        fibers[threadIdx.x].done = true;
        leave();
    }
}

// A block of fibers, from barrier to barrier. Returns whether all of its threads came to each of them.
bool run_block(bool backward) {
    unsigned int count = blockDim.x, done = 0;
    for (unsigned int t = 0; t < count; t++) fibers[t].done = false;
    while (done == 0) {
        for (unsigned int t = 0; t < count; t++) resume(backward ? count - 1 - t : t);
        for (unsigned int t = 0; t < count; t++) {
            done += fibers[t].done;
            if (!fibers[t].done && fibers[t].line != fibers[0].line) return false;
        }
        backward = !backward;
    }
    return done == count;
}

extern "C" int run(unsigned int grid, unsigned int block, void** arguments, char* stacks, long long stack) {
    gridDim.x = grid; blockDim.x = block; passed = arguments;
    for (unsigned int t = 0; t < block && WAITS; t++) {
        fibers[t].started = false;
        getcontext(&fibers[t].context);
        fibers[t].context.uc_stack.ss_sp = stacks + t * stack;
        fibers[t].context.uc_stack.ss_size = stack;
        makecontext(&fibers[t].context, live, 0);
    }
    for (unsigned int b = grid; b-- > 0;) {
        blockIdx.x = b;
        if (WAITS) {
            if (!run_block(b % 2)) return 1;
        } else {
            for (unsigned int t = 0; t < block; t++) {
                threadIdx.x = b % 2 ? block - 1 - t : t;
                call();
            }
        }
    }
    return 0;
}

}
"""

#: -ffp-contract=off: each operation is rounded, as NumPy does it.
_COMMAND = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-x", "c++", "-"]
_THREADS, _STACK = 1024, 1 << 16
_KINDS = {0: "iub", 1: "f"}


class Parameter(NamedTuple):
    """What a kernel declares: a pointer or a number, its bytes and its kind (0: integer, 1: floating point, 2: a struct)."""

    pointer: bool
    size: int
    kind: int


class Compiled:
    """A kernel that can be called as CuPy's are, on NumPy's arrays and scalars."""

    def __init__(self, library: Path, name: str, count: int) -> None:
        # PyDLL keeps the interpreter's lock: shared memory is static, so that no two threads may run a kernel at once.
        loaded = ctypes.PyDLL(str(library))
        facts = (ctypes.c_int * (3 * count)).in_dll(loaded, "parameters")
        self.parameters = [Parameter(bool(facts[i]), facts[i + 1], facts[i + 2]) for i in range(0, 3 * count, 3)]
        self.name, self._run = name, loaded.run

    def __call__(self, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """Run ``grid`` blocks of ``block`` threads. TypeError where an argument does not fit what the kernel declares."""
        if not 1 <= block <= _THREADS or not 1 <= grid < 1 << 31:
            raise RuntimeError(f"{self.name}: CUDA has no grid of {grid} blocks of {block} threads (invalid configuration)")
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(arguments)}")
        for number, (argument, parameter) in enumerate(zip(arguments, self.parameters, strict=True)):
            _check(f"{self.name}, argument {number}", argument, parameter)
        values = [np.uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
        cells = [np.array([value]) for value in values]  # as cuLaunchKernel takes them: the address of each value
        addresses = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        stacks = ctypes.addressof(ctypes.c_char.from_buffer(_stacks()))
        if self._run(
            ctypes.c_uint(grid), ctypes.c_uint(block), addresses, ctypes.c_void_p(stacks), ctypes.c_longlong(_STACK)
        ):
            raise RuntimeError(f"{self.name}: not all threads of a block came to the same __syncthreads()")


def available() -> bool:
    """Whether kernels can run here."""
    return sys.platform == "linux" and shutil.which("g++") is not None


@functools.cache
def compile(code: str, name: str) -> Compiled:
    """The kernel ``name`` of a source with one ``extern "C" __global__ void name(...)``; compiled once a machine."""
    if not available():
        raise RuntimeError(f"{name}: kernels run on the host through g++, and there is none")
    foreign = re.search(r"\bstd::|#\s*include|\bu?int\d+_t\b", code)
    if foreign:
        raise RuntimeError(f"{name}: {foreign[0]} is not known to NVRTC")
    source, count = _source(code, name)
    folder = Path(tempfile.gettempdir()) / f"cuda-on-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{hashlib.sha256(' '.join([*_COMMAND, source]).encode()).hexdigest()}.so"
    if not library.exists():
        # Renamed when complete: several processes may want the same kernel at once.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "kernel.so"
            ran = subprocess.run([*_COMMAND, "-o", str(made)], input=source, capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"{name} does not compile:\n{ran.stderr}")
            made.replace(library)
    return Compiled(library, name, count)


def _source(code: str, name: str) -> tuple[str, int]:
    """All that g++ is given, and the number of the kernel's parameters."""
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", " ", code, flags=re.DOTALL)
    found = re.findall(rf'extern "C"\s+__global__\s+void\s+{name}\s*\(([^)]*)\)', plain)
    if len(found) != 1:
        raise RuntimeError(f'there is no extern "C" __global__ void {name}(...)')
    types = [re.sub(r"\w+$", "", parameter.strip()).strip() for parameter in found[0].split(",")]
    # block_sum and block_max are always defined: what counts is whether anything outside of them calls them.
    used = re.sub(r"inline V block_(sum|max)\(V v\) \{.*?\n\}", "", plain, flags=re.DOTALL)
    waits = re.search(r"\bblock_(sum|max)\s*\(|__syncthreads", used) is not None
    parts = {
        "PARAMETERS": ", ".join(f"describe<{type_}>()" for type_ in types),
        "ARGUMENTS": ", ".join(f"*({type_}*)passed[{i}]" for i, type_ in enumerate(types)),
        "NAME": f"::{name}",
        "WAITS": "true" if waits else "false",
    }
    driver = re.sub("|".join(parts), lambda match: parts[match[0]], _DRIVER)
    return f'{_HEADER}\n#line 1 "{name}"\n{code}\n#line 1 "driver"\n{driver}', len(types)


def _check(what: str, argument: Any, parameter: Parameter) -> None:
    if not isinstance(argument, np.ndarray if parameter.pointer else np.generic):
        raise TypeError(f"{what}: {type(argument).__name__} for a {'pointer' if parameter.pointer else 'number'}")
    dtype = argument.dtype
    fits = dtype.itemsize == parameter.size and (parameter.kind == 2 or dtype.kind in _KINDS[parameter.kind])
    sixteen_bits = parameter.pointer and dtype.itemsize == parameter.size == 2  # float16 and bfloat16 as unsigned short
    parts = parameter.pointer and dtype.kind == "c" and parameter.kind == 1 and dtype.itemsize == 2 * parameter.size
    if not (fits or sixteen_bits or parts):
        raise TypeError(f"{what}: {dtype} for {'a pointer to ' * parameter.pointer}{parameter.size} bytes of another kind")


@functools.cache
def _stacks() -> mmap.mmap:
    return mmap.mmap(-1, _THREADS * _STACK)
