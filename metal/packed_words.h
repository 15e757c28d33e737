// How decode_attention.metal reads the words of packed tokens, block after block.
#pragma once
#include "attention_memory.h"

// Words from one packed value to the next.
constant constexpr int TOKEN_STRIDE = VALUE_STRIDE == 1 ? VALUE_WORDS : 1;

// Pointers to the words of this lane in a block, and the words that were loaded last. The loads of a run have
// constant offsets from one pointer: on Apple's GPUs an address of its own costs three more instructions.
struct Keys {
  const device uint* block;
  const device uint* run;
  uint words[TOKENS][KEY_BITS];
  uint before[TOKENS];  // the word before those, for a trellis code
};

struct Values {
  const device uint* planes[PIECES][PLANES];
  uint words[BATCH][PIECES][PLANES];
};

// Points to the block of keys that begins at vector `first` of the buffer.
METAL_FUNC void begin(thread Keys& keys, const device uint* codes, uint first, uint lane) {
  keys.block = codes + (long(first) * KEY_WORDS + lane);
  keys.run = keys.block;
}

// Moves to the beginning of the block that is `blocks` further.
METAL_FUNC void turn(thread Keys& keys, uint blocks) {
  keys.block += blocks * (TOKENS * KEY_WORDS * LANES);
  keys.run = keys.block;
}

// Where word j of a run of keys lies in the last run, if that is shorter; -1 if there is no such word.
METAL_FUNC constexpr int word_of_last_run(int j) {
  if constexpr (is_trellis(KEY_PATTERN)) {
    return j < KEY_WORDS - DIM / RUN * KEY_BITS ? j : -1;
  } else {
    return word_in_run<DIM % RUN, KEY_BITS>(j);
  }
}

// Loads run `run` of TOKENS keys. The last run may be longer than the rest of a vector: missing words are zeros,
// and their levels do not count because the queries are zero there.
METAL_FUNC void load(thread Keys& keys, int run) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    if constexpr (is_trellis(KEY_PATTERN)) {
      keys.before[t] = run == 0 ? 0u : keys.words[t][KEY_BITS - 1];
    }
#pragma unroll
    for (int j = 0; j < KEY_BITS; j++) {
      const int rest = word_of_last_run(j);
      const bool is_whole = DIM % (RUNS * RUN) == 0 || run < DIM / RUN;
      const bool exists = is_whole || (run == DIM / RUN && rest >= 0);
      keys.words[t][j] = exists ? keys.run[(t * KEY_WORDS + (is_whole ? j : rest)) * LANES] : 0u;
    }
  }
  keys.run += KEY_BITS * LANES;
}

// Points to the words of coordinates from i on of a run of COUNT.
template <int COUNT, int BITS>
METAL_FUNC void begin_planes(thread Values& values, const device uint* run, uint i, int piece) {
  constexpr int plane = PLANES - plane_count<BITS>();
  constexpr int width = first_plane<BITS>();
  values.planes[piece][plane] = run + i * width / 32 * VALUE_STRIDE;
  if constexpr (BITS > width) {
    begin_planes<COUNT, BITS - width>(values, run + plane_words<COUNT, width>() * VALUE_STRIDE, i, piece);
  }
}

METAL_FUNC uint value_coordinate(uint lane, int piece) {
  const uint i = coordinate_of(lane, piece * COORDINATES / 2);
  return VALUE_DIM % (VALUE_LANES * COORDINATES) == 0 || i < VALUE_DIM ? i : 0u;
}

// Points to the values from vector `first` of the buffer on.
METAL_FUNC void begin(thread Values& values, const device uint* codes, uint first, uint lane) {
  const long start = VALUE_STRIDE == 1 ? long(first) * VALUE_WORDS
                                       : long(first / LANES) * (VALUE_WORDS * LANES) + first % LANES;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    const uint i = value_coordinate(lane, piece);
    const device uint* token = codes + (start + lane / VALUE_LANES * TOKEN_STRIDE);
    const device uint* run = token + i / 32 * (VALUE_BITS * VALUE_STRIDE);
    if constexpr (is_trellis(VALUE_PATTERN)) {
      const int word = last_word<VALUE_BITS, COORDINATES>(int(i));
      values.planes[piece][0] = token + (word > 0 ? word - 1 : 0) * VALUE_STRIDE;
      // The last coordinates of a piece may not exist.
      values.planes[piece][1] = token + (word < VALUE_WORDS ? word : VALUE_WORDS - 1) * VALUE_STRIDE;
    } else if (VALUE_DIM % 32 > 0 && i >= VALUE_DIM / 32 * 32) {
      begin_planes<VALUE_DIM % 32, VALUE_BITS>(values, run, i % 32, piece);
    } else {
      begin_planes<32, VALUE_BITS>(values, run, i % 32, piece);
    }
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

// The same for a trellis code.
METAL_FUNC void load_streams(thread Values& values, int step, uint lane, int piece) {
  const int i = int(value_coordinate(lane, piece));
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const uint before = values.planes[piece][0][b * AT_ONCE * TOKEN_STRIDE];
    const uint last = values.planes[piece][1][b * AT_ONCE * TOKEN_STRIDE];
    align_codes<VALUE_BITS, COORDINATES>(
        last_word<VALUE_BITS, COORDINATES>(i) > 0 ? before : 0u, last, i, values.words[b][piece]);
  }
  const int further = token_start<VALUE_WORDS, VALUE_STRIDE>((step + BATCH) * AT_ONCE) -
      token_start<VALUE_WORDS, VALUE_STRIDE>(step * AT_ONCE);
  values.planes[piece][0] += further;
  values.planes[piece][1] += further;
}

METAL_FUNC void load(thread Values& values, int step, uint lane) {
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    if constexpr (is_trellis(VALUE_PATTERN)) {
      load_streams(values, step, lane, piece);
    } else {
      load_planes<VALUE_BITS>(values, step, lane, piece);
    }
  }
}
