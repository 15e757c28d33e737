// Attention of a few query rows over all tokens of a compressed cache, as partial results over splits of
// the tokens; combine.metal joins them.
//
//   queries        (batch, query heads, rows, DIM); below, GROUP_ROWS are the query heads of one key head
//                  times the rows
//   key_codes      uint32 (batch, heads, capacity / 32, WORDS, 32), interleaved
//   key_scales     bfloat16 (batch, heads, capacity), capacity a multiple of 64
//   key_mean       float32 (batch, heads, 1, DIM)
//   value_codes    uint32 (batch, heads, capacity, VALUE_WORDS); with a VALUE_STRIDE of 32 interleaved like
//                  the keys, which they then are (one latent vector a token is key and value)
//   value_scales   bfloat16 (batch, heads, capacity)
//   exact_keys     (batch, heads, exact capacity, DIM), exact_values likewise with VALUE_DIM
//   constants      float32: the factor of the scores (8 numbers, the first counts), levels of the keys, of
//                  the values, signs and matrix of the rotation of the keys, see rotation.h
//   sizes          int32 (8 + 3, or 8 + 3 for each sequence), see below
//   mask           with MASK_ARRAY: bool or float (batch or 1, query heads or 1, rows, tokens)
//   partial        float32 (batch * heads * GROUP_ROWS, splits, VALUE_DIM + 2): output, maximum and sum;
//                  the maximum is a reference for the exponentials that no score exceeds by much
//
// Tokens are ordered: sinks, packed tokens, recent tokens. Sequences may differ in length: each has its
// numbers of packed tokens and sinks, and the place in the exact buffers where its recent tokens begin;
// all end at the same place. What lies between belongs to no token.
//
// The first `packed_splits` splits share the
// packed ones and work in rotated coordinates, for which the queries are rotated here. The others take
// the exact ones, sinks and recent, in the original coordinates; they are short and start last.
//
// A threadgroup is one split of one key head, and ROWS of its query rows, so that a code is unpacked
// once for all of them. Each of its SIMDS SIMD groups takes every SIMDS-th block of tokens: 64 packed
// ones, or 8 exact ones, fewer because their loads are not ahead of their use. For the scores a lane
// takes two packed tokens: 32 lanes read 32 consecutive words, a query is read once for both, and no
// sum crosses lanes. For the values a lane takes runs of eight coordinates of every AT_ONCE-th token,
// with the weights from threadgroup memory.
//
// The time goes into arithmetic, not memory: levels, products and short sums (64 coordinates, 32 tokens)
// are pairs of halves, longer sums are floats. Rounding adds .1 % of a score's standard deviation,
// far below the noise of the codes. Words are loaded a step ahead of their use.

constexpr int BLOCK_TOKENS = 64;
constexpr int EXACT_TOKENS = 8;
constexpr int CHUNKS = (DIM + 63) / 64;
constexpr int PADDED = CHUNKS * 64;
constexpr int PIECES = (VALUE_DIM + 255) / 256;
constexpr int VALUE_LANES = VALUE_DIM <= 64 ? 8 : (VALUE_DIM <= 128 ? 16 : 32);
constexpr int AT_ONCE = 32 / VALUE_LANES;
constexpr int STEPS = BLOCK_TOKENS / AT_ONCE;
constexpr int HALF_STEPS = STEPS < 32 ? STEPS : 32;
constexpr int BATCH = 16;
constexpr int HALF_BATCH = BATCH / 2;
constexpr int PLANES = plane_count<VALUE_BITS>();
constexpr int BATCH_WORDS = BATCH * PIECES * PLANES;
constexpr int words = vector_words<DIM, KEY_BITS>();
constexpr int value_words = vector_words<VALUE_DIM, VALUE_BITS>();
constexpr int VALUE_LEVELS = 8 + level_count<KEY_BITS>();
constexpr int SIGNS = VALUE_LEVELS + level_count<VALUE_BITS>();
constexpr int OUTPUTS = SIMDS * ROWS * VALUE_DIM;
threadgroup float scratch[ROWS * PADDED > OUTPUTS ? ROWS * PADDED : OUTPUTS];
threadgroup uint4 query_pairs[ROWS * PADDED / 8];
threadgroup uint4 weights[SIMDS * BLOCK_TOKENS * ROWS / 4];
threadgroup float exact_scores[SIMDS * EXACT_TOKENS * ROWS];
threadgroup float mean_scores[ROWS];
threadgroup float factors[ROWS];
threadgroup float maxima[SIMDS * ROWS];
threadgroup float sums[SIMDS * ROWS];
threadgroup half key_table[level_count<KEY_BITS>()];
threadgroup half value_table[level_count<VALUE_BITS>()];

