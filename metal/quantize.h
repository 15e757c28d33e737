// How quantize.metal quantizes a vector.
#pragma once
#include "levels.h"
#include "rotation.h"
#include "trellis_search.h"

// Word w of a run of COUNT codes, which lie in threadgroup memory as floats.
template <int COUNT, int BITS>
METAL_FUNC uint word_of_run(const threadgroup float* codes, int w) {
  constexpr int width = first_plane<BITS>();
  constexpr int words = plane_words<COUNT, width>();
  if constexpr (BITS > width) {
    if (w >= words) {
      return word_of_run<COUNT, BITS - width>(codes, w - words);
    }
  }
  uint word = 0u;
#pragma unroll
  for (int j = 0; j < 32 / width; j++) {
    const int i = w * (32 / width) + j;
    if (COUNT % (32 / width) == 0 || i < COUNT) {
      const uint field = (uint(codes[i]) >> (BITS - width)) & ((1u << width) - 1u);
      word |= field << field_shift<width>(j);
    }
  }
  return word;
}

// Word w of the packed form of DIM codes.
template <int DIM, int BITS>
METAL_FUNC uint packed_word(const threadgroup float* codes, int w) {
  const int run = w / BITS;
  codes += run * 32;
  if (DIM % 32 > 0 && run == DIM / 32) {
    return word_of_run<DIM % 32, BITS>(codes, w - run * BITS);
  }
  return word_of_run<32, BITS>(codes, w - run * BITS);
}

// The same for codes whose runs have a pattern.
template <int PATTERN>
METAL_FUNC uint packed_word_by_pattern(const threadgroup float* codes, int w) {
  constexpr int mean_bits = pattern_words(PATTERN);
  const int run = w / mean_bits;
  uint word = 0u;
#pragma unroll
  for (int field = 0; field < 16; field++) {
    const int eight = field % 4;
    const int plane = field / 4;
    const int bits = bits_of(PATTERN, eight);
    const int start = field_start(PATTERN, eight, plane);
    if (has_plane(bits, plane) && start / 16 == w - run * mean_bits) {
      const int below = plane == 0 ? bits - 4 : (plane == 2 ? bits & 1 : 0);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const uint code = uint(codes[run * 32 + eight * 8 + j]) >> below;
        word |= (code & ((1u << plane_width(plane)) - 1u)) << (start % 16 + j / 2 * plane_width(plane) + j % 2 * 16);
      }
    }
  }
  return word;
}

// Where the cells of an eight begin, or with eight 4 how many there are: those of all bits of a pattern follow
// each other, in the order of the eights.
METAL_FUNC constexpr int cell_place(int pattern, int eight) {
  int place = 0;
#pragma unroll
  for (int other = 0; other < 4; other++) {
    const bool is_before = eight == 4 || other < first_alike(pattern, eight);
    place += is_before && first_alike(pattern, other) == other ? 1 << bits_of(pattern, other) >> 1 : 0;
  }
  return place;
}

// How many cells there are. The tables of a trellis code take their place, two levels in a cell.
METAL_FUNC constexpr int cell_count(int pattern) {
  return is_trellis(pattern) ? level_place(pattern, 4) / 2 : cell_place(pattern, 4);
}

// Words of threadgroup memory for the starts of a search.
template <int DIM>
METAL_FUNC constexpr int start_words() {
  return (DIM + 7) / 8 * LANES;
}

// And for all that encode_stream needs.
template <int DIM, int PATTERN>
METAL_FUNC constexpr int search_words() {
  return is_trellis(PATTERN) ? 2 * start_words<DIM>() + (DIM + 3) / 4 : 0;
}

// The cell of y >= 0: how many of the limits between the positive levels are below it.
METAL_FUNC int cell_of(int bits, const threadgroup float2* cells, float y) {
  int cell = 0;
#pragma unroll
  for (int step = 1 << bits >> 2; step > 0; step /= 2) {
    cell += y > cells[cell + step - 1].x ? step : 0;
  }
  return cell;
}

