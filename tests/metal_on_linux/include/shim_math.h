// Math, integer and geometric functions. All float work goes to the C library in float precision;
// fast:: and precise:: give the same results here (on a GPU they differ in the last bits).
#pragma once

// One entry per function: name, and its value for a float x.
#define MOL_UNARY_FUNCTIONS(F)                                                     \
  F(fabs, __builtin_fabsf(x))                                                      \
  F(acos, __builtin_acosf(x)) F(acosh, __builtin_acoshf(x))                        \
  F(asin, __builtin_asinf(x)) F(asinh, __builtin_asinhf(x))                        \
  F(atan, __builtin_atanf(x)) F(atanh, __builtin_atanhf(x))                        \
  F(cos, __builtin_cosf(x)) F(cosh, __builtin_coshf(x))                            \
  F(sin, __builtin_sinf(x)) F(sinh, __builtin_sinhf(x))                            \
  F(tan, __builtin_tanf(x)) F(tanh, __builtin_tanhf(x))                            \
  F(cospi, __builtin_cosf(x * M_PI_F)) F(sinpi, __builtin_sinf(x * M_PI_F))        \
  F(tanpi, __builtin_tanf(x * M_PI_F))                                             \
  F(exp, __builtin_expf(x)) F(exp2, __builtin_exp2f(x))                            \
  F(exp10, __builtin_powf(10.0f, x))                                               \
  F(log, __builtin_logf(x)) F(log2, __builtin_log2f(x)) F(log10, __builtin_log10f(x)) \
  F(sqrt, __builtin_sqrtf(x)) F(rsqrt, 1.0f / __builtin_sqrtf(x))                  \
  F(ceil, __builtin_ceilf(x)) F(floor, __builtin_floorf(x))                        \
  F(rint, __builtin_rintf(x)) F(round, __builtin_roundf(x))                        \
  F(trunc, __builtin_truncf(x)) F(fract, x - __builtin_floorf(x))                  \
  F(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))                     \
  F(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f)
#define MOL_BINARY_FUNCTIONS(F)                                                    \
  F(atan2, __builtin_atan2f(x, y)) F(divide, x / y) F(fmod, __builtin_fmodf(x, y)) \
  F(fdim, __builtin_fdimf(x, y)) F(copysign, __builtin_copysignf(x, y))            \
  F(fmax, __builtin_fmaxf(x, y)) F(fmin, __builtin_fminf(x, y))                    \
  F(pow, __builtin_powf(x, y)) F(powr, __builtin_powf(x, y))                       \
  F(nextafter, __builtin_nextafterf(x, y)) F(step, y < x ? 0.0f : 1.0f)

// ---- the __metal_* names that MLX's bf16_math.h calls (`mode`: fast or precise)
#define MOL_MODE int mode = 0
#define MOL_DEFINE(name, value) METAL_FUNC float __metal_##name(float x, MOL_MODE) { return value; }
MOL_UNARY_FUNCTIONS(MOL_DEFINE)
#undef MOL_DEFINE
#define MOL_DEFINE(name, value) \
  METAL_FUNC float __metal_##name(float x, float y, MOL_MODE) { return value; }
MOL_BINARY_FUNCTIONS(MOL_DEFINE)
#undef MOL_DEFINE
METAL_FUNC float __metal_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC float __metal_fmax3(float x, float y, float z, MOL_MODE) {
  return __builtin_fmaxf(__builtin_fmaxf(x, y), z);
}
METAL_FUNC float __metal_fmin3(float x, float y, float z, MOL_MODE) {
  return __builtin_fminf(__builtin_fminf(x, y), z);
}
METAL_FUNC float __metal_fmedian3(float x, float y, float z, MOL_MODE) {
  float low = __builtin_fminf(x, y), high = __builtin_fmaxf(x, y);
  return __builtin_fmaxf(low, __builtin_fminf(high, z));
}
METAL_FUNC float __metal_ldexp(float x, int k, MOL_MODE) { return __builtin_ldexpf(x, k); }
METAL_FUNC float __metal_frexp(float x, thread int* e, MOL_MODE) {
  return __builtin_frexpf(x, (int*)e);
}

