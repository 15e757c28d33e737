// Packed vectors to dense ones: out = mean + R^T (scale * levels).
//
//   codes   uint32, (rows, capacity / 32, WORDS, 32) if INTERLEAVED, else (rows, capacity, WORDS)
//   scales  bfloat16 (rows, capacity)
//   mean    float32 (rows, DIM), in the original coordinates
//   levels  float32, see level_of in codec.h
//   signs   float32 (DIM), of the randomized Hadamard matrix; ones for a dense rotation
//   matrix  float32 (ORDER, ORDER), see matrix_row in codec.h
//   sizes   int32 (8): vectors of each row to dequantize, and capacity
//   out     T (rows, count, DIM)
//
// A row is one head of one sequence; WORDS is vector_words<DIM, BITS>(). One SIMD group restores one
// vector, its coordinates spread over the lanes: the inverse rotation mixes all of them, and within a
// SIMD group that takes no barrier of the threadgroup. GROUPS SIMD groups share a threadgroup to
// fill the GPU; each has a part of the threadgroup memory to itself.

threadgroup float values[GROUPS * DIM];

const int count = sizes[0];
const int capacity = sizes[1];
const int lane = int(thread_index_in_simdgroup);
const int group = int(simdgroup_index_in_threadgroup);
const int vector = int(threadgroup_position_in_grid.x) * GROUPS + group;
constexpr int words = vector_words<DIM, BITS>();

if (vector < int(scales_shape[0]) * count) {
  const int row = vector / count;
  const int token = vector % count;
  const int slot = INTERLEAVED ? token / 32 * words * 32 + token % 32 : token * words;
  const float scale = float(scales[long(row) * capacity + token]);
  for (int i = lane; i < DIM; i += 32) {
    uint code =
        code_at<DIM, BITS>(codes + long(row) * capacity * words + slot, INTERLEAVED ? 32 : 1, i);
    values[group * DIM + i] = scale * level_of<BITS>(levels, code);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  butterflies<DIM, POWER>(values + group * DIM, uint(lane));
  const float normalisation = rsqrt(float(POWER));
  for (int i = lane; i < DIM; i += 32) {
    float value = matrix_row<ORDER, POWER, true>(matrix, values + group * DIM, i) * normalisation;
    out[long(vector) * DIM + i] = T(value * signs[i] + mean[long(row) * DIM + i]);
  }
}