// Replaces coordinates in units of `inverse_rms` by their codes, with the best of the gains. The sums are those of <y, y>,
// <y, q> and <q, q> by their weights.
template <int DIM, int PATTERN, int GAINS, int VECTOR_LANES, bool WEIGHTED, typename Gains, typename Weights>
METAL_FUNC void encode(threadgroup float* values, float inverse_rms, Gains gains, Weights weights,
    const threadgroup float2* cells, int lane, thread float& squared_sum, thread float& product,
    thread float& squared_length) {
  constexpr int COORDINATES = (DIM + VECTOR_LANES - 1) / VECTOR_LANES;
  constexpr bool ALIKE = is_uniform(PATTERN) && !WEIGHTED;
  threadgroup float* own = values + lane;
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
  squared_sum = ALIKE ? float(DIM) : 0.0f;
  for (int i = 0; i < DIM - lane; i += VECTOR_LANES) {
    const int eight = ALIKE ? 0 : (i + lane) / 8 % 4;
    const int bits = bits_of(PATTERN, eight);
    const float weight = WEIGHTED ? float(weights[eight]) : 1.0f;
    const float y = abs(own[i]) * inverse_rms;
    if (!ALIKE) {
      squared_sum = fma(weight * y, y, squared_sum);
    }
    if (bits == 0) {
      continue;
    }
    const threadgroup float2* own_cells = cells + cell_place(PATTERN, eight);
    int cell = cell_of(bits, own_cells, tried[0] * y);
    float2 limit_and_level = own_cells[cell];
#pragma unroll
    for (int g = 0; g < GAINS; g++) {
      while (tried[g] * y > limit_and_level.x) {
        limit_and_level = own_cells[++cell];
        if (bits <= 5) {
          break;
        }
      }
      const float weighted = weight * limit_and_level.y;
      products[g] = fma(weighted, y, products[g]);
      squared_lengths[g] = fma(weighted, limit_and_level.y, squared_lengths[g]);
    }
  }
  if (!ALIKE) {
    squared_sum = shared_sum<VECTOR_LANES>(squared_sum);
  }
  // The largest cosine, product / length, without a division.
  float gain = 1.0f;
  product = 0.0f;
  squared_length = 1.0f;
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
      const int eight = ALIKE ? 0 : (i + lane) / 8 % 4;
      const int bits = bits_of(PATTERN, eight);
      const int positive = 1 << bits >> 1;
      const float y = own[i];
      const int cell =
          cell_of(bits, cells + cell_place(PATTERN, eight), gain * (abs(y) * inverse_rms));
      own[i] = bits == 0 ? 0.0f : float(y > 0.0f ? positive + cell : positive - 1 - cell);
    }
  }
}

