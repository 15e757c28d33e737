// The Metal standard library, as far as KV-cache kernels need it, on top of clang's
// "C++ for OpenCL" mode (clang >= 19, -x clcpp -cl-std=clc++2021). That mode has Metal's four
// address spaces under other names, so it rejects most of what Metal's own compiler rejects.
// The same headers serve the type checker and the CPU executor.
//
// Names that start with an underscore or with `mol_` are internal.
#pragma once
#include "shim_types.h"
#include "shim_math.h"
#include "shim_simd.h"
