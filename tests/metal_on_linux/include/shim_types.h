// Address spaces, scalar types, type traits, vectors, as_type, numeric_limits.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
#define constant __constant
#define kernel
#define METAL_FUNC inline __attribute__((__always_inline__))
#define __METAL_VERSION__ 310
#define __METAL__ 1
#define __METAL_MACOS__ 1
// Third argument of the __metal_* functions; MLX's bf16_math.h names them. Not interpreted here.
#define __METAL_FAST_MATH__ 0
#define __METAL_PRECISE_MATH__ 3
#define __METAL_MAYBE_FAST_MATH__ 3
// Identifiers that OpenCL reserves and Metal does not.
#define global _mol_global
#define local _mol_local
#define generic _mol_generic
#define pipe _mol_pipe

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef __bf16 bfloat;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX 65504.0h
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

// float -> bfloat, round to nearest even (not every libgcc has this helper).
extern "C" __attribute__((weak, visibility("hidden"))) bfloat __truncsfbf2(float x) {
  uint bits = __builtin_bit_cast(uint, x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  ushort top = nan ? (bits >> 16) | 64 : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return __builtin_bit_cast(bfloat, top);
}

namespace metal {
// ---- type traits
template <class T, T v> struct integral_constant {
  static constexpr constant T value = v;
  using value_type = T;
  constexpr operator T() const thread { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> constexpr constant bool is_same_v = __is_same(A, B);
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <bool b, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool b, class T = void> using enable_if_t = typename enable_if<b, T>::type;
template <bool b, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool b, class A, class B> using conditional_t = typename conditional<b, A, B>::type;

// _bare_t<T>: T without reference, address space and const/volatile.
template <class T> struct _no_cv { using type = T; };
template <class T> struct _no_cv<const T> { using type = T; };
template <class T> struct _no_cv<volatile T> { using type = T; };
template <class T> struct _no_cv<const volatile T> { using type = T; };
template <class T> struct _no_ref { using type = T; };
template <class T> struct _no_ref<thread T&> { using type = T; };
template <class T> struct _no_ref<device T&> { using type = T; };
template <class T> struct _no_ref<threadgroup T&> { using type = T; };
template <class T> struct _no_ref<constant T&> { using type = T; };
template <class T> struct _no_space { using type = T; };
template <class T> struct _no_space<thread T> { using type = T; };
template <class T> struct _no_space<device T> { using type = T; };
template <class T> struct _no_space<threadgroup T> { using type = T; };
template <class T> struct _no_space<constant T> { using type = T; };
template <class T> using remove_cv_t = typename _no_cv<T>::type;
template <class T> using remove_reference_t = typename _no_ref<T>::type;
template <class T>
using _bare_t = remove_cv_t<typename _no_space<remove_cv_t<remove_reference_t<T>>>::type>;

template <class T, class... U>
constexpr constant bool _one_of = (__is_same(_bare_t<T>, U) || ...);
template <class T> constexpr constant bool _is_int =
    _one_of<T, char, int8_t, uchar, short, ushort, int, uint, long, ulong>;
template <class T> constexpr constant bool is_integral_v = _is_int<T> || _one_of<T, bool>;
template <class T> constexpr constant bool is_floating_point_v = _one_of<T, half, float, bfloat>;
template <class T>
constexpr constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> constexpr constant bool is_unsigned_v =
    _one_of<T, bool, uchar, ushort, uint, ulong>;
template <class T> constexpr constant bool is_signed_v = is_arithmetic_v<T> && !is_unsigned_v<T>;
template <class A, class B> constexpr constant bool is_convertible_v = __is_convertible(A, B);

template <class T> struct make_unsigned { using type = T; };
template <> struct make_unsigned<char> { using type = uchar; };
template <> struct make_unsigned<int8_t> { using type = uchar; };
template <> struct make_unsigned<short> { using type = ushort; };
template <> struct make_unsigned<int> { using type = uint; };
template <> struct make_unsigned<long> { using type = ulong; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;

// ---- vectors
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct _vec_info {
  static constexpr constant bool is_vector = false;
  static constexpr constant int size = 1;
  using element = T;
};
template <class T, int N> struct _vec_info<T __attribute__((ext_vector_type(N)))> {
  static constexpr constant bool is_vector = true;
  static constexpr constant int size = N;
  using element = T;
};
template <class T> constexpr constant bool is_vector_v = _vec_info<_bare_t<T>>::is_vector;

// `float4(a, b, c, d)` and `vec<T, 4>(...)` are rewritten to _make_vec<T, 4>(...) by translate.py:
// OpenCL reads `(float4)(a, b)` with other rules.
template <class T, int N> struct _vec_builder {
  vec<T, N> v;
  int next;
  template <class U> METAL_FUNC void add(U x) thread {
    if constexpr (_vec_info<U>::is_vector) {
      for (int k = 0; k < _vec_info<U>::size; k++) v[next++] = static_cast<T>(x[k]);
    } else {
      v[next++] = static_cast<T>(x);
    }
  }
};
template <class T, int N, class... A> METAL_FUNC vec<T, N> _make_vec(A... a) {
  constexpr int total = (0 + ... + _vec_info<A>::size);
  if constexpr (sizeof...(A) == 0) {
    return (vec<T, N>)((T)0);
  } else if constexpr (sizeof...(A) == 1 && total == 1) {
    return (vec<T, N>)((T)((a), ...));  // one scalar fills every component
  } else {
    static_assert(total == N || (sizeof...(A) == 1 && total > N),
                  "vector constructor: wrong number of components");
    _vec_builder<T, N> builder;
    builder.next = 0;
    (builder.add(a), ...);
    return builder.v;
  }
}
template <class V, class... A> METAL_FUNC V _make(A... a) {  // V: a typedef of a vector, or not
  if constexpr (_vec_info<V>::is_vector)
    return _make_vec<typename _vec_info<V>::element, _vec_info<V>::size>(a...);
  else
    return V(a...);
}
}  // namespace metal

#define MOL_VECTOR_TYPES(T)            \
  typedef ::metal::vec<T, 2> T##2;     \
  typedef ::metal::vec<T, 3> T##3;     \
  typedef ::metal::vec<T, 4> T##4;     \
  namespace metal {                    \
  using ::T##2;                        \
  using ::T##3;                        \
  using ::T##4;                        \
  }
MOL_VECTOR_TYPES(float) MOL_VECTOR_TYPES(half) MOL_VECTOR_TYPES(bfloat)
MOL_VECTOR_TYPES(char) MOL_VECTOR_TYPES(uchar) MOL_VECTOR_TYPES(short) MOL_VECTOR_TYPES(ushort)
MOL_VECTOR_TYPES(int) MOL_VECTOR_TYPES(uint) MOL_VECTOR_TYPES(long) MOL_VECTOR_TYPES(ulong)

template <class T, class U> METAL_FUNC constexpr T as_type(U x) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, x);
}

namespace metal {
using ::as_type;
using ::int16_t; using ::int32_t; using ::int64_t; using ::int8_t; using ::size_t;
using ::uchar; using ::uint; using ::ulong; using ::ushort;
using ::uint16_t; using ::uint32_t; using ::uint64_t; using ::uint8_t;

template <class T> struct numeric_limits;
#define MOL_INT_LIMITS(T, LOW, HIGH)                  \
  template <> struct numeric_limits<T> {              \
    static constexpr T max() { return (T)(HIGH); }    \
    static constexpr T min() { return (T)(LOW); }     \
    static constexpr T lowest() { return (T)(LOW); }  \
    static constexpr T infinity() { return 0; }       \
  };
MOL_INT_LIMITS(bool, 0, 1)
MOL_INT_LIMITS(char, -128, 127)
MOL_INT_LIMITS(int8_t, -128, 127)
MOL_INT_LIMITS(uchar, 0, 255)
MOL_INT_LIMITS(short, -32768, 32767)
MOL_INT_LIMITS(ushort, 0, 65535)
MOL_INT_LIMITS(int, -2147483647 - 1, 2147483647)
MOL_INT_LIMITS(uint, 0, 4294967295u)
MOL_INT_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
MOL_INT_LIMITS(ulong, 0, 18446744073709551615ul)
#define MOL_FLOAT_LIMITS(T, MAX, MIN, EPSILON)                        \
  template <> struct numeric_limits<T> {                              \
    static constexpr T max() { return (T)MAX; }                       \
    static constexpr T min() { return (T)MIN; }                       \
    static constexpr T lowest() { return (T)-MAX; }                   \
    static constexpr T epsilon() { return (T)EPSILON; }               \
    static constexpr T infinity() { return (T)INFINITY; }             \
    static constexpr T quiet_NaN() { return (T)NAN; }                 \
  };
MOL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON)
MOL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f)
MOL_FLOAT_LIMITS(bfloat, 3.38953138925e+38f, FLT_MIN, 7.8125e-03f)
}  // namespace metal
