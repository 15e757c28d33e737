// Where codes lie in the packed words of a vector, and where the words of a token lie in a buffer. README.md
// in this folder describes the layout.
#pragma once

// uint32 words of a plane of WIDTH bits for COUNT coordinates of a run.
template <int COUNT, int WIDTH>
METAL_FUNC constexpr int plane_words() {
  return (COUNT * WIDTH + 31) / 32;
}

// Width of the first plane of a code of BITS bits: 4, 2 or 1.
template <int BITS>
METAL_FUNC constexpr int first_plane() {
  return BITS >= 4 ? 4 : (BITS >= 2 ? 2 : 1);
}

// uint32 words of a run of COUNT codes of BITS bits.
template <int COUNT, int BITS>
METAL_FUNC constexpr int run_words() {
  constexpr int width = first_plane<BITS>();
  if constexpr (BITS > width) {
    return plane_words<COUNT, width>() + run_words<COUNT, BITS - width>();
  } else {
    return plane_words<COUNT, width>();
  }
}

// Where coordinate i of a plane of WIDTH bits lies: the shift of its field in word i * WIDTH / 32 of its run.
template <int WIDTH>
METAL_FUNC constexpr uint field_shift(uint i) {
  return (i % (32 / WIDTH)) / 2 * WIDTH + i % 2 * 16;
}

// Where word j of a run of 32 codes lies in a run of COUNT; -1 if that has no such word.
template <int COUNT, int BITS>
METAL_FUNC constexpr int word_in_run(int j) {
  constexpr int width = first_plane<BITS>();
  constexpr int words = plane_words<COUNT, width>();
  if (j < width) {
    return j < words ? j : -1;
  }
  if constexpr (BITS > width) {
    const int rest = word_in_run<COUNT, BITS - width>(j - width);
    return rest < 0 ? rest : words + rest;
  } else {
    return -1;
  }
}

// Planes of a code of BITS bits.
template <int BITS>
METAL_FUNC constexpr int plane_count() {
  constexpr int width = first_plane<BITS>();
  if constexpr (BITS > width) {
    return 1 + plane_count<BITS - width>();
  } else {
    return 1;
  }
}

// Where the words of a token begin. They are STRIDE apart: 1, or 32 where tokens are interleaved.
template <int WORDS, int STRIDE>
METAL_FUNC int token_start(int token) {
  return STRIDE == 1 ? token * WORDS : token / 32 * (WORDS * 32) + token % 32;
}

// The code of coordinate i of a run. Words of one vector are `stride` apart: 32 where tokens are interleaved.
template <int COUNT, int BITS, typename Words>
METAL_FUNC uint code_in_run(Words words, int stride, int i) {
  constexpr int width = first_plane<BITS>();
  uint field = (words[i * width / 32 * stride] >> field_shift<width>(i)) & ((1u << width) - 1u);
  if constexpr (BITS > width) {
    uint rest = code_in_run<COUNT, BITS - width>(words + plane_words<COUNT, width>() * stride, stride, i);
    return (field << (BITS - width)) | rest;
  } else {
    return field;
  }
}

// The code of coordinate i of a vector.
template <int DIM, int BITS, typename Words>
METAL_FUNC uint code_at(Words words, int stride, int i) {
  words += i / 32 * BITS * stride;
  if (DIM % 32 > 0 && i >= DIM / 32 * 32) {
    return code_in_run<DIM % 32, BITS>(words, stride, i % 32);
  }
  return code_in_run<32, BITS>(words, stride, i % 32);
}

// Loads the codes of the coordinates i to i + 7 of a run, a word of each plane; i is a multiple of eight.
template <int COUNT, int BITS, int STRIDE>
METAL_FUNC void load_eight(thread uint* out, const device uint* words, int i) {
  constexpr int width = first_plane<BITS>();
  out[0] = words[i * width / 32 * STRIDE] >> field_shift<width>(i);
  if constexpr (BITS > width) {
    load_eight<COUNT, BITS - width, STRIDE>(out + 1, words + plane_words<COUNT, width>() * STRIDE, i);
  }
}

// Bits of the four eights of a run, as the digits of a pattern: those of the first eight are the last digit.
// 0x3333 is 3 bits everywhere. From 9 on a digit is 8 more than the bits of a trellis code, see trellis.h.
METAL_FUNC constexpr int digit_of(int pattern, int eight) {
  return pattern >> (4 * eight) & 15;
}

METAL_FUNC constexpr int bits_of(int pattern, int eight) {
  const int digit = digit_of(pattern, eight);
  return digit > 8 ? digit - 8 : digit;
}

