// With PAIR_TABLE the levels of two codes are looked up together, in a table in threadgroup memory, up to 4 bits. Two
// neighbours in the stream of a trellis code have the entry of their bits and of those before.
//
// The table has what level_pair computes, so outputs are the same bit for bit.
//
// Entry i has the levels of the coordinates j and j + 2 of an eight, whose codes are neighbours in one half of a word.
// The bits of i are their bits in the first plane, then those in the second one: i is what a plane holds, moved by one
// shift. At 3 bits i is aabbcd: the codes are bbd and aac.
#pragma once
#include "trellis.h"

constant constexpr int PAIRED_BITS = 4;

METAL_FUNC constexpr bool is_paired(int bits) {
  return PAIR_TABLE && bits > 0 && (bits > 8 ? bits - 8 : bits) <= PAIRED_BITS;
}

// Words of the table of an eight: pairs, or two levels of one code in a word.
METAL_FUNC constexpr int table_words(int bits) {
  if (is_paired(bits)) {
    return bits > 8 ? WINDOWS << (bits - 8) : 1 << (2 * bits);
  }
  return bits > LEVEL_BITS ? level_count(bits) / 2 : 0;
}

// Where the table of an eight begins in one array, which has those of all bits of a pattern once. Its length is that of
// eight 4.
METAL_FUNC constexpr int table_place(int pattern, int eight) {
  int place = 0;
#pragma unroll
  for (int other = 0; other < 4; other++) {
    const bool is_before = eight == 4 || other < first_alike(pattern, eight);
    place += is_before && first_alike(pattern, other) == other ? table_words(digit_of(pattern, other)) : 0;
  }
  return place;
}

// Where the table of a digit begins, or that array ends if no eight has it.
METAL_FUNC constexpr int place_of_digit(int pattern, int digit) {
  for (int eight = 0; eight < 4; eight++) {
    if (digit_of(pattern, eight) == digit) {
      return table_place(pattern, eight);
    }
  }
  return table_place(pattern, 4);
}

// The codes of an entry, at bit 4 of both halves of a word.
METAL_FUNC uint codes_of_entry(int bits, uint i) {
  const uint first = bits == 3 ? (i >> 1 & 6u) | (i & 1u) : i & ((1u << bits) - 1u);
  const uint second = bits == 3 ? (i >> 3 & 6u) | (i >> 1 & 1u) : i >> bits;
  return (first | second << 16) << 4;
}

// Writes the table of an eight with `count` threads.
template <typename Levels>
METAL_FUNC void store_table(int bits, Levels levels, threadgroup uint* table, int index, int count) {
  if (table_words(bits) == 0) {
    return;
  }
  half2 coefficients[4];
  load_coefficients(bits, levels, coefficients);
#pragma unroll 1
  for (int i = index; i < table_words(bits); i += count) {
    half2 pair;
    if (!is_paired(bits)) {
      pair = half2(half(levels[2 * i]), half(levels[2 * i + 1]));
    } else if (bits > 8) {
      pair = half2(half(levels[i >> (bits - 8) & (WINDOWS - 1)]), half(levels[i & (WINDOWS - 1)]));
    } else {
      pair = level_pair(bits, coefficients, (const threadgroup half*)table, codes_of_entry(bits, uint(i)), 4);
    }
    table[i] = as_type<uint>(pair);
  }
}

// The entry of the coordinates j and j + 2 from the loaded words of eight coordinates, or of the first four. From the
// words of a run it is two_codes_of_run. Here j is 0, 1, 4 or 5.
template <int BITS>
METAL_FUNC uint entry_of(const thread uint* words, int j) {
  constexpr int width = first_plane<BITS>();
  const int from = j % 2 * 16 + j / 2 * width;
  const uint entry = moved(words[0], from, 2 * (BITS - width), (1u << 2 * width) - 1u);
  if constexpr (BITS > width) {
    return entry | entry_of<BITS - width>(words + 1, j);
  } else {
    return entry;
  }
}

// The levels of two neighbouring pairs of coordinates, from the entry of the even ones and that of the odd ones.
METAL_FUNC void two_pairs(const threadgroup uint* table, uint even, uint odd, thread half2* levels) {
  const half2 evens = as_type<half2>(table[even]);
  const half2 odds = as_type<half2>(table[odd]);
  levels[0] = half2(evens.x, odds.x);
  levels[1] = half2(evens.y, odds.y);
}

// The levels of two neighbouring coordinates of a trellis code, the second of which ends at `end` in the words of a run.
template <int DIGIT>
METAL_FUNC half2 pair_of_run(const threadgroup uint* table, const thread uint* words, uint before, int end) {
  constexpr int bits = DIGIT - 8;
  if constexpr (is_paired(DIGIT)) {
    return as_type<half2>(table[window_of_run(words, before, end, WINDOW + bits)]);
  } else {
    const threadgroup half* levels = (const threadgroup half*)table;
    return half2(levels[window_of_run(words, before, end - bits)], levels[window_of_run(words, before, end)]);
  }
}