// Shapes are at hand at once, `sizes` only after a load: first words are under way before they arrive.
const int heads = int(exact_keys_shape[1]);
const int rows = int(queries_shape[2]);
const int group_rows = int(queries_shape[1]) / heads * rows;
const int capacity = int(key_scales_shape[2]);
const int exact_capacity = int(exact_keys_shape[2]);

const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.x);
const int split = int(threadgroup_position_in_grid.y);
const int first_row = int(threadgroup_position_in_grid.z) * ROWS;
const int part = lane / VALUE_LANES;
const int first_coordinate = lane % VALUE_LANES * 8;

device const uint* head_keys = key_codes + long(head) * (capacity / 32) * words * 32 + lane;
device const uint* head_values = value_codes + long(head) * capacity * value_words;
const int last_block = capacity / BLOCK_TOKENS - 1;
device const uint* block_keys[2];
uint key_words[4 * KEY_BITS];
uint words_of_values[BATCH_WORDS];
for (int t = 0; t < 2; t++) {
  block_keys[t] = head_keys + long(min(split * SIMDS + simd, last_block) * 2 + t) * words * 32;
  load_half_chunk<DIM, KEY_BITS>(key_words + 2 * KEY_BITS * t, block_keys[t], 0, 0);
}
for (int b = 0; b < HALF_BATCH; b++) {
  const int token = min(split * SIMDS + simd, last_block) * BLOCK_TOKENS + b * AT_ONCE + part;
  load_pieces<VALUE_DIM, VALUE_BITS, VALUE_STRIDE, PIECES, VALUE_LANES>(
      words_of_values + b * PIECES * PLANES,
      head_values + token_start<value_words, VALUE_STRIDE>(token), first_coordinate);
}

const int exact_count = sizes[0];
const int splits = sizes[1];
const int packed_splits = sizes[2];
// Columns of the mask: sinks, then packed tokens, then recent ones, shifted from their place.
const int sink_columns = sizes[3];
const int recent_shift = sizes[4];
const int mask_batch_stride = sizes[5];
const int mask_head_stride = sizes[6];
const int mask_row_stride = sizes[7];
const int span = sizes_shape[0] > 11 ? 8 + head / heads * 3 : 8;
const int packed_count = sizes[span];
const int sink_count = sizes[span + 1];
const int first_recent = sizes[span + 2];
const int last_column = exact_count + recent_shift - 1;
const bool exact = split >= packed_splits;

half2 key_coefficients[4];
half2 value_coefficients[4];
const int thread_index = simd * 32 + lane;
const float key_unit = prepare_levels<KEY_BITS>(
    constants + 8, key_coefficients, key_table, thread_index, SIMDS * 32);
const float value_unit = prepare_levels<VALUE_BITS>(
    constants + VALUE_LEVELS, value_coefficients, value_table, thread_index, SIMDS * 32);

