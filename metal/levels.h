// The levels that codes stand for.
#pragma once
#include "layout.h"

// The most bits with which levels follow a polynomial.
constant constexpr int LEVEL_BITS = 6;
// Bits of the windows of a trellis code, and its levels.
constant constexpr int WINDOW = 8;
constant constexpr int WINDOWS = 1 << WINDOW;

// Length of the array of levels. Here and below `bits` may be the digit of a trellis code, see layout.h, whose codes
// are its windows.
METAL_FUNC constexpr int level_count(int bits) {
  return bits == 0 ? 0 : (bits <= LEVEL_BITS ? 8 : (bits <= 8 ? 1 << bits : WINDOWS));
}

// The first eight of a run that has the bits of this one, and so shares its levels. It is an index of arrays in
// registers, so it has no loop: a compiler might see its value too late.
METAL_FUNC constexpr int first_alike(int pattern, int eight) {
  const int bits = bits_of(pattern, eight);
  return bits == bits_of(pattern, 0) ? 0 : (bits == bits_of(pattern, 1) ? 1 : (bits == bits_of(pattern, 2) ? 2 : 3));
}

// Where the levels of an eight begin in an array that has those of all bits of a pattern once, in the order of
// the eights. Its length is that of eight 4.
METAL_FUNC constexpr int level_place(int pattern, int eight) {
  int place = 0;
#pragma unroll
  for (int other = 0; other < 4; other++) {
    const bool is_before = eight == 4 || other < first_alike(pattern, eight);
    place += is_before && first_alike(pattern, other) == other ? level_count(digit_of(pattern, other)) : 0;
  }
  return place;
}

// The level of a code. Up to LEVEL_BITS `levels` begins with the three coefficients of an odd polynomial, so
// that no divergent load is needed; the five numbers after them are for level_pair. With more bits it is
// the table of all levels.
template <typename Levels>
METAL_FUNC float level_of(int bits, Levels levels, uint code) {
  if (bits <= LEVEL_BITS) {
    // The code goes into the mantissa of 2^23, which is faster than a conversion.
    float x = as_type<float>(0x4B000001u | (code << 1)) - (8388608.0f + float(1 << bits));
    float squared = x * x;
    return x * (levels[0] + squared * (levels[1] + squared * levels[2]));
  } else {
    return levels[code];
  }
}

// The four coefficients of level_pair, from the levels of level_of.
template <typename Levels>
METAL_FUNC void load_coefficients(int bits, Levels levels, thread half2* coefficients) {
  if (bits > 0 && bits <= LEVEL_BITS) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      coefficients[k] = half2(half(levels[3 + k]));
    }
  }
}

// The unit of the levels of level_pair.
template <typename Levels>
METAL_FUNC float level_unit(int bits, Levels levels) {
  return bits > 0 && bits <= LEVEL_BITS ? levels[7] : 1.0f;
}

// Where level_pair finds a code in each half of a word. With floats, codes of 4 bits may lie at 0 too, where a
// polynomial needs an offset of more bits than a half has: so one shift is enough for the eight codes of a word.
METAL_FUNC constexpr int code_place(int bits, int pair, bool floats) {
  return bits > LEVEL_BITS || (floats && bits == 4 && pair % 2 == 0) ? 0 : 4;
}

// The levels of a pair of codes at `place` as halves. Up to LEVEL_BITS the codes go into the mantissas of two halves,
// 2^(7-bits) * (1 + code / 64). This needs no conversion, and a subtraction gives x / 2^bits. The power of
// two is loaded with the levels, because on NVIDIA a mask and an exponent that are both constant cost two
// instructions. From 3 bits on x (a + b x^2 + c x^4) is computed as c x ((x^2 + q)^2 + p), one
// operation less, and in units of c. _half_coefficients in arguments.py computes q and p.
METAL_FUNC half2 level_pair(
    int bits, const thread half2* coefficients, const threadgroup half* table, uint codes, int place) {
  if (bits <= LEVEL_BITS) {
    half2 x;
    if (place == 0) {
      const half2 sum = as_type<half2>(codes | 0x58005800u);  // 128 + code / 8
      x = half2(half(float(sum.x) - 128.9375f), half(float(sum.y) - 128.9375f));
    } else {
      x = as_type<half2>(codes | as_type<uint>(coefficients[3])) + coefficients[2];
    }
    if (bits == 1) {
      return x * coefficients[0];
    } else if (bits == 2) {
      return x * fma(x * x, coefficients[1], coefficients[0]);
    } else {
      const half2 sum = fma(x, x, coefficients[0]);
      return x * fma(sum, sum, coefficients[1]);
    }
  } else {
    return half2(table[codes & 0xFFFFu], table[codes >> 16]);
  }
}