// A pattern with codes of a trellis has no others.
METAL_FUNC constexpr bool is_trellis(int pattern) {
  return digit_of(pattern, 0) > 8 || digit_of(pattern, 1) > 8 || digit_of(pattern, 2) > 8 || digit_of(pattern, 3) > 8;
}

METAL_FUNC constexpr bool is_uniform(int pattern) {
  return pattern == (pattern & 15) * 0x1111;
}

// uint32 words of a run of 32 codes.
METAL_FUNC constexpr int pattern_words(int pattern) {
  return (bits_of(pattern, 0) + bits_of(pattern, 1) + bits_of(pattern, 2) + bits_of(pattern, 3)) / 4;
}

// uint32 words of DIM codes. The last run may be shorter if all its codes have the same bits.
template <int DIM, int PATTERN>
METAL_FUNC constexpr int vector_words() {
  if constexpr (DIM % 32 > 0) {
    return DIM / 32 * bits_of(PATTERN, 0) + run_words<DIM % 32, bits_of(PATTERN, 0)>();
  } else {
    return DIM / 32 * pattern_words(PATTERN);
  }
}

// A code has some of four planes, of these widths.
METAL_FUNC constexpr int plane_width(int plane) {
  return plane < 2 ? 4 : (plane == 2 ? 2 : 1);
}

METAL_FUNC constexpr bool has_plane(int bits, int plane) {
  return plane == 0 ? bits >= 4 : (plane == 1 ? bits == 8 : bits < 8 && (bits & plane_width(plane)) != 0);
}

// How many of the first `count` eights have a plane.
METAL_FUNC constexpr int eights_with(int pattern, int plane, int count) {
  return int(count > 0 && has_plane(bits_of(pattern, 0), plane)) +
      int(count > 1 && has_plane(bits_of(pattern, 1), plane)) +
      int(count > 2 && has_plane(bits_of(pattern, 2), plane)) +
      int(count > 3 && has_plane(bits_of(pattern, 3), plane));
}

// The bits that the fields before this one take in a plane.
METAL_FUNC constexpr int bits_before(int pattern, int eight, int plane, int other) {
  return 4 * plane_width(other) * eights_with(pattern, other, other < plane ? 4 : (other == plane ? eight : 0));
}

// Where a plane of an eight begins in its run, in bits of the halves of words: a half has four of its codes.
// There is no loop, as words are in registers: a compiler might see the index of a word too late.
METAL_FUNC constexpr int field_start(int pattern, int eight, int plane) {
  return bits_before(pattern, eight, plane, 0) + bits_before(pattern, eight, plane, 1) +
      bits_before(pattern, eight, plane, 2) + bits_before(pattern, eight, plane, 3);
}

// The field of `mask` from bit `from` of a word on, moved to bit `to` on by one shift.
METAL_FUNC uint moved(uint word, int from, int to, uint mask) {
  return (from >= to ? word >> (from - to) : word << (to - from)) & (mask << to);
}

// The same for the fields of `width` bits in both halves of a word.
METAL_FUNC uint moved_field(uint word, int from, int width, int to) {
  return moved(word, from, to, ((1u << width) - 1u) * 0x00010001u);
}

// The codes of coordinates i and i + 1 of an eight, from bit `at` on of the low and the high half of a word, from the
// words of a run; i is even. With IN_HALF those of i and i + 2, whose fields in a plane are neighbours and stay so:
// both in the first plane, then both in the second one.
template <int PATTERN, bool IN_HALF>
METAL_FUNC uint two_codes_of_run(const thread uint* words, int eight, int i, int at) {
  uint codes = 0u;
  int rest = bits_of(PATTERN, eight);
#pragma unroll
  for (int plane = 0; plane < 4; plane++) {
    if (has_plane(bits_of(PATTERN, eight), plane)) {
      const int width = plane_width(plane);
      const int start = field_start(PATTERN, eight, plane);
      rest -= width;
      const uint word = words[start / 16];
      const int from = start % 16 + i % 2 * 16 + i / 2 * width;
      codes |= IN_HALF ? moved(word, from, at + 2 * rest, (1u << 2 * width) - 1u)
                       : moved_field(word, from, width, at + rest);
    }
  }
  return codes;
}

// The codes of coordinates 2 * pair and 2 * pair + 1, from bit `at` on of the low and the high half of a word,
// from the loaded words of COUNT coordinates.
template <int COUNT, int BITS>
METAL_FUNC uint code_pair(const thread uint* words, int pair, int at) {
  constexpr int width = first_plane<BITS>();
  const uint field =
      moved_field(words[pair * 2 * width / 32], int(field_shift<width>(pair * 2)), width, at + BITS - width);
  if constexpr (BITS > width) {
    return field | code_pair<COUNT, BITS - width>(words + plane_words<COUNT, width>(), pair, at);
  } else {
    return field;
  }
}