// The queries: scaled, and for packed tokens rotated and halved. Rows behind the last one are zeros.
// Halves hold a query in units of its norm, whatever that is.
for (int r = simd; r < ROWS; r += SIMDS) {
  float mean_score = 0.0f;
  float squared_norm = 0.0f;
#pragma unroll
  for (int k = 0; k < PADDED / 32; k++) {
    const int i = k * 32 + lane;
    const int at = min(i, DIM - 1);
    const long row = long(head) * group_rows + min(first_row + r, group_rows - 1);
    const bool used = i < DIM && first_row + r < group_rows;
    const float query = float(queries[row * DIM + at]) * constants[0];
    const float value = used ? query : 0.0f;
    mean_score += value * key_mean[long(head) * DIM + at];
    squared_norm += value * value;
    scratch[r * PADDED + i] = exact ? value : value * constants[SIGNS + at];
  }
  mean_score = simd_sum(mean_score);
  const float norm = sqrt(simd_sum(squared_norm));
  if (lane == 0) {
    mean_scores[r] = mean_score;
    factors[r] = norm * rsqrt(float(DIM)) * key_unit;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (!exact) {
    butterflies<DIM, POWER>(scratch + r * PADDED, uint(lane));
    const float unit = norm > 0.0f ? sqrt(float(DIM)) * rsqrt(float(POWER)) / norm : 0.0f;
    for (int i = lane; i < PADDED / 8; i += 32) {
      float value[8];
      for (int j = 0; j < 8; j++) {
        value[j] = i * 8 + j < DIM
            ? unit * matrix_row<ORDER, POWER, false>(
                  constants + SIGNS + DIM, scratch + r * PADDED, i * 8 + j)
            : 0.0f;
      }
      query_pairs[r * PADDED / 8 + i] = eight_halves(value);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float output[ROWS * PIECES * 8];
float largest[ROWS];
float total[ROWS];
for (int r = 0; r < ROWS; r++) {
  largest[r] = -1e30f;
  total[r] = 0.0f;
  for (int k = 0; k < PIECES * 8; k++) {
    output[r * PIECES * 8 + k] = 0.0f;
  }
}

const int token_count = exact ? exact_count : packed_count;
const int block_size = exact ? EXACT_TOKENS : BLOCK_TOKENS;
const int first_block = (exact ? split - packed_splits : split) * SIMDS + simd;
const int block_step = (exact ? splits - packed_splits : packed_splits) * SIMDS;
for (int block = first_block; block * block_size < token_count; block += block_step) {
  const int first_token = block * block_size;
  float scores[2 * ROWS];
  float value_log[2];
  float inverse_value_scale[2];
  if (!exact) {
    bfloat16_t key_scale[2];
    bfloat16_t value_scale[2];
    for (int t = 0; t < 2; t++) {
      const long token = long(head) * capacity + first_token + t * 32 + lane;
      key_scale[t] = key_scales[token];
      value_scale[t] = value_scales[token];
    }
    for (int i = 0; i < 2 * ROWS; i++) {
      scores[i] = 0.0f;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      half2 products[2 * ROWS];
      for (int i = 0; i < 2 * ROWS; i++) {
        products[i] = half2(half(0.0f));
      }
#pragma unroll
      for (int j = 0; j < 8; j++) {
        // The words of the other half are loaded while those of this one are used.
        if (j == 4 && chunk + 1 == CHUNKS) {
          for (int t = 0; t < 2; t++) {
            block_keys[t] = head_keys + long(min(block + block_step, last_block) * 2 + t) * words * 32;
          }
        }
        if (j % 4 == 0) {
          const int next_chunk = chunk + j / 4 < CHUNKS ? chunk + j / 4 : 0;
          for (int t = 0; t < 2; t++) {
            load_half_chunk<DIM, KEY_BITS>(
                key_words + 2 * KEY_BITS * t, block_keys[t], next_chunk, 1 - j / 4);
          }
        }
        half2 levels[8];
        for (int t = 0; t < 2; t++) {
          for (int k = 0; k < 4; k++) {
            levels[t * 4 + k] = level_pair<KEY_BITS>(key_coefficients, key_table,
                code_pair<64, KEY_BITS>(key_words + 2 * KEY_BITS * t, j * 4 + k));
          }
        }
        for (int r = 0; r < ROWS; r++) {
          const uint4 pairs = query_pairs[(r * CHUNKS + chunk) * 8 + j];
          for (int t = 0; t < 2; t++) {
            half2 sum = products[t * ROWS + r];
            sum = fma(levels[t * 4], as_type<half2>(pairs.x), sum);
            sum = fma(levels[t * 4 + 1], as_type<half2>(pairs.y), sum);
            sum = fma(levels[t * 4 + 2], as_type<half2>(pairs.z), sum);
            products[t * ROWS + r] = fma(levels[t * 4 + 3], as_type<half2>(pairs.w), sum);
          }
        }
      }
      for (int i = 0; i < 2 * ROWS; i++) {
        scores[i] += float(products[i].x + products[i].y);
      }
    }
    for (int t = 0; t < 2; t++) {
      value_log[t] = log(max(float(value_scale[t]), 1e-20f));
      inverse_value_scale[t] = exp(-value_log[t]);
      for (int r = 0; r < ROWS; r++) {
        scores[t * ROWS + r] = scores[t * ROWS + r] * (float(key_scale[t]) * factors[r]) + mean_scores[r];
      }
    }
  } else {
    // Eight lanes take one token, so that neighbours read neighbours.
#pragma unroll
    for (int first = 0; first < EXACT_TOKENS; first += 4) {
      const int token = min(first_token + first + lane / 8, exact_count - 1);
      device const KEY_T* exact_key = exact_keys + (long(head) * exact_capacity + token) * DIM;
      float products[ROWS];
      for (int r = 0; r < ROWS; r++) {
        products[r] = 0.0f;
      }
#pragma unroll
      for (int i = lane % 8; i < DIM; i += 8) {
        const float key = float(exact_key[i]);
        for (int r = 0; r < ROWS; r++) {
          products[r] += key * scratch[r * PADDED + i];
        }
      }
      for (int r = 0; r < ROWS; r++) {
        const float score = shared_sum<8>(products[r]);
        if (lane % 8 == 0) {
          exact_scores[(simd * EXACT_TOKENS + first + lane / 8) * ROWS + r] = score;
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int t = 0; t < 2; t++) {
      value_log[t] = 0.0f;
      inverse_value_scale[t] = 1.0f;
      for (int r = 0; r < ROWS; r++) {
        scores[t * ROWS + r] = t == 0 && lane < EXACT_TOKENS
            ? exact_scores[(simd * EXACT_TOKENS + lane) * ROWS + r]
            : 0.0f;
      }
    }
  }

  // From here on `scores` of tokens that a row does not see are -inf.
  float excess = -INFINITY;
  for (int t = 0; t < 2; t++) {
    const int token = first_token + t * 32 + lane;
    bool inside = t * 32 + lane < block_size && token < token_count;
    int column = token;
    if (exact) {
      inside = inside && (token < sink_count || token >= first_recent);
      column += token < sink_count ? 0 : recent_shift;
    } else {
      column += sink_columns;
    }
    for (int r = 0; r < ROWS; r++) {
      const int row = (first_row + r) % rows;
      float score = scores[t * ROWS + r];
      bool visible = inside && (MASK < 2 || first_row + r < group_rows);
      if (MASK == 1) {
        visible = visible && column <= last_column + 1 - rows + row;
      }
#if MASK_ARRAY
      if (visible) {
        const long at = long(head / heads) * mask_batch_stride +
            long(head % heads * (group_rows / rows) + (first_row + r) / rows) * mask_head_stride +
            long(row) * mask_row_stride + column;
        if (MASK == 2) {
          visible = float(mask[at]) != 0.0f;
        } else {
          score += float(mask[at]);
        }
      }
#endif
      // The value's scale counts as a part of the weight, which then fits a half.
      score = visible ? score + value_log[t] : -INFINITY;
      scores[t * ROWS + r] = score;
      excess = max(excess, score - largest[r]);
    }
  }
  // A new reference is rarely needed once the first blocks have been seen.
  if (simd_any(excess > 4.0f)) {
    for (int r = 0; r < ROWS; r++) {
      const float maximum = max(largest[r], simd_max(max(scores[r], scores[ROWS + r])));
      const float correction = exp(largest[r] - maximum);
      largest[r] = maximum;
      total[r] *= correction;
      for (int k = 0; k < PIECES * 8; k++) {
        output[r * PIECES * 8 + k] *= correction;
      }
    }
  }
  for (int t = 0; t < 2; t++) {
    uint pairs[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const float weight = exp(scores[t * ROWS + r] - largest[r]);
      total[r] += weight * inverse_value_scale[t];
      pairs[r] = exact ? as_type<uint>(weight) : as_type<uint>(half2(half(weight)));
    }
    if (t * 32 + lane < block_size) {
      store_words<ROWS>(weights, (simd * BLOCK_TOKENS + t * 32 + lane) * ROWS, pairs);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  if (!exact) {
    for (int half_step = 0; half_step < STEPS; half_step += HALF_STEPS) {
      half2 products[ROWS * PIECES * 4];
      for (int i = 0; i < ROWS * PIECES * 4; i++) {
        products[i] = half2(half(0.0f));
      }
#pragma unroll 1
      for (int step = half_step; step < half_step + HALF_STEPS; step += BATCH) {
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          if (b % HALF_BATCH == 0) {
            const int next_step = step + b + HALF_BATCH;
            const int token = next_step < STEPS
                ? first_token + next_step * AT_ONCE
                : min(block + block_step, last_block) * BLOCK_TOKENS;
            for (int i = 0; i < HALF_BATCH; i++) {
              const int start = token_start<value_words, VALUE_STRIDE>(token + i * AT_ONCE + part);
              load_pieces<VALUE_DIM, VALUE_BITS, VALUE_STRIDE, PIECES, VALUE_LANES>(
                  words_of_values + ((b + HALF_BATCH) % BATCH + i) * PIECES * PLANES,
                  head_values + start, first_coordinate);
            }
          }
          uint pairs[ROWS];
          load_words<ROWS>(
              weights, (simd * BLOCK_TOKENS + (step + b) * AT_ONCE + part) * ROWS, pairs);
          for (int piece = 0; piece < PIECES; piece++) {
            for (int k = 0; k < 4; k++) {
              const half2 level = level_pair<VALUE_BITS>(value_coefficients, value_table,
                  code_pair<8, VALUE_BITS>(words_of_values + (b * PIECES + piece) * PLANES, k));
              for (int r = 0; r < ROWS; r++) {
                const int at = (r * PIECES + piece) * 4 + k;
                products[at] = fma(level, as_type<half2>(pairs[r]), products[at]);
              }
            }
          }
        }
      }
      for (int i = 0; i < ROWS * PIECES * 4; i++) {
        output[2 * i] += float(products[i].x);
        output[2 * i + 1] += float(products[i].y);
      }
    }
  } else {
#pragma unroll
    for (int t = part; t < EXACT_TOKENS; t += AT_ONCE) {
      const int token = min(first_token + t, exact_count - 1);
      device const VALUE_T* exact_value =
          exact_values + (long(head) * exact_capacity + token) * VALUE_DIM;
      uint pairs[ROWS];
      load_words<ROWS>(weights, (simd * BLOCK_TOKENS + t) * ROWS, pairs);
      for (int k = 0; k < PIECES * 8; k++) {
        const int i = first_coordinate + k / 8 * VALUE_LANES * 8 + k % 8;
        float value = 0.0f;
        if (i < VALUE_DIM) {
          value = float(exact_value[i]);
        }
        for (int r = 0; r < ROWS; r++) {
          output[r * PIECES * 8 + k] += as_type<float>(pairs[r]) * value;
        }
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The lanes that share coordinates, and then the SIMD groups, are joined.
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int r = 0; r < ROWS; r++) {
  const float row_total = simd_sum(total[r]);
  if (lane == 0) {
    maxima[simd * ROWS + r] = largest[r];
    sums[simd * ROWS + r] = row_total;
  }
  for (int k = 0; k < PIECES * 8; k++) {
    float sum = output[r * PIECES * 8 + k];
    for (int step = VALUE_LANES; step < 32; step *= 2) {
      sum += simd_shuffle_xor(sum, ushort(step));
    }
    const int i = first_coordinate + k / 8 * VALUE_LANES * 8 + k % 8;
    if (part == 0 && i < VALUE_DIM) {
      scratch[(simd * ROWS + r) * VALUE_DIM + i] = exact ? sum : sum * value_unit;
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
        sum += weight * scratch[(s * ROWS + r) * VALUE_DIM + i];
      }
      partial[at * (VALUE_DIM + 2) + i] = sum;
    }
    if (lane == 0) {
      float sum = 0.0f;
      for (int s = 0; s < SIMDS; s++) {
        sum += exp(maxima[s * ROWS + r] - maximum) * sums[s * ROWS + r];
      }
      partial[at * (VALUE_DIM + 2) + VALUE_DIM] = maximum;
      partial[at * (VALUE_DIM + 2) + VALUE_DIM + 1] = sum;
    }
  }
}
