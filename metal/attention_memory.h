// What the phases of decode_attention.metal share: sizes, threadgroup memory, a thread's place, small loads.
#pragma once
#include "pair_table.h"
#include "rotation.h"
#include "trellis.h"

// Packed and exact tokens in a step of a SIMD group. A lane scores TOKENS packed tokens.
constant constexpr int BLOCK_TOKENS = LANES * TOKENS;
constant constexpr int EXACT_TOKENS = 8;
// Keys are read in runs of 32 coordinates: whole words of every plane. A sum of halves extends over a chunk
// of two runs at most.
constant constexpr int RUN = 32;
constant constexpr int RUNS = HALF_SUMS ? 2 : 1;
constant constexpr int CHUNKS = (DIM + RUNS * RUN - 1) / (RUNS * RUN);
constant constexpr int PADDED = CHUNKS * RUNS * RUN;
constant constexpr int KEY_WORDS = vector_words<DIM, KEY_PATTERN>();
// A lane takes PIECES runs of COORDINATES coordinates of a value. VALUE_LANES lanes share a token, and a
// step takes AT_ONCE tokens.
constant constexpr int VALUE_LANES =
    VALUE_DIM <= 8 * COORDINATES ? 8 : (VALUE_DIM <= 16 * COORDINATES ? 16 : 32);
constant constexpr int PIECES = (VALUE_DIM + LANES * COORDINATES - 1) / (LANES * COORDINATES);
constant constexpr int PAIRS = PIECES * COORDINATES / 2;
constant constexpr int AT_ONCE = LANES / VALUE_LANES;
constant constexpr int STEPS = BLOCK_TOKENS / AT_ONCE;
constant constexpr int VALUE_BITS = bits_of(VALUE_PATTERN, 0);
constant constexpr int VALUE_DIGIT = digit_of(VALUE_PATTERN, 0);
constant constexpr int VALUE_WORDS = vector_words<VALUE_DIM, VALUE_PATTERN>();
// Words that a lane loads of a piece: one of each plane, or the last two that have its codes of a trellis.
constant constexpr int PLANES = is_trellis(VALUE_PATTERN) ? 2 : plane_count<VALUE_BITS>();
// How often loops are unrolled: twice with AHEAD, so that words loaded ahead stay in their registers.
constant constexpr int UNROLLED = AHEAD ? 2 : 1;
constant constexpr int EXACT_UNROLLED = AHEAD ? DIM / 8 : 4;
// Where the parts of `constants` begin.
constant constexpr int KEY_LEVELS = 8;
constant constexpr int VALUE_LEVELS = KEY_LEVELS + level_place(KEY_PATTERN, 4);
constant constexpr int SIGNS = VALUE_LEVELS + level_count(VALUE_DIGIT);
constant constexpr int MATRIX = SIGNS + DIM;
// Words of the tables of levels of keys, and where that of the values begins. Tables of trellis codes are the same for
// keys and values.
constant constexpr int KEY_TABLE = table_place(KEY_PATTERN, 4);
constant constexpr int VALUE_PLACE =
    is_trellis(VALUE_PATTERN) ? place_of_digit(KEY_PATTERN, VALUE_DIGIT) : KEY_TABLE;
constant constexpr int TABLES = KEY_TABLE + (VALUE_PLACE < KEY_TABLE ? 0 : table_words(VALUE_DIGIT));
// Words with the weights of a token, two rows in each.
constant constexpr int ROW_WORDS = (ROWS + 1) / 2;
// Rows that are joined at once.
constant constexpr int JOINED = ROWS < 2 ? ROWS : 2;

// Queries for packed tokens: rotated halves, eight coordinates in a uint4. The weights reuse the memory in
// which rows were rotated. With a BASIS that first has the originals, floats in the order (DIM, ROWS).
struct PackedMemory {
  uint4 queries[PADDED / 8][ROWS];
  union {
    float rotated[BASIS && ROWS > SIMDS ? ROWS : SIMDS][PADDED];
    uint4 originals[BASIS ? DIM * ROWS / 4 : 1];
    uint4 weights[SIMDS][BLOCK_TOKENS * ROW_WORDS / 4];
  };
  uint tables[TABLES > 0 ? TABLES : 1];
};

struct ExactMemory {
  float queries[ROWS][DIM];
  float scores[SIMDS][EXACT_TOKENS][ROWS];
};

struct JoinMemory {
  float largest[SIMDS][ROWS];
  float total[SIMDS][ROWS];
  float output[SIMDS][JOINED][VALUE_DIM];
};

struct Memory {
  // Phases follow each other and share this memory.
  union {
    PackedMemory packed;
    ExactMemory exact;
    JoinMemory join;
  };
  // For each row: the factor of its scores, the score of the mean of the keys, and where its mask begins
  // (with a causal mask, the last column that it sees).
  float factors[ROWS];
  float mean_scores[ROWS];
  long mask_starts[ROWS];
  // The number of rows, where the partial result of the first one begins, and how far results are apart. They
  // are here because registers are scarce until the end.
  int row_count;
  uint first_output;
  uint output_stride;
};

// The work of a SIMD group. It takes the rows of key head `head`, counted over all sequences, from `first_row`
// on. It takes the blocks `first_block`, `first_block + block_step` and so on of `count` tokens. The first
// token of the head is vector `first_vector` of its buffer.
struct Place {
  uint lane;
  int simd;
  int head;
  int first_row;
  int first_block;
  int block_step;
  int count;
  uint first_vector;
};

// The first coordinate of pair k of a lane.
METAL_FUNC uint coordinate_of(uint lane, uint k) {
  const uint piece = 2 * k / COORDINATES;
  return (piece * VALUE_LANES + lane % VALUE_LANES) * COORDINATES + 2 * k % COORDINATES;
}

// Loads COUNT words of threadgroup memory from word `at` on, four or two per access where COUNT allows it.
template <int COUNT>
METAL_FUNC void load_words(const threadgroup uint4* words, uint at, thread uint* out) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int k = 0; k < COUNT / 4; k++) {
      const uint4 four = words[at / 4 + k];
      out[4 * k] = four.x;
      out[4 * k + 1] = four.y;
      out[4 * k + 2] = four.z;
      out[4 * k + 3] = four.w;
    }
  } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
    for (int k = 0; k < COUNT / 2; k++) {
      const uint2 two = ((const threadgroup uint2*)words)[at / 2 + k];
      out[2 * k] = two.x;
      out[2 * k + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      out[k] = ((const threadgroup uint*)words)[at + k];
    }
  }
}

// Stores COUNT words in threadgroup memory from word `at` on, like load_words: an address for each word would
// be computed before the loop over blocks, and would stay in a register.
template <int COUNT>
METAL_FUNC void store_words(threadgroup uint4* words, uint at, const thread uint* in) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int k = 0; k < COUNT / 4; k++) {
      uint4 four;
      four.x = in[4 * k];
      four.y = in[4 * k + 1];
      four.z = in[4 * k + 2];
      four.w = in[4 * k + 3];
      words[at / 4 + k] = four;
    }
  } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
    for (int k = 0; k < COUNT / 2; k++) {
      uint2 two;
      two.x = in[2 * k];
      two.y = in[2 * k + 1];
      ((threadgroup uint2*)words)[at / 2 + k] = two;
    }
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      ((threadgroup uint*)words)[at + k] = in[k];
    }
  }
}