// The same with a trellis code. The least cost in units of the squared gain is that of nearly the largest cosine, so that
// one stream is followed, not one for each gain. `starts` have room for the search of two gains, and for the windows.
template <int DIM, int PATTERN, int GAINS, bool WEIGHTED, typename Gains, typename Weights>
METAL_FUNC void encode_stream(const threadgroup float* values, float inverse_rms, Gains gains, Weights weights,
    const threadgroup float* tables, threadgroup uint* starts, int lane, thread float& squared_sum,
    thread float& product, thread float& squared_length) {
  constexpr int STARTS = start_words<DIM>();
  float least = INFINITY;
  uint last = 0u;
  int kept = 0;
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 1
  for (int g = 0; g < GAINS; g++) {
    const float gain = gains[g];
    const uint found = search_stream<DIM, PATTERN, WEIGHTED>(
        values, gain * inverse_rms, weights, tables, starts + (kept == 0 ? STARTS : 0), lane);
    const float cost = as_type<float>(found & ~(WINDOWS - 1u)) / (gain * gain);
    if (g == 0 || cost < least) {
      least = cost;
      last = found & (WINDOWS - 1u);
      kept = STARTS - kept;
    }
  }
  threadgroup uchar* windows = (threadgroup uchar*)(starts + 2 * STARTS);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  trace_stream<DIM, PATTERN>(last, starts + kept, windows, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (int i = lane; i < DIM; i += LANES) {
    const int eight = i / 8 % 4;
    const float weight = WEIGHTED ? float(weights[eight]) : 1.0f;
    const float y = values[i] * inverse_rms;
    const float level = bits_of(PATTERN, eight) == 0 ? 0.0f : tables[level_place(PATTERN, eight) + windows[i]];
    sums[0] += weight * y * y;
    sums[1] += weight * y * level;
    sums[2] += weight * level * level;
  }
  squared_sum = simd_sum(sums[0]);
  product = simd_sum(sums[1]);
  squared_length = simd_sum(sums[2]);
}

// Quantizes one vector with VECTOR_LANES lanes, as quantize.metal describes. Lane `lane` holds the
// coordinates k * VECTOR_LANES + lane. `values` are DIM floats of threadgroup memory for these lanes alone.
// `cells` are shared by the threadgroup: the limit above a positive level, and that level. `starts` are search_words
// of threadgroup memory for a trellis code. All threads take part, but only those that are `inside` write results.
template <int DIM, int PATTERN, int ORDER, int POWER, int GAINS, int VECTOR_LANES, bool WEIGHTED, typename X,
          typename Mean, typename Cells, typename Gains, typename Signs, typename Matrix, typename Weights>
METAL_FUNC void quantize_vector(X x, Mean mean, Cells given_cells, Gains gains, Signs signs, Matrix matrix,
    Weights weights, device uint* codes, device bfloat16_t* scale_out, threadgroup float* values,
    threadgroup float2* cells, threadgroup uint* starts, bool inside, int lane, int thread_index, int thread_count) {
  constexpr int COORDINATES = (DIM + VECTOR_LANES - 1) / VECTOR_LANES;
  constexpr bool ALIKE = is_uniform(PATTERN) && !WEIGHTED;
  for (int cell = thread_index; cell < cell_count(PATTERN); cell += thread_count) {
    cells[cell].x = given_cells[2 * cell];
    cells[cell].y = given_cells[2 * cell + 1];
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
  float squared_sum = 0.0f;
  float product = 0.0f;
  float squared_length = 1.0f;
  if constexpr (is_trellis(PATTERN)) {
    encode_stream<DIM, PATTERN, GAINS, WEIGHTED>(values, inverse_rms, gains, weights,
        (const threadgroup float*)cells, starts, lane, squared_sum, product, squared_length);
  } else {
    encode<DIM, PATTERN, GAINS, VECTOR_LANES, WEIGHTED>(values, inverse_rms, gains, weights, cells, lane, squared_sum,
        product, squared_length);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (inside) {
    // <y, y> / <y, q> in units of rms; a vector of zeros has scale 0, and so has one from which the forced levels of a
    // stream point away. With weights it is at most twice that of
    // least squares, so that no error is larger than the vector.
    float scale = product > 0.0f ? squared_sum / product : 0.0f;
    scale = WEIGHTED ? min(scale, 2.0f * product / squared_length) : scale;
    scale *= rms * rsqrt(float(POWER)) * largest;
    scale = isfinite(rms) ? min(scale, 3.3895e38f) : NAN;
    if (lane == 0) {
      scale_out[0] = bfloat16_t(scale);
    }
    for (int w = lane; w < vector_words<DIM, PATTERN>(); w += VECTOR_LANES) {
      if constexpr (is_trellis(PATTERN)) {
        codes[w] = word_of_stream<DIM, PATTERN>((const threadgroup uchar*)(starts + 2 * start_words<DIM>()), w);
      } else if constexpr (is_uniform(PATTERN)) {
        codes[w] = packed_word<DIM, PATTERN & 15>(values, w);
      } else {
        codes[w] = packed_word_by_pattern<PATTERN>(values, w);
      }
    }
  }
}
