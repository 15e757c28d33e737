// Barriers and SIMD-group functions. A lane hands its value to the executor, which wakes all 32
// lanes when everyone has arrived; each lane then reads what it needs from the shared slots.
#pragma once

// Mirrored by runtime/executor.h.
struct __attribute__((aligned(16))) _simd_slots {
  char data[32 * 16];    // one value of up to 16 bytes per lane
  char result[32 * 16];  // a reduction, computed by the first lane that asks
  uint mask;             // lanes that took part
  uint have_result;
};
extern "C" {
__private _simd_slots* mol_simd_exchange(__private const void* value, uint size);
void mol_barrier(uint memory_flags, uint is_simdgroup);
uint mol_lane();
void mol_report_bad_lane(uint lane);
__local void* mol_threadgroup_alloc(uint id, uint size, uint align);
}

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
METAL_FUNC void threadgroup_barrier(mem_flags flags) { mol_barrier((uint)flags, 0); }
METAL_FUNC void simdgroup_barrier(mem_flags flags) { mol_barrier((uint)flags, 1); }

template <class T> constexpr constant bool _simd_type =
    _one_of<T, half, float, char, int8_t, uchar, short, ushort, int, uint> ||
    (is_vector_v<T> && _one_of<typename _vec_info<_bare_t<T>>::element, half, float, char, uchar,
                               short, ushort, int, uint>);
#define MOL_SIMD_FUNC template <class T> METAL_FUNC enable_if_t<_simd_type<T>, T>

template <class T> METAL_FUNC __private _simd_slots* _exchange(T x) {
  static_assert(sizeof(T) <= 16, "simd functions: values of up to 16 bytes");
  return mol_simd_exchange((__private const void*)&x, sizeof(T));
}
template <class T> METAL_FUNC T _slot(__private _simd_slots* slots, uint lane) {
  return ((__private T*)slots->data)[lane];
}
template <class T> METAL_FUNC T _poison() {  // NaN or -1: the value is undefined in Metal
  T r;
  __builtin_memset((void*)&r, 0xff, sizeof(T));
  return r;
}
// ---- shuffles
template <class T> METAL_FUNC T _read_lane(T x, uint lane) {
  __private _simd_slots* slots = _exchange(x);
  if (lane < 32 && ((slots->mask >> lane) & 1)) return _slot<T>(slots, lane);
  mol_report_bad_lane(lane);
  return _poison<T>();
}
// Past the edge the value is undefined in Metal, and often unused: no report.
template <class T> METAL_FUNC T _read_shifted(T x, int lane) {
  __private _simd_slots* slots = _exchange(x);
  if (lane >= 0 && lane < 32 && ((slots->mask >> lane) & 1)) return _slot<T>(slots, (uint)lane);
  return _poison<T>();
}
template <class T> METAL_FUNC T _read_filled(T x, T fill, int lane, int fill_lane) {
  bool inside = lane >= 0 && lane < 32;
  __private _simd_slots* slots = _exchange(x);
  T own = inside ? _slot<T>(slots, (uint)lane) : x;
  slots = _exchange(fill);
  return inside ? own : _slot<T>(slots, (uint)(fill_lane & 31));
}
MOL_SIMD_FUNC simd_shuffle(T x, ushort lane) { return _read_lane(x, lane); }
MOL_SIMD_FUNC simd_broadcast(T x, ushort lane) { return _read_lane(x, lane); }
MOL_SIMD_FUNC simd_shuffle_xor(T x, ushort m) { return _read_lane(x, mol_lane() ^ m); }
MOL_SIMD_FUNC simd_shuffle_rotate_down(T x, ushort d) {
  return _read_lane(x, (mol_lane() + d) & 31);
}
MOL_SIMD_FUNC simd_shuffle_rotate_up(T x, ushort d) {
  return _read_lane(x, (mol_lane() - d) & 31);
}
MOL_SIMD_FUNC simd_shuffle_down(T x, ushort d) { return _read_shifted(x, (int)mol_lane() + d); }
MOL_SIMD_FUNC simd_shuffle_up(T x, ushort d) { return _read_shifted(x, (int)mol_lane() - d); }
MOL_SIMD_FUNC simd_shuffle_and_fill_up(T x, T fill, ushort d) {
  int lane = (int)mol_lane() - d;
  return _read_filled(x, fill, lane, lane + 32);
}
MOL_SIMD_FUNC simd_shuffle_and_fill_down(T x, T fill, ushort d) {
  int lane = (int)mol_lane() + d;
  return _read_filled(x, fill, lane, lane - 32);
}
MOL_SIMD_FUNC simd_broadcast_first(T x) {
  __private _simd_slots* slots = _exchange(x);
  return _slot<T>(slots, (uint)__builtin_ctz(slots->mask));
}

// ---- reductions, in butterfly order (the order of Apple's hardware is not documented)
#define MOL_OPERATION(name, value)                                   \
  struct name {                                                      \
    template <class T> METAL_FUNC static T apply(T a, T b) { return (T)(value); } \
  };
