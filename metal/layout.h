// Where codes lie in the packed words of a vector, and where the words of a token lie in a buffer. README.md
// in this folder describes the layout.
#pragma once

// uint32 words of a plane of WIDTH bits for DIM coordinates.
template <int DIM, int WIDTH>
METAL_FUNC constexpr int plane_words() {
  return (DIM * WIDTH + 31) / 32;
}

// Width of the first plane of a code of BITS bits: 4, 2 or 1.
template <int BITS>
METAL_FUNC constexpr int first_plane() {
  return BITS >= 4 ? 4 : (BITS >= 2 ? 2 : 1);
}

// uint32 words of DIM codes of BITS bits.
template <int DIM, int BITS>
METAL_FUNC constexpr int vector_words() {
  constexpr int width = first_plane<BITS>();
  if constexpr (BITS > width) {
    return plane_words<DIM, width>() + vector_words<DIM, BITS - width>();
  } else {
    return plane_words<DIM, width>();
  }
}

// Where coordinate i of a plane of WIDTH bits lies: the shift of its field in word i * WIDTH / 32.
template <int WIDTH>
METAL_FUNC constexpr uint field_shift(uint i) {
  return (i % (32 / WIDTH)) / 2 * WIDTH + i % 2 * 16;
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

// The code of coordinate i. Words of one vector are `stride` apart: 32 where tokens are interleaved.
template <int DIM, int BITS, typename Words>
METAL_FUNC uint code_at(Words words, int stride, int i) {
  constexpr int width = first_plane<BITS>();
  uint field = (words[i * width / 32 * stride] >> field_shift<width>(i)) & ((1u << width) - 1u);
  if constexpr (BITS > width) {
    uint rest = code_at<DIM, BITS - width>(words + plane_words<DIM, width>() * stride, stride, i);
    return (field << (BITS - width)) | rest;
  } else {
    return field;
  }
}

// Loads the codes of the coordinates i to i + 7, a word of each plane; i is a multiple of eight.
template <int DIM, int BITS, int STRIDE>
METAL_FUNC void load_eight(thread uint* out, const device uint* words, int i) {
  constexpr int width = first_plane<BITS>();
  out[0] = words[i * width / 32 * STRIDE] >> field_shift<width>(i);
  if constexpr (BITS > width) {
    load_eight<DIM, BITS - width, STRIDE>(out + 1, words + plane_words<DIM, width>() * STRIDE, i);
  }
}

// The codes of coordinates 2 * pair and 2 * pair + 1, in the low and the high half of a word, from
// the loaded words of COUNT coordinates.
template <int COUNT, int BITS>
METAL_FUNC uint code_pair(const thread uint* words, int pair) {
  constexpr int width = first_plane<BITS>();
  constexpr uint mask = ((1u << width) - 1u) * 0x00010001u;
  const uint field = (words[pair * 2 * width / 32] >> field_shift<width>(pair * 2)) & mask;
  if constexpr (BITS > width) {
    constexpr int count = plane_words<COUNT, width>();
    return (field << (BITS - width)) | code_pair<COUNT, BITS - width>(words + count, pair);
  } else {
    return field;
  }
}