namespace metal {
// ---- float, half and vector overloads, in metal::, metal::precise:: and metal::fast::
// There are none for bfloat: MLX's bf16_math.h adds those itself.
#define MOL_EACH(N, result, value)        \
  {                                       \
    result r;                             \
    for (int i = 0; i < N; i++) r[i] = value; \
    return r;                             \
  }
#define MOL_FLOAT_VEC enable_if_t<_one_of<T, float, half>, vec<T, N>>
#define MOL_DEFINE_UNARY(name, value)                                        \
  METAL_FUNC float name(float x) { return value; }                           \
  METAL_FUNC half name(half h) { float x = h; return (half)(value); }        \
  template <class T, int N> METAL_FUNC MOL_FLOAT_VEC name(vec<T, N> a)       \
      MOL_EACH(N, MOL_FLOAT_VEC, name((T)a[i]))
#define MOL_DEFINE_BINARY(name, value)                                       \
  METAL_FUNC float name(float x, float y) { return value; }                  \
  METAL_FUNC half name(half h, half k) { float x = h, y = k; return (half)(value); } \
  template <class T, int N> METAL_FUNC MOL_FLOAT_VEC name(vec<T, N> a, vec<T, N> b) \
      MOL_EACH(N, MOL_FLOAT_VEC, name((T)a[i], (T)b[i]))
#define MOL_DEFINE_FLOAT_FUNCTIONS                                           \
  MOL_UNARY_FUNCTIONS(MOL_DEFINE_UNARY)                                      \
  MOL_BINARY_FUNCTIONS(MOL_DEFINE_BINARY)                                    \
  METAL_FUNC float abs(float x) { return fabs(x); }                          \
  METAL_FUNC half abs(half x) { return fabs(x); }                            \
  METAL_FUNC float max(float x, float y) { return fmax(x, y); }              \
  METAL_FUNC half max(half x, half y) { return fmax(x, y); }                 \
  METAL_FUNC float min(float x, float y) { return fmin(x, y); }              \
  METAL_FUNC half min(half x, half y) { return fmin(x, y); }                 \
  METAL_FUNC float clamp(float x, float low, float high) { return min(max(x, low), high); } \
  METAL_FUNC half clamp(half x, half low, half high) { return min(max(x, low), high); }     \
  METAL_FUNC float mix(float x, float y, float a) { return x + (y - x) * a; }               \
  METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }       \
  METAL_FUNC half fma(half a, half b, half c) { return (half)__builtin_fmaf(a, b, c); }     \
  template <class T, int N> METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) \
      MOL_EACH(N, MOL_FLOAT_VEC, fma((T)a[i], (T)b[i], (T)c[i]))
MOL_DEFINE_FLOAT_FUNCTIONS
namespace precise { MOL_DEFINE_FLOAT_FUNCTIONS }
namespace fast { MOL_DEFINE_FLOAT_FUNCTIONS }

