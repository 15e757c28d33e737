// Attention of a few query rows over all tokens of a compressed cache, as partial results over splits of
// the tokens; combine.metal joins them.
//
//   queries        (batch * heads, GROUP_ROWS, DIM): heads of keys; GROUP_ROWS = query heads of one key
//                  head times query rows of a sequence (the last `rows` in the order of MLX)
//   key_codes      uint32 (batch * heads, capacity / 32, WORDS, 32), interleaved
//   key_scales     bfloat16 (batch * heads, capacity)
//   key_mean       float32 (batch * heads, DIM)
//   value_codes    uint32 (batch * heads, capacity, VALUE_WORDS)
//   value_scales   bfloat16 (batch * heads, capacity)
//   exact_keys     (batch * heads, exact_capacity, DIM), exact_values likewise with VALUE_DIM
//   key_levels, value_levels   float32, see level_of in codec.h
//   signs, matrix  of the rotation of the keys, see codec.h
//   mask           bool or float (batch or 1, query heads or 1, rows, tokens), unused without MASK
//   scale          float32 (1), factor of the scores
//   sizes          int32 (12), see below
//   partial_out    float32 (batch * heads * GROUP_ROWS, splits, VALUE_DIM)
//   partial_max, partial_sum   float32 (batch * heads * GROUP_ROWS, splits)
//
// Tokens are ordered: sinks, packed tokens, recent tokens. Split 0 takes the exact ones, sinks and
// recent, in the original coordinates; the others share the packed ones and work in rotated
// coordinates, for which the queries are rotated here.
//
// A threadgroup is one split of one key head, and ROWS of its query rows, so that a code is unpacked
// once for all of them. Each of its SIMDS SIMD groups takes every SIMDS-th block of 32 tokens. For
// the scores a lane takes one token: 32 lanes read 32 consecutive words and no sum crosses lanes. For
// the values a lane takes COORDINATES coordinates and the weights come from threadgroup memory.

constexpr int PADDED = (DIM + 31) / 32 * 32;
constexpr int COORDINATES = (VALUE_DIM + 31) / 32;
constexpr int words = vector_words<DIM, KEY_BITS>();
constexpr int value_words = vector_words<VALUE_DIM, VALUE_BITS>();
threadgroup float query[ROWS * PADDED];
threadgroup float mean_scores[ROWS];
threadgroup float weights[SIMDS * ROWS * 32];
threadgroup float outputs[SIMDS * ROWS * VALUE_DIM];
threadgroup float maxima[SIMDS * ROWS];
threadgroup float sums[SIMDS * ROWS];

const int group_rows = sizes[0];
const int rows = sizes[1];
const int packed_count = sizes[2];
const int capacity = sizes[3];
const int exact_count = sizes[4];
const int exact_capacity = sizes[5];
const int sink_count = sizes[6];
const int splits = sizes[7];
const int heads = sizes[8];
const int mask_batch_stride = sizes[9];
const int mask_head_stride = sizes[10];
const int mask_row_stride = sizes[11];

const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int split = int(threadgroup_position_in_grid.x);
const int head = int(threadgroup_position_in_grid.y);
const int first_row = int(threadgroup_position_in_grid.z) * ROWS;
const int last_token = exact_count + packed_count - 1;

