// Defines the part of Metal that the kernels use for CUDA. With this in front, mx.fast.cuda_kernel compiles
// their text unchanged. TURBOQUANT_FUNCTIONS is the header of a kernel's functions; TURBOQUANT_CONSTANTS
// defines the constants that these use. A SIMD group is a warp, a threadgroup is a block. All 32 lanes must
// take part in the simd functions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define device
#define constant
#define thread
#define threadgroup
#define METAL_FUNC inline __device__ __attribute__((always_inline))
// Bounds the registers of a thread: more warps on a multiprocessor cover the latency of loads. kernels/runtime.py
// defines how many threadgroups of 256 threads must fit.
#undef __global__
#define __global__ \
  __attribute__((global)) __attribute__((launch_bounds(256, TURBOQUANT_BLOCKS)))
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

namespace turboquant {
template <class T> __device__ inline T simd_sum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}
template <class T> __device__ inline T simd_max(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    T other = __shfl_xor_sync(~0u, x, mask);
    x = x > other ? x : other;
  }
  return x;
}
template <class T> __device__ inline T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
template <class T> __device__ inline T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(~0u, x, lane);
}
__device__ inline bool simd_any(bool x) { return __any_sync(~0u, x); }

enum class mem_flags { mem_none, mem_threadgroup };
__device__ inline void simdgroup_barrier(mem_flags) { __syncwarp(); }
__device__ inline void threadgroup_barrier(mem_flags) { __syncthreads(); }

// Exact overloads: a call with mixed types is ambiguous, as in Metal.
__device__ inline float max(float a, float b) { return ::fmaxf(a, b); }
__device__ inline float min(float a, float b) { return ::fminf(a, b); }
__device__ inline int min(int a, int b) { return a < b ? a : b; }
__device__ inline uint min(uint a, uint b) { return a < b ? a : b; }
// Two instructions, as short as Metal's. The error of one per million is far below the codec's.
__device__ inline float exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
}
__device__ inline float log(float x) { return ::__logf(x); }
__device__ inline float abs(float x) { return ::fabsf(x); }
__device__ inline float sqrt(float x) { return ::sqrtf(x); }
__device__ inline float rsqrt(float x) { return ::rsqrtf(x); }
__device__ inline bool isfinite(float x) { return ::fabsf(x) < INFINITY; }

struct half2 : __half2 {
  __device__ half2() {}
  __device__ half2(__half2 pair) : __half2(pair) {}
  __device__ explicit half2(half both) : __half2(both, both) {}
  __device__ half2(half low, half high) : __half2(low, high) {}
};
__device__ inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ inline half2 fma(half2 a, half2 b, half2 c) { return ::__hfma2(a, b, c); }
template <class To, class From> __device__ inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return reinterpret_cast<To&>(x);
}

TURBOQUANT_CONSTANTS
#include TURBOQUANT_FUNCTIONS
}  // namespace turboquant

// CUDA has global functions of some of these names; declarations in the kernel's own scope hide them.
#define TURBOQUANT_USING_DECLARATIONS                                        \
  using ::turboquant::max; using ::turboquant::min; using ::turboquant::abs; \
  using ::turboquant::exp; using ::turboquant::log; using ::turboquant::fma; \
  using ::turboquant::sqrt; using ::turboquant::rsqrt;                       \
  using ::turboquant::isfinite; using ::turboquant::half2;                   \
  using namespace ::turboquant;

// In a kernel's body this word declares shared memory; in functions, above, it qualifies pointers.
#undef threadgroup
#define threadgroup __shared__
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