MOL_OPERATION(_sum, a + b) MOL_OPERATION(_product, a * b)
MOL_OPERATION(_maximum, max(a, b)) MOL_OPERATION(_minimum, min(a, b))
MOL_OPERATION(_and, a & b) MOL_OPERATION(_or, a | b) MOL_OPERATION(_xor, a ^ b)
template <class Op, class T> METAL_FUNC T _reduce(T x) {
  __private _simd_slots* slots = _exchange(x);
  if (!slots->have_result) {
    __private T* v = (__private T*)slots->data;
    T total = x;
    if (slots->mask == 0xffffffffu) {
      T t[32];
#pragma unroll
      for (int i = 0; i < 16; i++) t[i] = Op::apply(v[i], v[i + 16]);
#pragma unroll
      for (int step = 8; step > 0; step >>= 1)
#pragma unroll
        for (int i = 0; i < step; i++) t[i] = Op::apply(t[i], t[i + step]);
      total = t[0];
    } else {  // a partial SIMD group: in lane order
      bool first = true;
      for (int i = 0; i < 32; i++) {
        if (!((slots->mask >> i) & 1)) continue;
        total = first ? v[i] : Op::apply(total, v[i]);
        first = false;
      }
    }
    *(__private T*)slots->result = total;
    slots->have_result = 1;
  }
  return *(__private T*)slots->result;
}
MOL_SIMD_FUNC simd_sum(T x) { return _reduce<_sum>(x); }
MOL_SIMD_FUNC simd_product(T x) { return _reduce<_product>(x); }
MOL_SIMD_FUNC simd_max(T x) { return _reduce<_maximum>(x); }
MOL_SIMD_FUNC simd_min(T x) { return _reduce<_minimum>(x); }
MOL_SIMD_FUNC simd_and(T x) { return _reduce<_and>(x); }
MOL_SIMD_FUNC simd_or(T x) { return _reduce<_or>(x); }
MOL_SIMD_FUNC simd_xor(T x) { return _reduce<_xor>(x); }
template <class Op, class T> METAL_FUNC T _scan(T x, T start, uint lanes) {
  __private _simd_slots* slots = _exchange(x);
  T total = start;
  for (uint i = 0; i < lanes; i++)
    if ((slots->mask >> i) & 1) total = Op::apply(total, _slot<T>(slots, i));
  return total;
}
MOL_SIMD_FUNC simd_prefix_inclusive_sum(T x) { return _scan<_sum>(x, (T)0, mol_lane() + 1); }
MOL_SIMD_FUNC simd_prefix_exclusive_sum(T x) { return _scan<_sum>(x, (T)0, mol_lane()); }
MOL_SIMD_FUNC simd_prefix_inclusive_product(T x) {
  return _scan<_product>(x, (T)1, mol_lane() + 1);
}
MOL_SIMD_FUNC simd_prefix_exclusive_product(T x) { return _scan<_product>(x, (T)1, mol_lane()); }

// ---- votes
METAL_FUNC uint _ballot(bool p) {
  __private _simd_slots* slots = _exchange((uint)p);
  uint r = 0;
  for (uint i = 0; i < 32; i++)
    if (((slots->mask >> i) & 1) && _slot<uint>(slots, i)) r |= 1u << i;
  return r;
}
struct simd_vote {  // no `thread` on its methods: clang's temporaries are generic
  using vote_t = ulong;
  ulong bits;
  explicit constexpr simd_vote(ulong x = 0) : bits(x) {}
  constexpr explicit operator ulong() const { return bits; }
  bool all() const { return (uint)bits == 0xffffffffu; }
  bool any() const { return bits != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool p) { return simd_vote(_ballot(p)); }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(_ballot(true)); }
METAL_FUNC bool simd_any(bool p) { return _ballot(p) != 0; }
METAL_FUNC bool simd_all(bool p) { return _ballot(!p) == 0; }
METAL_FUNC bool simd_is_first() { return mol_lane() == (uint)__builtin_ctz(_ballot(true)); }
}  // namespace metal

// ---- the __metal_* names that MLX's bf16_math.h calls to add the bfloat overloads
#define MOL_DEFINE(name)                                                 \
  template <class T, class... A> METAL_FUNC auto __metal_##name(T x, A... a) { \
    return ::metal::name(x, a...);                                       \
  }
MOL_DEFINE(simd_broadcast) MOL_DEFINE(simd_shuffle) MOL_DEFINE(simd_shuffle_xor)
MOL_DEFINE(simd_shuffle_down) MOL_DEFINE(simd_shuffle_up)
MOL_DEFINE(simd_shuffle_rotate_down) MOL_DEFINE(simd_shuffle_rotate_up)
MOL_DEFINE(simd_sum) MOL_DEFINE(simd_product) MOL_DEFINE(simd_max) MOL_DEFINE(simd_min)
MOL_DEFINE(simd_prefix_inclusive_sum) MOL_DEFINE(simd_prefix_exclusive_sum)
MOL_DEFINE(simd_prefix_inclusive_product) MOL_DEFINE(simd_prefix_exclusive_product)
#undef MOL_DEFINE
template <class T>
METAL_FUNC T __metal_simd_shuffle_and_fill_down(T x, T fill, ushort d, ushort) {
  return ::metal::simd_shuffle_and_fill_down(x, fill, d);
}
template <class T>
METAL_FUNC T __metal_simd_shuffle_and_fill_up(T x, T fill, ushort d, ushort) {
  return ::metal::simd_shuffle_and_fill_up(x, fill, d);
}
METAL_FUNC float __metal_simd_xor(float x) { return x; }  // MLX declares it, nothing calls it
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }
