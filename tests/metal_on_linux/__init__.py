"""Check and run Metal kernels for ``mx.fast.metal_kernel`` on Linux, without a GPU.

    from metal_on_linux import check, metal_kernel

    kernel = metal_kernel(
        name="twice", input_names=["a"], output_names=["out"],
        source="uint i = thread_position_in_grid.x; out[i] = T(float(a[i]) * 2.0f);",
    )
    call = dict(
        inputs=[a], template=[("T", a.dtype)], grid=(a.size, 1, 1), threadgroup=(256, 1, 1),
        output_shapes=[a.shape], output_dtypes=[a.dtype],
    )
    assert check(kernel, **call) == []  # what Metal's compiler would refuse
    kernel.memory_check = True          # races, bounds, uninitialised memory: KernelReport
    kernel.order = "random"             # of the threads; or "forward", "reverse"
    (out,) = kernel(**call)             # real results, computed on the CPU

``signature`` writes the text that MLX would generate, ``translate`` rewrites the few tokens where
Metal and clang's C++-for-OpenCL mode differ, ``include/`` is a Metal standard library for that
mode, ``checker`` asks clang and adds rules of its own, ``kernel`` and ``executor`` build and
launch, and ``runtime/`` runs every Metal thread as a fiber and watches its memory accesses.

It needs x86-64 Linux with AVX2 (``IS_SUPPORTED``) and a clang from 19 to 22 or the package
``ziglang``. ``METAL_ON_LINUX_CLANG`` names another compiler, ``METAL_ON_LINUX_CACHE`` another place
for built kernels. README.md says what the checks see and what they cannot.
"""

from .checker import check
from .executor import KernelReport
from .kernel import Kernel, metal_kernel
from .toolchain import IS_SUPPORTED, ToolchainError

__all__ = [
    "IS_SUPPORTED",
    "Kernel",
    "KernelReport",
    "ToolchainError",
    "check",
    "metal_kernel",
]
