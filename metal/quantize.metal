// Dense vectors to packed ones: subtract the mean, rotate, find the gain with the largest cosine,
// encode, pack, and scale so that inner products are unbiased.
//
//   x           T (rows, count, DIM)
//   mean        float32 (rows, DIM)
//   levels      float32, see level_of in codec.h
//   thresholds  float32 (2^BITS - 1), ascending
//   gains       float32 (GAINS)
//   signs       float32 (DIM), of the randomized Hadamard matrix; ones for a dense rotation
//   matrix      float32 (ORDER, ORDER), see matrix_row in codec.h
//   sizes       int32 (1): count
//   codes       uint32 (rows, count, WORDS)
//   scales      bfloat16 (rows, count)
//
// A row is one head of one sequence; WORDS is vector_words<DIM, BITS>().
//
// One SIMD group quantizes one vector: every step but the packing is a sum over its coordinates,
// which lie in registers, COORDINATES to a lane, after the rotation in threadgroup memory. The codes
// go back to threadgroup memory, where a lane collects the fields of a whole word.

constexpr int COORDINATES = (DIM + 31) / 32;
constexpr int words = vector_words<DIM, BITS>();
threadgroup float values[GROUPS * DIM];

const int count = sizes[0];
const int lane = int(thread_index_in_simdgroup);
const int group = int(simdgroup_index_in_threadgroup);
const int vector = int(threadgroup_position_in_grid.x) * GROUPS + group;
const int row = vector / count;
const bool inside = row < int(x_shape[0]);

// Largest value first: no square of x / largest overflows or vanishes.
float coordinates[COORDINATES];
float largest = 0.0f;
bool finite = true;
for (int k = 0; k < COORDINATES; k++) {
  int i = k * 32 + lane;
  float value = 0.0f;
  if (inside && i < DIM) {
    value = float(x[long(vector) * DIM + i]) - mean[long(row) * DIM + i];
  }
  coordinates[k] = value;
  finite = finite && isfinite(value);
  largest = max(largest, abs(value));
}
finite = simd_sum(finite ? 0 : 1) == 0;
largest = simd_max(largest);
for (int k = 0; k < COORDINATES; k++) {
  int i = k * 32 + lane;
  if (i < DIM) {
    values[group * DIM + i] = largest == 0.0f ? 0.0f : coordinates[k] / largest * signs[i];
  }
}
simdgroup_barrier(mem_flags::mem_threadgroup);
butterflies<DIM, POWER>(values + group * DIM, uint(lane));
float squared_norm = 0.0f;
for (int k = 0; k < COORDINATES; k++) {
  int i = k * 32 + lane;
  coordinates[k] = i < DIM
      ? matrix_row<ORDER, POWER, false>(matrix, values + group * DIM, i) * rsqrt(float(POWER))
      : 0.0f;
  squared_norm += coordinates[k] * coordinates[k];
}
squared_norm = simd_sum(squared_norm);
const float rms = sqrt(squared_norm / float(DIM));

float best_cosine = -INFINITY;
float best_gain = 1.0f;
float best_product = 0.0f;
for (int g = 0; g < GAINS; g++) {
  float product = 0.0f;
  float squared_length = 0.0f;
  for (int k = 0; k < COORDINATES; k++) {
    float y = rms == 0.0f ? 0.0f : coordinates[k] / rms;
    float level = level_of<BITS>(levels, nearest_code<BITS>(thresholds, gains[g] * y));
    if (k * 32 + lane < DIM) {
      product += level * y;
      squared_length += level * level;
    }
  }
  product = simd_sum(product);
  float cosine = product / sqrt(simd_sum(squared_length));
  if (cosine > best_cosine) {
    best_cosine = cosine;
    best_gain = gains[g];
    best_product = product;
  }
}

// All lanes have read the rotated values: the same memory takes the codes.
simdgroup_barrier(mem_flags::mem_threadgroup);
for (int k = 0; k < COORDINATES; k++) {
  int i = k * 32 + lane;
  if (i < DIM) {
    float y = rms == 0.0f ? 0.0f : coordinates[k] / rms;
    values[group * DIM + i] = float(nearest_code<BITS>(thresholds, best_gain * y));
  }
}
simdgroup_barrier(mem_flags::mem_threadgroup);
if (inside) {
  // <y, y> / <y, q> in units of rms; a vector of zeros has scale 0.
  float scale = best_product == 0.0f ? 0.0f : float(DIM) / best_product * rms * largest;
  scale = finite ? min(scale, 3.3895e38f) : NAN;
  if (lane == 0) {
    scales[vector] = bfloat16_t(scale);
  }
  for (int w = lane; w < words; w += 32) {
    codes[long(vector) * words + w] = packed_word<DIM, BITS>(values + group * DIM, w);
  }
}
