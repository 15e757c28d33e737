// All tokens of a compressed cache as dense keys and values: the exact ones as they are, the packed ones
// restored, out = mean + R^T (scale * levels).
//
//   key_codes      uint32 (rows, key capacity / 32, WORDS, 32), interleaved
//   key_scales     bfloat16 (batch, heads, key capacity)
//   key_mean       float32 (rows, DIM), in the original coordinates
//   key_constants  float32: levels, see level_of in codec.h; signs (DIM) of the randomized Hadamard matrix,
//                  ones for a dense rotation; matrix (ORDER, ORDER), see matrix_row in codec.h
//   exact_keys     T (batch, heads, exact capacity, DIM)
//   value_codes    uint32 (rows, value capacity, VALUE_WORDS); value_scales to exact_values likewise
//   sizes          int32 (8): sinks, packed tokens, first recent token in the exact buffers, all tokens
//   keys           T (rows, all tokens, DIM): sinks, packed tokens, recent tokens
//   values         T (rows, all tokens, VALUE_DIM)
//
// Where the keys are the values, KINDS is 1: one number is written to `values`. A row is one head of one sequence; WORDS is vector_words<DIM, KEY_BITS>(). Threadgroups with y = 0 take
// keys, those with y = 1 values. One SIMD group restores one vector, its coordinates spread over the
// lanes: the inverse rotation mixes all of them, and within a SIMD group that takes no barrier of the
// threadgroup. GROUPS SIMD groups share a threadgroup to fill the GPU; each has a part of the
// threadgroup memory to itself.

constexpr int LONGER = DIM > VALUE_DIM ? DIM : VALUE_DIM;
threadgroup float scratch[GROUPS * LONGER];

const int lane = int(thread_index_in_simdgroup);
const int group = int(simdgroup_index_in_threadgroup);
const long vector = long(threadgroup_position_in_grid.x) * GROUPS + group;
const int count = sizes[3];
if (KINDS == 1 && vector == 0 && lane == 0) {
  values[0] = exact_values[0];
}
const long row = vector / count;
const int token = int(vector % count);
if (row < long(key_scales_shape[0]) * key_scales_shape[1]) {
  const bool packed = token >= sizes[0] && token < sizes[0] + sizes[1];
  const int from = token < sizes[0] ? token : token - sizes[0] - (packed ? 0 : sizes[1] - sizes[2]);
  const long exact_at = row * exact_keys_shape[2] + from;
  threadgroup float* own = scratch + group * LONGER;
  if (threadgroup_position_in_grid.y == 0) {
    const long capacity = key_scales_shape[2];
    restore_vector<DIM, KEY_BITS, ORDER, POWER, 32>(
        key_codes + row * capacity * vector_words<DIM, KEY_BITS>(), key_scales + row * capacity,
        key_mean + row * DIM, key_constants, exact_keys + exact_at * DIM, packed, from,
        keys + vector * DIM, own, lane);
  } else {
    const long capacity = value_scales_shape[2];
    restore_vector<VALUE_DIM, VALUE_BITS, VALUE_ORDER, VALUE_POWER, 1>(
        value_codes + row * capacity * vector_words<VALUE_DIM, VALUE_BITS>(),
        value_scales + row * capacity, value_mean + row * VALUE_DIM, value_constants,
        exact_values + exact_at * VALUE_DIM, packed, from, values + vector * VALUE_DIM, own, lane);
  }
}
