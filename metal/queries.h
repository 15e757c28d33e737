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

// Multiplies the queries of all rows by the `axes` of their head, (DIM, DIM). A SIMD group takes 32 neighbouring
// coordinates at once, and a lane four of them for every fourth row of the axes, so that each number of the axes is
// loaded once for all queries, and four in one load.
template <typename Queries, typename Axes, typename Constants>
METAL_FUNC void turn_queries(threadgroup Memory& memory, Queries queries, Axes axes, Constants constants,
    thread const Place& place, int group_rows) {
  constexpr int COUNT = (DIM / 32 + SIMDS - 1) / SIMDS;
  const int quarter = int(place.lane) / 8;
  for (int row = place.simd; row < ROWS; row += SIMDS) {
    for (int i = int(place.lane); i < DIM; i += LANES) {
      ((threadgroup float*)memory.packed.originals)[i * ROWS + row] =
          query_at(queries, constants, place, group_rows, row, i);
    }
  }
  float turned[COUNT][ROWS][4];
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        turned[k][r][c] = 0.0f;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 16
  for (int i = quarter; i < DIM; i += 4) {
    uint words[ROWS];
    load_words<ROWS>(memory.packed.originals, i * ROWS, words);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int run = min(k * SIMDS + place.simd, DIM / 32 - 1);
      const uint2 pairs = *(const device uint2*)(axes + (i * DIM + run * 32 + int(place.lane) % 8 * 4));
      const half2 first = as_type<half2>(pairs.x);
      const half2 second = as_type<half2>(pairs.y);
      const float axis[4] = {float(first.x), float(first.y), float(second.x), float(second.y)};
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          turned[k][r][c] = fma(as_type<float>(words[r]), axis[c], turned[k][r][c]);
        }
      }
    }
  }
  // They take the memory of the originals.
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    const int run = k * SIMDS + place.simd;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        float sum = turned[k][r][c] + simd_shuffle_xor(turned[k][r][c], ushort(8));
        sum += simd_shuffle_xor(sum, ushort(16));
        if (run < DIM / 32 && quarter == r % 4) {
          memory.packed.rotated[r][run * 32 + int(place.lane) % 8 * 4 + c] = sum;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Writes the tables of levels.
template <typename Constants>
METAL_FUNC void store_tables(threadgroup Memory& memory, Constants constants, int thread_index) {
#pragma unroll
  for (int eight = 0; eight < 4; eight++) {
    if (first_alike(KEY_PATTERN, eight) == eight) {
      store_table(digit_of(KEY_PATTERN, eight), constants + KEY_LEVELS + level_place(KEY_PATTERN, eight),
          memory.packed.tables + table_place(KEY_PATTERN, eight), thread_index, SIMDS * LANES);
    }
  }
  if (VALUE_PLACE >= KEY_TABLE) {
    store_table(VALUE_DIGIT, constants + VALUE_LEVELS, memory.packed.tables + VALUE_PLACE, thread_index, SIMDS * LANES);
  }
}

// Queries for packed tokens: rotated, in units of their root mean square, so that halves hold any query, and
// times the unit of the levels of their eight. With a BASIS they are multiplied by the `axes` of their head.
template <typename Queries, typename Axes, typename Mean, typename Constants>
METAL_FUNC void prepare_packed_queries(threadgroup Memory& memory, Queries queries, Axes axes, Mean key_mean,
    Constants constants, thread const Place& place, int group_rows) {
  if constexpr (BASIS) {
    turn_queries(memory, queries, axes, constants, place, group_rows);
  }
  for (int row = place.simd; row < ROWS; row += SIMDS) {
    threadgroup float* rotated = memory.packed.rotated[BASIS ? row : place.simd];
    float mean_score = 0.0f;
    float squared_norm = 0.0f;
    for (int i = int(place.lane); i < DIM; i += LANES) {
      const float query = query_at(queries, constants, place, group_rows, row, i);
      const float own = BASIS ? rotated[i] : query * constants[SIGNS + i];
      mean_score += query * key_mean[long(place.head) * DIM + i];
      squared_norm += own * own;
      rotated[i] = own;
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
            level_unit(digit_of(KEY_PATTERN, k), constants + KEY_LEVELS + level_place(KEY_PATTERN, k));
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
