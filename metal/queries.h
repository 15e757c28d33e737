// The first phase of decode_attention.metal: loads the queries of a threadgroup into its memory.
#pragma once
#include "attention_memory.h"

// Coordinate i of a row times the factor of the scores; zero behind the last coordinate and the last row.
template <typename Queries, typename Constants>
METAL_FUNC float query_at(
    Queries queries, Constants constants, thread const Place& place, int group_rows, int row, int i) {
  const bool exists = i < DIM && place.first_row + row < group_rows;
  const long at = long(place.head) * group_rows + min(place.first_row + row, group_rows - 1);
  const float query = float(queries[at * DIM + min(i, DIM - 1)]);
  return exists ? query * constants[0] : 0.0f;
}

// Queries for exact tokens: floats, in the original coordinates.
template <typename Queries, typename Constants>
METAL_FUNC void prepare_exact_queries(threadgroup Memory& memory, Queries queries, Constants constants,
    thread const Place& place, int group_rows) {
  for (int row = place.simd; row < ROWS; row += SIMDS) {
    for (int i = int(place.lane); i < DIM; i += LANES) {
      memory.exact.queries[row][i] = query_at(queries, constants, place, group_rows, row, i);
    }
  }
}

// Eight floats as halves, pair after pair.
METAL_FUNC uint4 eight_halves(const thread float* x) {
  uint4 pairs;
  pairs.x = as_type<uint>(half2(half(x[0]), half(x[1])));
  pairs.y = as_type<uint>(half2(half(x[2]), half(x[3])));
  pairs.z = as_type<uint>(half2(half(x[4]), half(x[5])));
  pairs.w = as_type<uint>(half2(half(x[6]), half(x[7])));
  return pairs;
}

// Multiplies a row of queries, DIM floats in threadgroup memory, by the `axes` of its head, (DIM, DIM). Lanes
// take coordinates LANES apart, so that they read neighbouring numbers. Returns the squares of this lane's, added.
template <typename Axes>
METAL_FUNC float turn_row(threadgroup float* row, Axes axes, uint lane) {
  constexpr int count = (DIM + LANES - 1) / LANES;
  float own[count];
#pragma unroll
  for (int k = 0; k < count; k++) {
    own[k] = 0.0f;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 4
  for (int i = 0; i < DIM; i++) {
    const float query = row[i];
#pragma unroll
    for (int k = 0; k < count; k++) {
      own[k] = fma(query, float(axes[i * DIM + k * LANES + int(lane)]), own[k]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float squared_norm = 0.0f;
#pragma unroll
  for (int k = 0; k < count; k++) {
    squared_norm += own[k] * own[k];
    row[k * LANES + int(lane)] = own[k];
  }
  return squared_norm;
}

// Queries for packed tokens: rotated, in units of their root mean square, so that halves hold any query, and
// times the unit of the levels of their eight. With a BASIS they are multiplied by the `axes` of their head.
template <typename Queries, typename Axes, typename Mean, typename Constants>
METAL_FUNC void prepare_packed_queries(threadgroup Memory& memory, Queries queries, Axes axes, Mean key_mean,
    Constants constants, thread const Place& place, int group_rows) {
  threadgroup float* rotated = memory.packed.rotated[place.simd];
  for (int row = place.simd; row < ROWS; row += SIMDS) {
    float mean_score = 0.0f;
    float squared_norm = 0.0f;
    for (int i = int(place.lane); i < PADDED; i += LANES) {
      const float query = query_at(queries, constants, place, group_rows, row, i);
      const int at = min(i, DIM - 1);
      mean_score += query * key_mean[long(place.head) * DIM + at];
      squared_norm += query * query;
      rotated[i] = query * constants[SIGNS + at];
    }
    if constexpr (BASIS) {
      squared_norm = turn_row(rotated, axes, place.lane);
    }
    mean_score = simd_sum(mean_score);
    const float norm = sqrt(simd_sum(squared_norm));
    if (place.lane == 0) {
      memory.mean_scores[row] = mean_score;
      memory.factors[row] = norm * rsqrt(float(DIM));
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    butterflies<DIM, POWER>(rotated, place.lane);
    const float scale = norm > 0.0f ? sqrt(float(DIM)) * rsqrt(float(POWER)) / norm : 0.0f;
    for (int i = int(place.lane); i < PADDED / 8; i += LANES) {
      float unit = 1.0f;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float own =
            level_unit(bits_of(KEY_PATTERN, k), constants + KEY_LEVELS + level_place(KEY_PATTERN, k));
        unit = i % 4 == k ? own : unit;
      }
      float eight[8];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        eight[k] = i * 8 + k < DIM
            ? unit * scale * matrix_row<ORDER, POWER, false>(constants + MATRIX, rotated, i * 8 + k)
            : 0.0f;
      }
      memory.packed.queries[i][row] = eight_halves(eight);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
