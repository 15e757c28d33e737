// Joins the partial results of decode_attention.metal: weighs the splits, rotates the packed part back,
// adds the mean of the values for the weight of all packed tokens, and divides by the sum.
//
//   partial_out   float32 (count, splits, DIM); split 0 is in the original coordinates
//   partial_max, partial_sum   float32 (count, splits)
//   mean          float32 (batch * heads, DIM), of the values
//   signs, matrix of the rotation of the values, see codec.h
//   sinks         float32 (query heads), logits without a value, unused without SINKS
//   sizes         int32 (5): count, splits, query rows of a key head, query rows of a sequence,
//                 query heads
//   out           T (count, DIM)
//
// `count` is all query rows of all heads of all sequences. One SIMD group joins one of them, its
// coordinates spread over the lanes, because the inverse rotation mixes all of them; GROUPS SIMD
// groups share a threadgroup, each with a part of the threadgroup memory to itself.

threadgroup float values[GROUPS * DIM];

const int count = sizes[0];
const int splits = sizes[1];
const int group_rows = sizes[2];
const int rows = sizes[3];
const int lane = int(thread_index_in_simdgroup);
const int group = int(simdgroup_index_in_threadgroup);
const int query = int(threadgroup_position_in_grid.x) * GROUPS + group;

if (query < count) {
  float largest = -1e30f;
  for (int s = lane; s < splits; s += 32) {
    largest = max(largest, partial_max[long(query) * splits + s]);
  }
  largest = simd_max(largest);
  float sink = 0.0f;
  if (SINKS) {
    sink = sinks[query / rows % sizes[4]];
    largest = max(largest, sink);
  }
  float packed = 0.0f;
  for (int s = lane + 1; s < splits; s += 32) {
    const long at = long(query) * splits + s;
    packed += exp(partial_max[at] - largest) * partial_sum[at];
  }
  packed = simd_sum(packed);
  const float exact_weight = exp(partial_max[long(query) * splits] - largest);
  float total = packed + exact_weight * partial_sum[long(query) * splits];
  if (SINKS) {
    total += exp(sink - largest);
  }
  for (int i = lane; i < DIM; i += 32) {
    float sum = 0.0f;
    for (int s = 1; s < splits; s++) {
      const long at = long(query) * splits + s;
      sum += exp(partial_max[at] - largest) * partial_out[at * DIM + i];
    }
    values[group * DIM + i] = sum;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  butterflies<DIM, POWER>(values + group * DIM, uint(lane));
  const float normalisation = rsqrt(float(POWER));
  const float inverse_total = total == 0.0f ? 0.0f : 1.0f / total;
  for (int i = lane; i < DIM; i += 32) {
    float value = matrix_row<ORDER, POWER, true>(matrix, values + group * DIM, i) * normalisation;
    value = value * signs[i] + packed * mean[long(query / group_rows) * DIM + i];
    value += exact_weight * partial_out[long(query) * splits * DIM + i];
    out[long(query) * DIM + i] = T(value * inverse_total);
  }
}
