// The levels that codes stand for.
#pragma once
#include "layout.h"

// Length of the array of levels, and of its table in threadgroup memory, which is unused up to 4 bits.
template <int BITS>
METAL_FUNC constexpr int level_count() {
  return BITS <= 4 ? 8 : 1 << BITS;
}

// The level of a code. Up to 4 bits `levels` begins with the three coefficients of an odd polynomial, so
// that no divergent load is needed; the five numbers after them are for level_pair. From 5 bits on it is
// the table of all levels.
template <int BITS, typename Levels>
METAL_FUNC float level_of(Levels levels, uint code) {
  if constexpr (BITS <= 4) {
    // The code goes into the mantissa of 2^23, which is faster than a conversion.
    float x = as_type<float>(0x4B000001u | (code << 1)) - (8388608.0f + float(1 << BITS));
    float squared = x * x;
    return x * (levels[0] + squared * (levels[1] + squared * levels[2]));
  } else {
    return levels[code];
  }
}

// The four coefficients of level_pair, from the levels of level_of.
template <int BITS, typename Levels>
METAL_FUNC void load_coefficients(Levels levels, thread half2* coefficients) {
  if constexpr (BITS <= 4) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      coefficients[k] = half2(half(levels[3 + k]));
    }
  }
}

// Writes the table of level_pair with `count` threads.
template <int BITS, typename Levels>
METAL_FUNC void store_table(Levels levels, threadgroup half* table, int index, int count) {
  if constexpr (BITS > 4) {
    for (int i = index; i < 1 << BITS; i += count) {
      table[i] = half(levels[i]);
    }
  }
}

// The unit of the levels of level_pair.
template <int BITS, typename Levels>
METAL_FUNC float level_unit(Levels levels) {
  if constexpr (BITS <= 4) {
    return levels[7];
  } else {
    return 1.0f;
  }
}

// The levels of a pair of codes as halves. Up to 4 bits the codes go into the mantissas of two halves,
// 2^(7-BITS) * (1 + code / 64). This needs no conversion, and a subtraction gives x / 2^BITS. The power of
// two is loaded with the levels, because on NVIDIA a mask and an exponent that are both constant cost two
// instructions. For 3 and 4 bits x (a + b x^2 + c x^4) is computed as c x ((x^2 + q)^2 + p), one
// operation less, and in units of c. _half_coefficients in arguments.py computes q and p.
template <int BITS>
METAL_FUNC half2 level_pair(
    const thread half2* coefficients, const threadgroup half* table, uint codes) {
  if constexpr (BITS <= 4) {
    const half2 x = as_type<half2>((codes << 4) | as_type<uint>(coefficients[3])) + coefficients[2];
    if constexpr (BITS == 1) {
      return x * coefficients[0];
    } else if constexpr (BITS == 2) {
      return x * fma(x * x, coefficients[1], coefficients[0]);
    } else {
      const half2 sum = fma(x, x, coefficients[0]);
      return x * fma(sum, sum, coefficients[1]);
    }
  } else {
    return half2(table[codes & 0xFFFFu], table[codes >> 16]);
  }
}
