// How quantize.metal quantizes a vector.
#pragma once
#include "levels.h"
#include "rotation.h"

// Word w of the packed form of DIM codes, which lie in threadgroup memory as floats.
template <int DIM, int BITS>
METAL_FUNC uint packed_word(const threadgroup float* codes, int w) {
  constexpr int width = first_plane<BITS>();
  constexpr int words = plane_words<DIM, width>();
  if constexpr (BITS > width) {
    if (w >= words) {
      return packed_word<DIM, BITS - width>(codes, w - words);
    }
  }
  uint word = 0u;
#pragma unroll
  for (int j = 0; j < 32 / width; j++) {
    const int i = w * (32 / width) + j;
    if (DIM % (32 / width) == 0 || i < DIM) {
      const uint field = (uint(codes[i]) >> (BITS - width)) & ((1u << width) - 1u);
      word |= field << field_shift<width>(j);
    }
  }
  return word;
}

// The cell of y >= 0: how many of the limits between the positive levels are below it.
template <int BITS>
METAL_FUNC int cell_of(const threadgroup float2* cells, float y) {
  int cell = 0;
#pragma unroll
  for (int step = 1 << BITS >> 2; step > 0; step /= 2) {
    cell += y > cells[cell + step - 1].x ? step : 0;
  }
  return cell;
}

// Quantizes one vector with VECTOR_LANES lanes, as quantize.metal describes. Lane `lane` holds the
// coordinates k * VECTOR_LANES + lane. `values` are DIM floats of threadgroup memory for these lanes alone.
// `cells` are shared by the threadgroup: the limit above a positive level, and that level. All threads take
// part, but only those that are `inside` write results.
template <int DIM, int BITS, int ORDER, int POWER, int GAINS, int VECTOR_LANES, typename X, typename Mean,
          typename Levels, typename Thresholds, typename Gains, typename Signs, typename Matrix>
METAL_FUNC void quantize_vector(X x, Mean mean, Levels levels, Thresholds thresholds, Gains gains,
    Signs signs, Matrix matrix, device uint* codes, device bfloat16_t* scale_out,
    threadgroup float* values, threadgroup float2* cells, bool inside, int lane, int thread_index,
    int thread_count) {
  constexpr int COORDINATES = (DIM + VECTOR_LANES - 1) / VECTOR_LANES;
  constexpr int POSITIVE = 1 << BITS >> 1;
  for (int cell = thread_index; cell < POSITIVE; cell += thread_count) {
    cells[cell].x = cell + 1 < POSITIVE ? float(thresholds[POSITIVE + cell]) : INFINITY;
    cells[cell].y = level_of<BITS>(levels, uint(POSITIVE + cell));
  }

  // Seen from its first one, the coordinates of a lane are at constant offsets.
  x += lane;
  mean += lane;
  signs += lane;
  threadgroup float* own = values + lane;
  float coordinates[COORDINATES];
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * VECTOR_LANES;
    coordinates[k] = i + lane < DIM ? float(x[i]) - mean[i] : 0.0f;
    largest = max(largest, abs(coordinates[k]));
  }
  largest = shared_max<VECTOR_LANES>(largest);
  // With the largest coordinate scaled to one, no square overflows or vanishes. Subnormal numbers count as
  // zeros, as on many GPUs, because their inverse would overflow.
  const float lift = largest < 1e-30f ? 1e30f : 1.0f;
  const float inverse = largest < 1.1755e-38f ? 0.0f : 1.0f / (largest * lift);
#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * VECTOR_LANES;
    coordinates[k] *= i + lane < DIM ? lift * inverse * signs[i] : 0.0f;
  }

  strided_butterflies<COORDINATES, POWER, VECTOR_LANES>(coordinates, lane);
  if constexpr (ORDER > 1) {
#pragma unroll
    for (int k = 0; k < COORDINATES; k++) {
      const int i = k * VECTOR_LANES;
      if (i + lane < DIM) {
        own[i] = coordinates[k];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    strided_matrix_rows<DIM, ORDER, POWER, COORDINATES, VECTOR_LANES>(coordinates, matrix, values, lane);
  }
  float squared_norm = 0.0f;
#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    squared_norm += coordinates[k] * coordinates[k];
  }
  // This is NaN where a coordinate is not finite: infinity has become infinity times zero.
  const float rms = sqrt(shared_sum<VECTOR_LANES>(squared_norm) / float(DIM));
  const float inverse_rms = rms == 0.0f ? 0.0f : 1.0f / rms;

  // From here on the coordinates are in threadgroup memory, each still used by its own lane alone. So the
  // next loop is not unrolled, its code fits an instruction cache, and its sums have the registers.
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * VECTOR_LANES;
    if (i + lane < DIM) {
      own[i] = coordinates[k];
    }
  }
  float tried[GAINS];
  float products[GAINS];
  float squared_lengths[GAINS];
#pragma unroll
  for (int g = 0; g < GAINS; g++) {
    tried[g] = gains[g];
    products[g] = 0.0f;
    squared_lengths[g] = 0.0f;
  }
  // The gains ascend, so a coordinate only moves to higher cells. Up to 5 bits it moves one cell at most,
  // because cells are wider than the steps of the gains.
  for (int i = 0; i < DIM - lane; i += VECTOR_LANES) {
    const float y = abs(own[i]) * inverse_rms;
    int cell = cell_of<BITS>(cells, tried[0] * y);
    float2 limit_and_level = cells[cell];
#pragma unroll
    for (int g = 0; g < GAINS; g++) {
      while (tried[g] * y > limit_and_level.x) {
        limit_and_level = cells[++cell];
        if (BITS <= 5) {
          break;
        }
      }
      products[g] = fma(limit_and_level.y, y, products[g]);
      squared_lengths[g] = fma(limit_and_level.y, limit_and_level.y, squared_lengths[g]);
    }
  }
  // The largest cosine, product / length, without a division.
  float gain = 1.0f;
  float product = 0.0f;
  float squared_length = 1.0f;
#pragma unroll
  for (int g = 0; g < GAINS; g++) {
    const float candidate = shared_sum<VECTOR_LANES>(products[g]);
    const float candidate_length = shared_sum<VECTOR_LANES>(squared_lengths[g]);
    if (candidate * candidate * squared_length > product * product * candidate_length) {
      gain = tried[g];
      product = candidate;
      squared_length = candidate_length;
    }
  }

#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * VECTOR_LANES;
    if (i + lane < DIM) {
      const float y = own[i];
      const int cell = cell_of<BITS>(cells, gain * (abs(y) * inverse_rms));
      own[i] = float(y > 0.0f ? POSITIVE + cell : POSITIVE - 1 - cell);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (inside) {
    // <y, y> / <y, q> in units of rms; a vector of zeros has scale 0.
    float scale = product == 0.0f ? 0.0f : float(DIM) / product * rms * rsqrt(float(POWER)) * largest;
    scale = isfinite(rms) ? min(scale, 3.3895e38f) : NAN;
    if (lane == 0) {
      scale_out[0] = bfloat16_t(scale);
    }
    for (int w = lane; w < vector_words<DIM, BITS>(); w += VECTOR_LANES) {
      codes[w] = packed_word<DIM, BITS>(values, w);
    }
  }
}
