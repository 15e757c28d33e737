// The rotation: a Hadamard transform, of a power of two or of that times a small order, or a dense matrix;
// and sums over lanes.
#pragma once

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

// The sum over the LANES neighbours that share a vector or a token, in all of them.
template <int LANES>
METAL_FUNC float shared_sum(float x) {
  for (ushort step = 1; step < LANES; step *= 2) {
    x += simd_shuffle_xor(x, step);
  }
  return x;
}
