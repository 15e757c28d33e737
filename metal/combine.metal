// Joins the partial results of decode_attention.metal: weighs the splits, rotates the packed part back,
// adds the mean of the values for the weight of all packed tokens, and divides by the sum.
//
//   partial_out   float32 (count, splits, DIM); the last splits are in the original coordinates
//   partial_max, partial_sum   float32 (count, splits)
//   mean          float32 (batch * heads, DIM), of the values
//   signs, matrix of the rotation of the values, see codec.h
//   sinks         float32 (query heads), logits without a value, unused without SINKS
//   sizes         int32 (5): splits, those of packed tokens, query rows of a key head, query rows of a
//                 sequence, query heads
//   out           T (count, DIM)
//
// `count` is all query rows of all heads of all sequences. A threadgroup joins one of them. Each of its
// SIMDS SIMD groups sums every SIMDS-th split, its lanes over the coordinates, BATCH splits at once, so
// that many loads are under way; the first one adds these sums up and rotates, which mixes all
// coordinates.

constexpr int COORDINATES = (DIM + 31) / 32;
constexpr int BATCH = 4;
threadgroup float values[SIMDS * DIM];
threadgroup float exact_values[SIMDS * DIM];

const int splits = sizes[0];
const int packed_splits = sizes[1];
const int group_rows = sizes[2];
const int rows = sizes[3];
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int query = int(threadgroup_position_in_grid.x);
const long first = long(query) * splits;

float largest = -1e30f;
#pragma unroll 4
for (int s = lane; s < splits; s += 32) {
  largest = max(largest, partial_max[first + s]);
}
largest = simd_max(largest);
float sink = 0.0f;
if (SINKS) {
  sink = sinks[query / rows % sizes[4]];
  largest = max(largest, sink);
}

float packed = 0.0f;
float total = 0.0f;
#pragma unroll 4
for (int s = lane; s < splits; s += 32) {
  const float sum = exp(partial_max[first + s] - largest) * partial_sum[first + s];
  total += sum;
  packed += s < packed_splits ? sum : 0.0f;
}
packed = simd_sum(packed);
total = simd_sum(total);
if (SINKS) {
  total += exp(sink - largest);
}

float sums[COORDINATES];
float exact_sums[COORDINATES];
for (int k = 0; k < COORDINATES; k++) {
  sums[k] = 0.0f;
  exact_sums[k] = 0.0f;
}
for (int start = simd; start < splits; start += BATCH * SIMDS) {
  float parts[BATCH * COORDINATES];
  float weights[BATCH];
  for (int b = 0; b < BATCH; b++) {
    const int s = start + b * SIMDS;
    const long at = first + min(s, splits - 1);
    weights[b] = s < splits ? exp(partial_max[at] - largest) : 0.0f;
    for (int k = 0; k < COORDINATES; k++) {
      const int i = k * 32 + lane;
      parts[b * COORDINATES + k] = partial_out[at * DIM + min(i, DIM - 1)];
    }
  }
  for (int b = 0; b < BATCH; b++) {
    const bool exact = start + b * SIMDS >= packed_splits;
    for (int k = 0; k < COORDINATES; k++) {
      sums[k] += (exact ? 0.0f : weights[b]) * parts[b * COORDINATES + k];
      exact_sums[k] += (exact ? weights[b] : 0.0f) * parts[b * COORDINATES + k];
    }
  }
}
for (int k = 0; k < COORDINATES; k++) {
  const int i = k * 32 + lane;
  if (i < DIM) {
    values[simd * DIM + i] = sums[k];
    exact_values[simd * DIM + i] = exact_sums[k];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (simd == 0) {
  for (int i = lane; i < DIM; i += 32) {
    float sum = 0.0f;
    for (int s = 0; s < SIMDS; s++) {
      sum += values[s * DIM + i];
    }
    values[i] = sum * rsqrt(float(POWER));
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  butterflies<DIM, POWER>(values, uint(lane));
  const float inverse_total = total == 0.0f ? 0.0f : 1.0f / total;
  for (int i = lane; i < DIM; i += 32) {
    float value = matrix_row<ORDER, POWER, true>(matrix, values, i);
    value = value * signs[i] + packed * mean[long(query / group_rows) * DIM + i];
    for (int s = 0; s < SIMDS; s++) {
      value += exact_values[s * DIM + i];
    }
    out[long(query) * DIM + i] = T(value * inverse_total);
  }
}
