// Shared by all kernels: how the code of a coordinate is found in packed words, what level a code
// stands for, and how a vector is rotated. README.md in this folder describes the layout.

// uint32 words of a plane of WIDTH bits for DIM coordinates.
template <int DIM, int WIDTH>
METAL_FUNC constexpr int plane_words() {
  return (DIM * WIDTH + 31) / 32;
}

// Width of the first plane of a code of BITS bits: 4, 2 or 1.
template <int BITS>
METAL_FUNC constexpr int first_plane() {
  return BITS >= 4 ? 4 : (BITS >= 2 ? 2 : 1);
}

// uint32 words of DIM codes of BITS bits.
template <int DIM, int BITS>
METAL_FUNC constexpr int vector_words() {
  constexpr int width = first_plane<BITS>();
  if constexpr (BITS > width) {
    return plane_words<DIM, width>() + vector_words<DIM, BITS - width>();
  } else {
    return plane_words<DIM, width>();
  }
}

// Where coordinate i of a plane of WIDTH bits lies: the shift of its field in word i * WIDTH / 32.
template <int WIDTH>
METAL_FUNC constexpr uint field_shift(int i) {
  return uint((i % (32 / WIDTH)) / 2 * WIDTH + i % 2 * 16);
}

// The code of coordinate i. Words of one vector are `stride` apart: 32 where tokens are interleaved.
template <int DIM, int BITS, typename Words>
METAL_FUNC uint code_at(Words words, int stride, int i) {
  constexpr int width = first_plane<BITS>();
  uint field = (words[i * width / 32 * stride] >> field_shift<width>(i)) & ((1u << width) - 1u);
  if constexpr (BITS > width) {
    uint rest = code_at<DIM, BITS - width>(words + plane_words<DIM, width>() * stride, stride, i);
    return (field << (BITS - width)) | rest;
  } else {
    return field;
  }
}

// The level of a code. Up to 4 bits `levels` begins with the three coefficients of the odd polynomial,
// so that no divergent load is needed, and level_pair takes the five after them; above it is the table
// of all levels.
template <int BITS, typename Levels>
METAL_FUNC float level_of(Levels levels, uint code) {
  if constexpr (BITS <= 4) {
    // The code goes into the mantissa of 2^23, which is faster than a conversion.
    float x = as_type<float>(0x4B000001u | (code << 1)) - (8388608.0f + float(1 << BITS));
    float squared = x * x;
    return x * (levels[0] + squared * (levels[1] + squared * levels[2]));
  } else {
    return levels[code];
  }
}

// Planes of a code of BITS bits.
template <int BITS>
METAL_FUNC constexpr int plane_count() {
  constexpr int width = first_plane<BITS>();
  if constexpr (BITS > width) {
    return 1 + plane_count<BITS - width>();
  } else {
    return 1;
  }
}

// Loads one half (0 or 1) of a chunk of an interleaved vector: of the 2 * BITS words, plane after plane,
// of the coordinates 64 * chunk to 64 * chunk + 63. Behind the last coordinate there are zeros.
template <int DIM, int BITS>
METAL_FUNC void load_half_chunk(thread uint* out, const device uint* words, int chunk, int half_index) {
  constexpr int width = first_plane<BITS>();
  constexpr int count = plane_words<DIM, width>();
  const device uint* first = words + chunk * 2 * width * 32;
  for (int j = half_index * width; j < (half_index + 1) * width; j++) {
    out[j] = DIM % 64 == 0 || chunk * 2 * width + j < count ? first[j * 32] : 0u;
  }
  if constexpr (BITS > width) {
    load_half_chunk<DIM, BITS - width>(out + 2 * width, words + count * 32, chunk, half_index);
  }
}

// Where the words of a token begin; STRIDE, 1 or 32 (interleaved), lies between them.
template <int WORDS, int STRIDE>
METAL_FUNC int token_start(int token) {
  return STRIDE == 1 ? token * WORDS : token / 32 * (WORDS * 32) + token % 32;
}

// Loads the codes of the coordinates i to i + 7, a word of each plane; i is a multiple of eight.
template <int DIM, int BITS, int STRIDE>
METAL_FUNC void load_eight(thread uint* out, const device uint* words, int i) {
  constexpr int width = first_plane<BITS>();
  out[0] = words[i * width / 32 * STRIDE] >> field_shift<width>(i);
  if constexpr (BITS > width) {
    load_eight<DIM, BITS - width, STRIDE>(out + 1, words + plane_words<DIM, width>() * STRIDE, i);
  }
}

