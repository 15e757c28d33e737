// How decode_attention.metal reads the words of packed tokens, block after block.
#pragma once
#include "attention_memory.h"

// Words from one packed value to the next.
constant constexpr int TOKEN_STRIDE = VALUE_STRIDE == 1 ? VALUE_WORDS : 1;

// Pointers to the words of this lane in a block, and the words that were loaded last. The loads of a run have
// constant offsets from one pointer: on Apple's GPUs an address of its own costs three more instructions.
struct Keys {
  const device uint* block;
  const device uint* planes[KEY_PLANES];
  uint words[TOKENS][KEY_BITS];
};

struct Values {
  const device uint* planes[PIECES][PLANES];
  uint words[BATCH][PIECES][PLANES];
};

// Points to the block of keys that begins at vector `first` of the buffer.
template <int BITS>
METAL_FUNC void begin_planes(thread Keys& keys, const device uint* words) {
  constexpr int plane = KEY_PLANES - plane_count<BITS>();
  constexpr int width = first_plane<BITS>();
  keys.planes[plane] = words;
  if constexpr (BITS > width) {
    begin_planes<BITS - width>(keys, words + plane_words<DIM, width>() * LANES);
  }
}

METAL_FUNC void begin(thread Keys& keys, const device uint* codes, uint first, uint lane) {
  keys.block = codes + (long(first) * KEY_WORDS + lane);
  begin_planes<KEY_BITS>(keys, keys.block);
}

// Moves to the beginning of the block that is `blocks` further.
METAL_FUNC void turn(thread Keys& keys, uint blocks) {
  keys.block += blocks * (TOKENS * KEY_WORDS * LANES);
  begin_planes<KEY_BITS>(keys, keys.block);
}

// Loads run `run` of TOKENS keys, plane after plane. The last run may be longer than the rest of a
// vector: missing words are zeros, and their levels do not count because the queries are zero there.
template <int BITS>
METAL_FUNC void load_planes(thread Keys& keys, int run) {
  constexpr int plane = KEY_PLANES - plane_count<BITS>();
  constexpr int width = first_plane<BITS>();
  constexpr int count = plane_words<DIM, width>();
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
#pragma unroll
    for (int j = 0; j < width; j++) {
      const bool exists = DIM % (RUNS * RUN) == 0 || run * width + j < count;
      keys.words[t][KEY_BITS - BITS + j] = exists ? keys.planes[plane][(t * KEY_WORDS + j) * LANES] : 0u;
    }
  }
  keys.planes[plane] += width * LANES;
  if constexpr (BITS > width) {
    load_planes<BITS - width>(keys, run);
  }
}

METAL_FUNC void load(thread Keys& keys, int run) {
  load_planes<KEY_BITS>(keys, run);
}

// Points to the values from vector `first` of the buffer on, of which this lane takes coordinates from i on.
template <int BITS>
METAL_FUNC void begin_planes(thread Values& values, const device uint* words, uint i, int piece) {
  constexpr int plane = PLANES - plane_count<BITS>();
  constexpr int width = first_plane<BITS>();
  values.planes[piece][plane] = words + i * width / 32 * VALUE_STRIDE;
  if constexpr (BITS > width) {
    begin_planes<BITS - width>(values, words + plane_words<VALUE_DIM, width>() * VALUE_STRIDE, i, piece);
  }
}

METAL_FUNC uint value_coordinate(uint lane, int piece) {
  const uint i = coordinate_of(lane, piece * COORDINATES / 2);
  return VALUE_DIM % (VALUE_LANES * COORDINATES) == 0 || i < VALUE_DIM ? i : 0u;
}

METAL_FUNC void begin(thread Values& values, const device uint* codes, uint first, uint lane) {
  const long start = VALUE_STRIDE == 1 ? long(first) * VALUE_WORDS
                                       : long(first / LANES) * (VALUE_WORDS * LANES) + first % LANES;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    begin_planes<VALUE_BITS>(values, codes + start + lane / VALUE_LANES * TOKEN_STRIDE,
        value_coordinate(lane, piece), piece);
  }
}

// Moves from the end of a block to the beginning of the block that is `blocks` further.
METAL_FUNC void turn(thread Values& values, uint blocks) {
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      values.planes[piece][plane] += blocks * (BLOCK_TOKENS * VALUE_WORDS);
      values.planes[piece][plane] -= BLOCK_TOKENS * VALUE_WORDS;
    }
  }
}

// Loads the words of BATCH steps from step `step` of the block on, where `values` points.
template <int BITS>
METAL_FUNC void load_planes(thread Values& values, int step, uint lane, int piece) {
  constexpr int plane = PLANES - plane_count<BITS>();
  constexpr int width = first_plane<BITS>();
  const uint shift = COORDINATES * width < 32 ? field_shift<width>(value_coordinate(lane, piece)) : 0u;
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    values.words[b][piece][plane] = values.planes[piece][plane][b * AT_ONCE * TOKEN_STRIDE] >> shift;
  }
  values.planes[piece][plane] += token_start<VALUE_WORDS, VALUE_STRIDE>((step + BATCH) * AT_ONCE) -
      token_start<VALUE_WORDS, VALUE_STRIDE>(step * AT_ONCE);
  if constexpr (BITS > width) {
    load_planes<BITS - width>(values, step, lane, piece);
  }
}

METAL_FUNC void load(thread Values& values, int step, uint lane) {
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    load_planes<VALUE_BITS>(values, step, lane, piece);
  }
}
