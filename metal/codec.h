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

// The level of a code. `levels` holds the three coefficients of the odd polynomial up to 4 bits, so
// that no divergent load is needed, and the table of all levels above.
template <int BITS, typename Levels>
METAL_FUNC float level_of(Levels levels, uint code) {
  if constexpr (BITS <= 4) {
    float x = float(2 * int(code) + 1 - (1 << BITS));
    float squared = x * x;
    return x * (levels[0] + squared * (levels[1] + squared * levels[2]));
  } else {
    return levels[code];
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

// How many of the 2^BITS - 1 ascending thresholds are below y: the code of the nearest level.
template <int BITS, typename Thresholds>
METAL_FUNC uint nearest_code(Thresholds thresholds, float y) {
  uint code = 0u;
  for (uint step = 1u << (BITS - 1); step > 0u; step /= 2u) {
    code += y > thresholds[code + step - 1u] ? step : 0u;
  }
  return code;
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