// load_eight for PIECES runs of coordinates of a token, 8 * LANES apart. Lanes behind the last
// coordinate read the first ones in their place.
template <int DIM, int BITS, int STRIDE, int PIECES, int LANES>
METAL_FUNC void load_pieces(thread uint* out, const device uint* words, int coordinate) {
  for (int piece = 0; piece < PIECES; piece++) {
    const int i = coordinate + piece * LANES * 8;
    load_eight<DIM, BITS, STRIDE>(
        out + piece * plane_count<BITS>(), words, DIM % (8 * LANES) == 0 || i < DIM ? i : 0);
  }
}

// The codes of coordinates 2 * pair and 2 * pair + 1, in the low and the high half of a word, from
// the loaded words of COUNT coordinates.
template <int COUNT, int BITS>
METAL_FUNC uint code_pair(const thread uint* words, int pair) {
  constexpr int width = first_plane<BITS>();
  constexpr uint mask = ((1u << width) - 1u) * 0x00010001u;
  const uint field = (words[pair * 2 * width / 32] >> field_shift<width>(pair * 2)) & mask;
  if constexpr (BITS > width) {
    constexpr int count = plane_words<COUNT, width>();
    return (field << (BITS - width)) | code_pair<COUNT, BITS - width>(words + count, pair);
  } else {
    return field;
  }
}

// Numbers in the array of levels, and room for its table in threadgroup memory, unused up to 4 bits.
template <int BITS>
METAL_FUNC constexpr int level_count() {
  return BITS <= 4 ? 8 : 1 << BITS;
}

// What level_pair needs, from the levels of level_of: four coefficients, or the table, which `count`
// threads write. Returns the unit in which level_pair gives levels.
template <int BITS, typename Levels>
METAL_FUNC float prepare_levels(
    Levels levels, thread half2* coefficients, threadgroup half* table, int index, int count) {
  if constexpr (BITS <= 4) {
    for (int k = 0; k < 4; k++) {
      coefficients[k] = half2(half(levels[3 + k]));
    }
    return levels[7];
  } else {
    for (int i = index; i < 1 << BITS; i += count) {
      table[i] = half(levels[i]);
    }
    return 1.0f;
  }
}