// The queries: scaled, and rotated for packed tokens. Rows behind the last one are zeros.
for (int r = simd; r < ROWS; r += SIMDS) {
  float mean_score = 0.0f;
  for (int i = lane; i < PADDED; i += 32) {
    float value = 0.0f;
    if (i < DIM && first_row + r < group_rows) {
      value = float(queries[(long(head) * group_rows + first_row + r) * DIM + i]) * scale[0];
      mean_score += value * key_mean[long(head) * DIM + i];
      value *= split == 0 ? 1.0f : signs[i];
    }
    query[r * PADDED + i] = value;
  }
  mean_score = simd_sum(mean_score);
  if (lane == 0) {
    mean_scores[r] = mean_score;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (split > 0) {
    butterflies<DIM, POWER>(query + r * PADDED, uint(lane));
    float rotated[PADDED / 32];
    for (int k = 0; k < PADDED / 32; k++) {
      int i = k * 32 + lane;
      rotated[k] = i < DIM
          ? matrix_row<ORDER, POWER, false>(matrix, query + r * PADDED, i) * rsqrt(float(POWER))
          : 0.0f;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < PADDED / 32; k++) {
      query[r * PADDED + k * 32 + lane] = rotated[k];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float output[ROWS * COORDINATES];
float largest[ROWS];
float total[ROWS];
for (int r = 0; r < ROWS; r++) {
  largest[r] = -1e30f;
  total[r] = 0.0f;
  for (int k = 0; k < COORDINATES; k++) {
    output[r * COORDINATES + k] = 0.0f;
  }
}

const int token_count = split == 0 ? exact_count : packed_count;
const int first_block = split == 0 ? simd : (split - 1) * SIMDS + simd;
const int block_step = split == 0 ? SIMDS : (splits - 1) * SIMDS;
for (int block = first_block; block * 32 < token_count; block += block_step) {
  const int token = block * 32 + lane;
  const bool inside = token < token_count;
  float scores[ROWS];
  for (int r = 0; r < ROWS; r++) {
    scores[r] = 0.0f;
  }
  float value_scale = 1.0f;
  int column = token;
  if (split > 0) {
    column += sink_count;
    if (inside) {
      const long start = (long(head) * (capacity / 32) + block) * words * 32 + lane;
      for (int i = 0; i < DIM; i++) {
        float level =
            level_of<KEY_BITS>(key_levels, code_at<DIM, KEY_BITS>(key_codes + start, 32, i));
        for (int r = 0; r < ROWS; r++) {
          scores[r] += level * query[r * PADDED + i];
        }
      }
      const float key_scale = float(key_scales[long(head) * capacity + token]);
      value_scale = float(value_scales[long(head) * capacity + token]);
      for (int r = 0; r < ROWS; r++) {
        scores[r] = scores[r] * key_scale + mean_scores[r];
      }
    }
  } else {
    column += token < sink_count ? 0 : packed_count;
    if (inside) {
      for (int i = 0; i < DIM; i++) {
        float key = float(exact_keys[(long(head) * exact_capacity + token) * DIM + i]);
        for (int r = 0; r < ROWS; r++) {
          scores[r] += key * query[r * PADDED + i];
        }
      }
    }
  }

  for (int r = 0; r < ROWS; r++) {
    const int row = (first_row + r) % rows;
    bool visible = inside && first_row + r < group_rows;
    if (MASK == 1) {
      visible = visible && column <= last_token + 1 - rows + row;
    }
    if (MASK > 1 && visible) {
      const long at = long(head / heads) * mask_batch_stride +
          long(head % heads * (group_rows / rows) + (first_row + r) / rows) * mask_head_stride +
          long(row) * mask_row_stride + column;
      if (MASK == 2) {
        visible = float(mask[at]) != 0.0f;
      } else {
        scores[r] += float(mask[at]);
      }
    }
    const float score = visible ? scores[r] : -INFINITY;
    const float maximum = max(largest[r], simd_max(score));
    const float correction = exp(largest[r] - maximum);
    const float weight = visible ? exp(score - maximum) : 0.0f;
    total[r] = total[r] * correction + simd_sum(weight);
    largest[r] = maximum;
    for (int k = 0; k < COORDINATES; k++) {
      output[r * COORDINATES + k] *= correction;
    }
    weights[(simd * ROWS + r) * 32 + lane] = weight * value_scale;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const int tokens = min(32, token_count - block * 32);
  for (int t = 0; t < tokens; t++) {
    const int from = block * 32 + t;
    for (int k = 0; k < COORDINATES; k++) {
      const int i = lane * COORDINATES + k;
      float value = 0.0f;
      if (i < VALUE_DIM) {
        if (split > 0) {
          const long start = (long(head) * capacity + from) * value_words;
          value = level_of<VALUE_BITS>(
              value_levels, code_at<VALUE_DIM, VALUE_BITS>(value_codes + start, 1, i));
        } else {
          value = float(exact_values[(long(head) * exact_capacity + from) * VALUE_DIM + i]);
        }
      }
      for (int r = 0; r < ROWS; r++) {
        output[r * COORDINATES + k] += weights[(simd * ROWS + r) * 32 + t] * value;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The SIMD groups of the threadgroup are joined in threadgroup memory.
for (int r = 0; r < ROWS; r++) {
  if (lane == 0) {
    maxima[simd * ROWS + r] = largest[r];
    sums[simd * ROWS + r] = total[r];
  }
  for (int k = 0; k < COORDINATES; k++) {
    const int i = lane * COORDINATES + k;
    if (i < VALUE_DIM) {
      outputs[(simd * ROWS + r) * VALUE_DIM + i] = output[r * COORDINATES + k];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int r = simd; r < ROWS; r += SIMDS) {
  if (first_row + r < group_rows) {
    const long at = (long(head) * group_rows + first_row + r) * splits + split;
    float maximum = maxima[r];
    for (int s = 1; s < SIMDS; s++) {
      maximum = max(maximum, maxima[s * ROWS + r]);
    }
    for (int i = lane; i < VALUE_DIM; i += 32) {
      float sum = 0.0f;
      for (int s = 0; s < SIMDS; s++) {
        const float weight = exp(maxima[s * ROWS + r] - maximum);
        sum += weight * outputs[(s * ROWS + r) * VALUE_DIM + i];
      }
      partial_out[at * VALUE_DIM + i] = sum;
    }
    if (lane == 0) {
      float sum = 0.0f;
      for (int s = 0; s < SIMDS; s++) {
        sum += exp(maxima[s * ROWS + r] - maximum) * sums[s * ROWS + r];
      }
      partial_max[at] = maximum;
      partial_sum[at] = sum;
    }
  }
}
