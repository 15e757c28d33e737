// Writes all tokens of a compressed cache as dense keys and values. Exact tokens are copied; packed tokens
// are restored: out = mean + R^T (scale * levels).
//
//   key_codes      uint32 (rows, key capacity / 32, WORDS, 32), interleaved
//   key_scales     bfloat16 (batch, heads, key capacity)
//   key_mean       float32 (rows, DIM), in the original coordinates
//   key_constants  float32: levels, see level_of in levels.h; signs (DIM) of the randomized Hadamard matrix,
//                  ones for a dense rotation; matrix (ORDER, ORDER), see matrix_row in rotation.h
//   exact_keys     T (batch, heads, exact capacity, DIM)
//   value_codes    uint32 (rows, value capacity, VALUE_WORDS); value_scales to exact_values likewise
//   sizes          int32 (8): sinks, packed tokens, first recent token in the exact buffers, all tokens
//   keys           T (rows, all tokens, DIM): sinks, packed tokens, recent tokens
//   values         T (rows, all tokens, VALUE_DIM)
//
// For latent vectors SIDES is 1, and `values` gets a single number. A row is one head of one sequence; WORDS
// is vector_words<DIM, KEY_PATTERN>(). Threadgroups with y = 0 take keys, those with y = 1 values. A SIMD group
// restores TOKENS neighbouring tokens of a row. They share the signs and the mean of the row; interleaved
// keys also share sectors of memory. A threadgroup has GROUPS SIMD groups to fill the GPU, each with its own
// part of the threadgroup memory.

constexpr int TOKENS = 32;
constexpr int LONGER = DIM > VALUE_DIM ? DIM : VALUE_DIM;
threadgroup float scratch[GROUPS * LONGER];

const int lane = int(thread_index_in_simdgroup);
const int group = int(simdgroup_index_in_threadgroup);
// 32 bits are enough, as for the grid; a division of 64 bits would cost hundreds of instructions.
const uint number = threadgroup_position_in_grid.x * GROUPS + group;
const int count = sizes[3];
if (SIDES == 1 && number == 0u && lane == 0) {
  values[0] = exact_values[0];
}
const uint runs = (count + TOKENS - 1) / TOKENS;
const long row = number / runs;
const int first = int(number % runs) * TOKENS;
const int last = min(first + TOKENS, count);
if (row < long(key_scales_shape[0]) * key_scales_shape[1]) {
  if (threadgroup_position_in_grid.y == 0) {
    const long capacity = key_scales_shape[2];
    restore_tokens<DIM, KEY_PATTERN, ORDER, POWER, 32>(
        key_codes + row * capacity * vector_words<DIM, KEY_PATTERN>(), key_scales + row * capacity,
        key_mean + row * DIM, key_constants, exact_keys + row * exact_keys_shape[2] * DIM,
        keys + row * count * DIM, sizes, first, last, scratch + group * LONGER, lane);
  } else {
    const long capacity = value_scales_shape[2];
    restore_tokens<VALUE_DIM, VALUE_PATTERN, VALUE_ORDER, VALUE_POWER, 1>(
        value_codes + row * capacity * vector_words<VALUE_DIM, VALUE_PATTERN>(),
        value_scales + row * capacity, value_mean + row * VALUE_DIM, value_constants,
        exact_values + row * exact_values_shape[2] * VALUE_DIM, values + row * count * VALUE_DIM, sizes,
        first, last, scratch + group * LONGER, lane);
  }
}