// The levels of a pair of codes as halves. Up to 4 bits the codes are put into the mantissas of
// two halves, 2^(7-BITS) * (1 + code / 64): no conversion, and x / 2^BITS is a subtraction away. That
// power of two comes with the levels, because a mask and an exponent that are both known to the
// compiler cost NVIDIA two instructions. For 3 and 4 bits x (a + b x^2 + c x^4) is computed as
// c x ((x^2 + q)^2 + p), one operation less, and in units of c; _half_coefficients in kernels.py has
// q and p.
template <int BITS>
METAL_FUNC half2 level_pair(
    const thread half2* coefficients, const threadgroup half* table, uint codes) {
  if constexpr (BITS <= 4) {
    const half2 x = as_type<half2>((codes << 4) | as_type<uint>(coefficients[3])) + coefficients[2];
    if constexpr (BITS == 1) {
      return x * coefficients[0];
    } else if constexpr (BITS == 2) {
      return x * fma(x * x, coefficients[1], coefficients[0]);
    } else {
      const half2 sum = fma(x, x, coefficients[0]);
      return x * fma(sum, sum, coefficients[1]);
    }
  } else {
    return half2(table[codes & 0xFFFFu], table[codes >> 16]);
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

// COUNT words of threadgroup memory from word `at` on, four in one access where COUNT allows it.
template <int COUNT>
METAL_FUNC void load_words(const threadgroup uint4* words, int at, thread uint* out) {
  if constexpr (COUNT % 4 == 0) {
    for (int k = 0; k < COUNT / 4; k++) {
      const uint4 four = words[at / 4 + k];
      out[4 * k] = four.x;
      out[4 * k + 1] = four.y;
      out[4 * k + 2] = four.z;
      out[4 * k + 3] = four.w;
    }
  } else {
    for (int k = 0; k < COUNT; k++) {
      out[k] = ((const threadgroup uint*)words)[at + k];
    }
  }
}

// The opposite of load_words.
template <int COUNT>
METAL_FUNC void store_words(threadgroup uint4* words, int at, const thread uint* in) {
  if constexpr (COUNT % 4 == 0) {
    for (int k = 0; k < COUNT / 4; k++) {
      uint4 four;
      four.x = in[4 * k];
      four.y = in[4 * k + 1];
      four.z = in[4 * k + 2];
      four.w = in[4 * k + 3];
      words[at / 4 + k] = four;
    }
  } else {
    for (int k = 0; k < COUNT; k++) {
      ((threadgroup uint*)words)[at + k] = in[k];
    }
  }
}

// The Hadamard transform of every run of POWER values of x[DIM], not normalised. Called by all lanes
// of one SIMD group, which alone uses x: a barrier of that group separates the stages.
template <int DIM, int POWER>
METAL_FUNC void butterflies(threadgroup float* x, uint lane) {
  for (int half_run = 1; half_run < POWER; half_run *= 2) {
    for (int pair = int(lane); pair < DIM / 2; pair += 32) {
      int i = pair / half_run * 2 * half_run + pair % half_run;
      float a = x[i];
      float b = x[i + half_run];
      x[i] = a + b;
      x[i + half_run] = a - b;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Coordinate i of the ORDER x ORDER matrix times x, which is ORDER rows of POWER values. ORDER is 1,
// 12, 20 or 28 for a Hadamard rotation, and DIM with POWER 1 for a dense one.
template <int ORDER, int POWER, bool TRANSPOSED, typename Matrix>
METAL_FUNC float matrix_row(Matrix matrix, const threadgroup float* x, int i) {
  if constexpr (ORDER == 1) {
    return x[i];
  } else {
    int row = i / POWER;
    float sum = 0.0f;
    for (int column = 0; column < ORDER; column++) {
      float entry = TRANSPOSED ? matrix[column * ORDER + row] : matrix[row * ORDER + column];
      sum += entry * x[column * POWER + i % POWER];
    }
    return sum;
  }
}

// Copies or writes eight values of a vector, 16 bytes at a time; `out` is a multiple of that.
template <typename T>
METAL_FUNC void copy_eight(const device T* from, device T* out) {
  for (int piece = 0; piece < int(sizeof(T)) / 2; piece++) {
    ((device uint4*)out)[piece] = ((const device uint4*)from)[piece];
  }
}

template <typename T>
METAL_FUNC void store_eight(const thread float* x, device T* out) {
  if constexpr (sizeof(T) == 2) {
    uint pairs[4];
    for (int k = 0; k < 4; k++) {
      const uint low = as_type<ushort>(T(x[2 * k]));
      pairs[k] = low | (uint(as_type<ushort>(T(x[2 * k + 1]))) << 16);
    }
    uint4 all;
    all.x = pairs[0];
    all.y = pairs[1];
    all.z = pairs[2];
    all.w = pairs[3];
    ((device uint4*)out)[0] = all;
  } else {
    for (int k = 0; k < 8; k++) {
      out[k] = T(x[k]);
    }
  }
}

// One token of dequantize.metal by one SIMD group, for any rotation: where it is `packed`, mean +
// R^T (scale * levels) of vector `from` of its row, whose words are STRIDE apart; else the exact vector.
template <int DIM, int BITS, int ORDER, int POWER, int STRIDE, typename Scales, typename Mean,
          typename Constants, typename T>
METAL_FUNC void restore_vector(const device uint* codes, Scales scales, Mean mean, Constants constants,
    const device T* exact, bool packed, int from, device T* out, threadgroup float* values, int lane) {
  if (!packed) {
    for (int i = lane; i < DIM; i += 32) {
      out[i] = exact[long(from) * DIM + i];
    }
    return;
  }
  constexpr int SIGNS = level_count<BITS>();
  const device uint* words = codes + token_start<vector_words<DIM, BITS>(), STRIDE>(from);
  const float scale = float(scales[from]);
  for (int i = lane; i < DIM; i += 32) {
    values[i] = scale * level_of<BITS>(constants, code_at<DIM, BITS>(words, STRIDE, i));
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  butterflies<DIM, POWER>(values, uint(lane));
  const float normalisation = rsqrt(float(POWER));
  for (int i = lane; i < DIM; i += 32) {
    const float value = matrix_row<ORDER, POWER, true>(constants + SIGNS + DIM, values, i);
    out[i] = T(value * normalisation * constants[SIGNS + i] + mean[i]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The Hadamard transform of DIM values, of which this lane has x[COUNT], those from lane * COUNT on; not
// normalised. DIM / COUNT neighbouring lanes share a vector: the first stages are within a lane.
template <int DIM, int COUNT>
METAL_FUNC void lane_butterflies(thread float* x, int lane) {
#pragma unroll
  for (int half_run = 1; half_run < COUNT; half_run *= 2) {
#pragma unroll
    for (int pair = 0; pair < COUNT / 2; pair++) {
      const int i = pair / half_run * 2 * half_run + pair % half_run;
      const float a = x[i];
      const float b = x[i + half_run];
      x[i] = a + b;
      x[i + half_run] = a - b;
    }
  }
#pragma unroll
  for (int step = 1; step < DIM / COUNT; step *= 2) {
    const float sign = (lane & step) == 0 ? 1.0f : -1.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      x[i] = fma(sign, x[i], simd_shuffle_xor(x[i], ushort(step)));
    }
  }
}

// Tokens `first` to `last` - 1 of a row of dequantize.metal by one SIMD group; `sizes` are those of that
// kernel, `codes` to `out` belong to the row. For a Hadamard rotation of a power of two a lane has at least
// eight coordinates in its registers, with their signs and means, and several vectors are restored at
// once; any other rotation goes through `values` in threadgroup memory.
template <int DIM, int BITS, int ORDER, int POWER, int STRIDE, typename Scales, typename Mean,
          typename Constants, typename T, typename Sizes>
METAL_FUNC void restore_tokens(const device uint* codes, Scales scales, Mean mean, Constants constants,
    const device T* exact, device T* out, Sizes sizes, int first, int last, threadgroup float* values,
    int lane) {
  const int sinks = sizes[0];
  const int recent = sizes[0] + sizes[1];
  const int shift = sizes[2] - recent;
  if constexpr (ORDER == 1 && DIM >= 64) {
    constexpr int COUNT = DIM > 256 ? DIM / 32 : 8;
    constexpr int LANES = DIM / COUNT;
    constexpr int SIGNS = level_count<BITS>();
    constexpr int PLANES = plane_count<BITS>();
    const int begin = lane % LANES * COUNT;
    float signs[COUNT];
    float means[COUNT];
    for (int k = 0; k < COUNT; k++) {
      signs[k] = constants[SIGNS + begin + k] * rsqrt(float(DIM));
      means[k] = mean[begin + k];
    }
    for (int start = first; start < last; start += 32 / LANES) {
      const int token = start + lane / LANES;
      const bool packed = token >= sinks && token < recent && token < last;
      float x[COUNT];
      if (simd_any(packed)) {
        const int from = packed ? token - sinks : 0;
        const device uint* words = codes + token_start<vector_words<DIM, BITS>(), STRIDE>(from);
        for (int eight = 0; eight < COUNT; eight += 8) {
          uint loaded[PLANES];
          load_eight<DIM, BITS, STRIDE>(loaded, words, begin + eight);
          for (int pair = 0; pair < 4; pair++) {
            const uint codes_of_pair = code_pair<8, BITS>(loaded, pair);
            x[eight + 2 * pair] = level_of<BITS>(constants, codes_of_pair & 0xFFFFu);
            x[eight + 2 * pair + 1] = level_of<BITS>(constants, codes_of_pair >> 16);
          }
        }
        lane_butterflies<DIM, COUNT>(x, lane);
        const float scale = float(scales[from]);
        for (int k = 0; k < COUNT; k++) {
          x[k] = fma(scale * signs[k], x[k], means[k]);
        }
      }
      if (token < last) {
        device T* to = out + long(token) * DIM + begin;
        const int from = token < sinks ? token : token + shift;
        for (int eight = 0; eight < COUNT; eight += 8) {
          if (packed) {
            store_eight(x + eight, to + eight);
          } else {
            copy_eight(exact + long(from) * DIM + begin + eight, to + eight);
          }
        }
      }
    }
  } else {
    for (int token = first; token < last; token++) {
      const bool packed = token >= sinks && token < recent;
      const int from = token < sinks ? token : token + (packed ? -sinks : shift);
      restore_vector<DIM, BITS, ORDER, POWER, STRIDE>(codes, scales, mean, constants, exact, packed, from,
          out + long(token) * DIM, values, lane);
    }
  }
}

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

// Copies `sinks` vectors of DIM values and those from `recent` on, behind which comes `token`, the vector
// with the number `at`; what follows is undefined. Takes every `step`-th piece of 16 bytes from
// `first` on. DIM is a multiple of eight.
template <int DIM, typename T>
METAL_FUNC void copy_with_token(const device T* from, const device T* token, device T* to, int sinks,
    int recent, int at, int capacity, int first, int step) {
  constexpr int PIECES = DIM * int(sizeof(T)) / 16;
  const device uint4* pieces = (const device uint4*)from;
  const device uint4* token_pieces = (const device uint4*)token;
  device uint4* out = (device uint4*)to;
  for (int i = first; i < capacity * PIECES; i += step) {
    const int number = i / PIECES < sinks ? i / PIECES : i / PIECES + recent - sinks;
    const int piece = i % PIECES;
    out[i] = number == at ? token_pieces[piece] : pieces[min(number, capacity - 1) * PIECES + piece];
  }
}

// The sum over the LANES neighbours that share a vector or a token, in all of them.
template <int LANES>
METAL_FUNC float shared_sum(float x) {
  for (ushort step = 1; step < LANES; step *= 2) {
    x += simd_shuffle_xor(x, step);
  }
  return x;
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
