// Joins the partial results of decode_attention.metal: weighs the splits, rotates the packed part back,
// adds the mean of the values times the weight of all packed tokens, and divides by the sum.
//
//   partial       float32 (count, splits, DIM + 2): outputs, maximum and sum; the splits of exact tokens come
//                 last, in the original coordinates
//   mean          float32 (batch * heads, DIM), of the values
//   rotation      float32: signs and matrix of the rotation of the values, see rotation.h
//   sizes         int32 (8): splits of packed tokens, query rows of a key head, query rows of a query
//                 head, query heads
//   sinks         with SINKS: float32 (query heads), logits without a value
//   out           T (count, DIM)
//
// `count` counts the query rows of all heads of all sequences. A threadgroup joins the splits of one row.
// Each of its SIMDS SIMD groups sums every SIMDS-th split, with lanes over the coordinates, relative to the
// largest maximum so far. It loads BATCH splits at once: up to SIMDS * BATCH splits take one wait for
// memory, and a lane needs BATCH * DIM / 32 registers. Then each thread adds the SIMD groups' sums of a
// coordinate. The first SIMD group rotates alone: the rotation mixes all coordinates.

constexpr int COORDINATES = (DIM + LANES - 1) / LANES;
constexpr int THREADS = SIMDS * LANES;
constexpr int OUTPUTS = (DIM + THREADS - 1) / THREADS;
threadgroup float values[SIMDS * DIM];
threadgroup float exact_values[SIMDS * DIM];
threadgroup float rotated[DIM];
threadgroup float maxima[SIMDS];
threadgroup float totals[SIMDS];
threadgroup float packed_totals[SIMDS];

const int splits = int(partial_shape[1]);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int query = int(threadgroup_position_in_grid.x);
// 32 bits are enough within the splits of one query.
const device float* parts = partial + long(query) * splits * (DIM + 2);
const int packed_splits = sizes[0];
const int group_rows = sizes[1];

// Loaded early, for the end.
float means[OUTPUTS];
float signs[OUTPUTS];
#pragma unroll
for (int k = 0; k < OUTPUTS; k++) {
  const int i = min(k * THREADS + simd * LANES + lane, DIM - 1);
  means[k] = mean[query / group_rows * DIM + i];
  signs[k] = rotation[i];
}
#if SINKS
const float sink = sinks[query / sizes[2] % sizes[3]];
#endif

float largest = -1e30f;
float total = 0.0f;
float packed = 0.0f;
float sums[COORDINATES];
float exact_sums[COORDINATES];
#pragma unroll
for (int k = 0; k < COORDINATES; k++) {
  sums[k] = 0.0f;
  exact_sums[k] = 0.0f;
}
for (int start = simd; start < splits; start += BATCH * SIMDS) {
  float loaded[BATCH * COORDINATES];
  float part_maxima[BATCH];
  float part_sums[BATCH];
  float batch_largest = largest;
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const int s = start + b * SIMDS;
    const device float* part = parts + min(s, splits - 1) * (DIM + 2);
    const device float* own = part + lane;
    part_maxima[b] = part[DIM];
    part_sums[b] = part[DIM + 1];
#pragma unroll
    for (int k = 0; k < COORDINATES; k++) {
      loaded[b * COORDINATES + k] = own[DIM % LANES == 0 ? k * LANES : min(k * LANES, DIM - 1 - lane)];
    }
  }
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    batch_largest = max(batch_largest, part_maxima[b]);
  }
  const float correction = exp(largest - batch_largest);
  largest = batch_largest;
  total *= correction;
  packed *= correction;
#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    sums[k] *= correction;
    exact_sums[k] *= correction;
  }
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const int s = start + b * SIMDS;
    const bool exact = s >= packed_splits;
    const float weight = s < splits ? exp(part_maxima[b] - largest) : 0.0f;
    total += weight * part_sums[b];
    packed += exact ? 0.0f : weight * part_sums[b];
#pragma unroll
    for (int k = 0; k < COORDINATES; k++) {
      sums[k] += (exact ? 0.0f : weight) * loaded[b * COORDINATES + k];
      exact_sums[k] += (exact ? weight : 0.0f) * loaded[b * COORDINATES + k];
    }
  }
}
#pragma unroll
for (int k = 0; k < COORDINATES; k++) {
  const int i = k * LANES + lane;
  if (i < DIM) {
    values[simd * DIM + i] = sums[k];
    exact_values[simd * DIM + i] = exact_sums[k];
  }
}
if (lane == 0) {
  maxima[simd] = largest;
  totals[simd] = total;
  packed_totals[simd] = packed;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

#if SINKS
largest = max(largest, sink);
#endif
for (int s = 0; s < SIMDS; s++) {
  largest = max(largest, maxima[s]);
}
total = 0.0f;
packed = 0.0f;
#if SINKS
total = exp(sink - largest);
#endif
float rotated_sums[OUTPUTS];
float exact_outputs[OUTPUTS];
#pragma unroll
for (int k = 0; k < OUTPUTS; k++) {
  rotated_sums[k] = 0.0f;
  exact_outputs[k] = 0.0f;
}
for (int s = 0; s < SIMDS; s++) {
  const float weight = exp(maxima[s] - largest);
  total += weight * totals[s];
  packed += weight * packed_totals[s];
#pragma unroll
  for (int k = 0; k < OUTPUTS; k++) {
    const int i = min(k * THREADS + simd * LANES + lane, DIM - 1);
    rotated_sums[k] += weight * values[s * DIM + i];
    exact_outputs[k] += weight * exact_values[s * DIM + i];
  }
}
#pragma unroll
for (int k = 0; k < OUTPUTS; k++) {
  const int i = k * THREADS + simd * LANES + lane;
  if (i < DIM) {
    rotated[i] = rotated_sums[k] * rsqrt(float(POWER));
  }
  exact_outputs[k] += packed * means[k];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  butterflies<DIM, POWER>(rotated, uint(lane));
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const float inverse_total = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
for (int k = 0; k < OUTPUTS; k++) {
  const int i = k * THREADS + simd * LANES + lane;
  if (i < DIM) {
    const float value = matrix_row<ORDER, POWER, true>(rotation + DIM, rotated, i);
    out[long(query) * DIM + i] = T((value * signs[k] + exact_outputs[k]) * inverse_total);
  }
}