#define MOL_DEFINE_PREDICATE(name)                                     \
  METAL_FUNC bool name(float x) { return __builtin_##name(x); }        \
  METAL_FUNC bool name(half x) { return __builtin_##name((float)x); }  \
  METAL_FUNC bool name(bfloat x) { return __builtin_##name((float)x); }
MOL_DEFINE_PREDICATE(isfinite) MOL_DEFINE_PREDICATE(isinf) MOL_DEFINE_PREDICATE(isnan)
MOL_DEFINE_PREDICATE(isnormal) MOL_DEFINE_PREDICATE(signbit)

// ---- integers: exact overloads, so that max(int, uint) is ambiguous, as it is in Metal
#define MOL_DEFINE_INT(T)                                                   \
  METAL_FUNC T max(T a, T b) { return a > b ? a : b; }                      \
  METAL_FUNC T min(T a, T b) { return a < b ? a : b; }                      \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  METAL_FUNC T abs(T x) { return x < (T)0 ? (T)-x : x; }
MOL_DEFINE_INT(char) MOL_DEFINE_INT(int8_t) MOL_DEFINE_INT(uchar) MOL_DEFINE_INT(short)
MOL_DEFINE_INT(ushort) MOL_DEFINE_INT(int) MOL_DEFINE_INT(uint) MOL_DEFINE_INT(long)
MOL_DEFINE_INT(ulong)

#define MOL_INT_FUNC template <class T> METAL_FUNC enable_if_t<_is_int<T>, T>
template <class T> constexpr constant uint _bits = sizeof(T) * 8;
MOL_INT_FUNC popcount(T x) { return (T)__builtin_popcountl((ulong)(make_unsigned_t<T>)x); }
MOL_INT_FUNC clz(T x) {
  if (x == 0) return (T)_bits<T>;
  return (T)(__builtin_clzl((ulong)(make_unsigned_t<T>)x) - (64 - (int)_bits<T>));
}
MOL_INT_FUNC ctz(T x) { return x == 0 ? (T)_bits<T> : (T)__builtin_ctzl((ulong)x); }
extern "C" void mol_report_bad_bits(uint offset, uint bits);
MOL_INT_FUNC extract_bits(T x, uint offset, uint bits) {
  if (offset + bits > _bits<T>) mol_report_bad_bits(offset, bits);
  if (bits == 0) return 0;
  using U = make_unsigned_t<T>;
  U top = (U)((U)((U)x >> offset) << (_bits<T> - bits));  // field at the top, then shift down
  return is_signed_v<T> ? (T)((T)top >> (_bits<T> - bits)) : (T)(top >> (_bits<T> - bits));
}

// ---- vectors of any element type
#define MOL_VEC_FUNC template <class T, int N> METAL_FUNC
#define MOL_VEC vec<T, N>
MOL_VEC_FUNC MOL_VEC max(MOL_VEC a, MOL_VEC b) MOL_EACH(N, MOL_VEC, max((T)a[i], (T)b[i]))
MOL_VEC_FUNC MOL_VEC min(MOL_VEC a, MOL_VEC b) MOL_EACH(N, MOL_VEC, min((T)a[i], (T)b[i]))
MOL_VEC_FUNC MOL_VEC abs(MOL_VEC a) MOL_EACH(N, MOL_VEC, abs((T)a[i]))
MOL_VEC_FUNC MOL_VEC popcount(MOL_VEC a) MOL_EACH(N, MOL_VEC, popcount((T)a[i]))
MOL_VEC_FUNC MOL_VEC clamp(MOL_VEC x, MOL_VEC low, MOL_VEC high) { return min(max(x, low), high); }
MOL_VEC_FUNC MOL_VEC clamp(MOL_VEC x, T low, T high) {
  return min(max(x, (MOL_VEC)low), (MOL_VEC)high);
}
MOL_VEC_FUNC T dot(MOL_VEC a, MOL_VEC b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}

template <class T> METAL_FUNC enable_if_t<is_arithmetic_v<T>, T> select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N, class M>  // vector comparisons give integer masks here, bool in Metal
METAL_FUNC enable_if_t<is_vector_v<M>, vec<T, N>> select(vec<T, N> a, vec<T, N> b, M c)
    MOL_EACH(N, MOL_VEC, c[i] ? b[i] : a[i])
METAL_FUNC bool any(bool c) { return c; }
METAL_FUNC bool all(bool c) { return c; }
template <class M> METAL_FUNC enable_if_t<is_vector_v<M>, bool> any(M c) {
  bool r = false;
  for (int i = 0; i < _vec_info<M>::size; i++) r = r || c[i];
  return r;
}
template <class M> METAL_FUNC enable_if_t<is_vector_v<M>, bool> all(M c) {
  bool r = true;
  for (int i = 0; i < _vec_info<M>::size; i++) r = r && c[i];
  return r;
}
}  // namespace metal
