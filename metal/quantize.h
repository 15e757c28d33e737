// How quantize.metal quantizes a vector.
#pragma once
#include "levels.h"
#include "rotation.h"

// Word w of the packed form of DIM codes, which lie in threadgroup memory as floats.
template <int DIM, int BITS>
METAL_FUNC uint packed_word(const threadgroup float* codes, int w) {
  constexpr int width = first_plane<BITS>();
  constexpr int words = plane_words<DIM, width>();
  uint word = 0u;
  if (w < words) {
    for (int j = 0; j < 32 / width; j++) {
      int i = w * (32 / width) + j;
      if (i < DIM) {
        uint field = (uint(codes[i]) >> (BITS - width)) & ((1u << width) - 1u);
        word |= field << field_shift<width>(j);
      }
    }
  } else if constexpr (BITS > width) {
    word = packed_word<DIM, BITS - width>(codes, w - words);
  }
  return word;
}

// The cell of y >= 0: how many of the limits between the positive levels are below it.
template <int BITS>
METAL_FUNC int cell_of(const threadgroup float2* cells, float y) {
  int cell = 0;
  for (int step = 1 << BITS >> 2; step > 0; step /= 2) {
    cell += y > cells[cell + step - 1].x ? step : 0;
  }
  return cell;
}

// Quantizes one vector with LANES lanes, as quantize.metal describes. Lane `lane` holds the coordinates
// k * LANES + lane. `values` are DIM floats of threadgroup memory of these lanes alone, `cells` are
// shared by the threadgroup: limit above a positive level, and that level. All threads take part, but
// where not `inside` nothing is read or written.
template <int DIM, int BITS, int ORDER, int POWER, int GAINS, int LANES, typename X, typename Mean,
          typename Levels, typename Thresholds, typename Gains, typename Signs, typename Matrix>
METAL_FUNC void quantize_vector(X x, Mean mean, Levels levels, Thresholds thresholds, Gains gains,
    Signs signs, Matrix matrix, device uint* codes, device bfloat16_t* scale_out,
    threadgroup float* values, threadgroup float2* cells, bool inside, int lane, int thread_index,
    int thread_count) {
  constexpr int COORDINATES = (DIM + LANES - 1) / LANES;
  constexpr int POSITIVE = 1 << BITS >> 1;
  for (int cell = thread_index; cell < POSITIVE; cell += thread_count) {
    float2 limit_and_level;
    limit_and_level.x = cell + 1 < POSITIVE ? float(thresholds[POSITIVE + cell]) : INFINITY;
    limit_and_level.y = level_of<BITS>(levels, uint(POSITIVE + cell));
    cells[cell] = limit_and_level;
  }

  float coordinates[COORDINATES];
  float largest = 0.0f;
  bool finite = true;
  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * LANES + lane;
    float value = 0.0f;
    if (inside && i < DIM) {
      value = float(x[i]) - mean[i];
    }
    coordinates[k] = value;
    finite = finite && isfinite(value);
    largest = max(largest, abs(value));
  }
  for (ushort step = 1; step < LANES; step *= 2) {
    largest = max(largest, simd_shuffle_xor(largest, step));
  }
  finite = shared_sum<LANES>(finite ? 0.0f : 1.0f) == 0.0f;
  // With the largest coordinate at one no square overflows or vanishes; two factors, because the
  // inverse of a tiny one would overflow.
  const float lift = largest < 1e-30f ? 1e30f : 1.0f;
  const float inverse = largest == 0.0f ? 0.0f : 1.0f / (largest * lift);
  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * LANES + lane;
    coordinates[k] *= i < DIM ? lift * inverse * signs[i] : 0.0f;
  }

  for (int half_run = 1; half_run < POWER; half_run *= 2) {
    if (half_run < LANES) {
      const float sign = (lane & half_run) == 0 ? 1.0f : -1.0f;
      for (int k = 0; k < COORDINATES; k++) {
        coordinates[k] = sign * coordinates[k] + simd_shuffle_xor(coordinates[k], ushort(half_run));
      }
    } else {
      const int step = half_run / LANES;
      for (int pair = 0; pair < COORDINATES / 2; pair++) {
        const int k = pair / step * 2 * step + pair % step;
        const float a = coordinates[k];
        const float b = coordinates[k + step];
        coordinates[k] = a + b;
        coordinates[k + step] = a - b;
      }
    }
  }
  if constexpr (ORDER > 1) {
    for (int k = 0; k < COORDINATES; k++) {
      const int i = k * LANES + lane;
      if (i < DIM) {
        values[i] = coordinates[k];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < COORDINATES; k++) {
      const int i = k * LANES + lane;
      coordinates[k] = i < DIM ? matrix_row<ORDER, POWER, false>(matrix, values, i) : 0.0f;
    }
  }
  float squared_norm = 0.0f;
  for (int k = 0; k < COORDINATES; k++) {
    squared_norm += coordinates[k] * coordinates[k];
  }
  const float rms = sqrt(shared_sum<LANES>(squared_norm) / float(DIM));
  const float inverse_rms = rms == 0.0f ? 0.0f : 1.0f / rms;

  // The gains ascend, so a coordinate only moves on to the next cell: cells are wider than the steps of
  // the gains up to 5 bits.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float products[GAINS];
  float squared_lengths[GAINS];
  for (int g = 0; g < GAINS; g++) {
    products[g] = 0.0f;
    squared_lengths[g] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < COORDINATES; k++) {
    const float y = abs(coordinates[k]) * inverse_rms;
    const threadgroup float2* cell = cells + cell_of<BITS>(cells, float(gains[0]) * y);
    float2 limit_and_level = cell[0];
    if (DIM % LANES != 0 && k * LANES + lane >= DIM) {
      limit_and_level.x = INFINITY;
      limit_and_level.y = 0.0f;
    }
#pragma unroll
    for (int g = 0; g < GAINS; g++) {
      const float scaled = float(gains[g]) * y;
      if constexpr (BITS <= 5) {
        if (scaled > limit_and_level.x) {
          cell++;
          limit_and_level = cell[0];
        }
      } else {
        while (scaled > limit_and_level.x) {
          cell++;
          limit_and_level = cell[0];
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
  for (int g = 0; g < GAINS; g++) {
    const float candidate = shared_sum<LANES>(products[g]);
    const float candidate_length = shared_sum<LANES>(squared_lengths[g]);
    if (candidate * candidate * squared_length > product * product * candidate_length) {
      gain = gains[g];
      product = candidate;
      squared_length = candidate_length;
    }
  }

  for (int k = 0; k < COORDINATES; k++) {
    const int i = k * LANES + lane;
    if (i < DIM) {
      const int cell = cell_of<BITS>(cells, gain * (abs(coordinates[k]) * inverse_rms));
      values[i] = float(coordinates[k] > 0.0f ? POSITIVE + cell : POSITIVE - 1 - cell);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (inside) {
    // <y, y> / <y, q> in units of rms; a vector of zeros has scale 0.
    float scale = product == 0.0f ? 0.0f : float(DIM) / product * rms * rsqrt(float(POWER)) * largest;
    scale = finite ? min(scale, 3.3895e38f) : NAN;
    if (lane == 0) {
      scale_out[0] = bfloat16_t(scale);
    }
    for (int w = lane; w < vector_words<DIM, BITS>(); w += LANES) {
      codes[w] = packed_word<DIM, BITS>(values, w);
    }
  }
}
