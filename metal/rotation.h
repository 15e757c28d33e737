// Rotations: Hadamard transforms of a power of two, or of that times a small order, and dense matrices. Also
// sums and maxima over lanes.
#pragma once

// Index of the first value of a pair; the second is half_run, a power of two, behind it. A division
// would cost some twenty instructions where the compiler does not know half_run.
METAL_FUNC constexpr int first_of_pair(int pair, int half_run) {
  return pair + (pair & -half_run);
}

// The Hadamard transform of every run of POWER values of x[DIM], not normalised. Called by all lanes
// of one SIMD group, which alone uses x: a barrier of that group separates the stages.
template <int DIM, int POWER>
METAL_FUNC void butterflies(threadgroup float* x, uint lane) {
  for (int half_run = 1; half_run < POWER; half_run *= 2) {
    for (int pair = int(lane); pair < DIM / 2; pair += LANES) {
      const int i = first_of_pair(pair, half_run);
      const float a = x[i];
      const float b = x[i + half_run];
      x[i] = a + b;
      x[i + half_run] = a - b;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// The Hadamard transform of every run of RUN values of x[COUNT], which are in registers; not normalised.
template <int COUNT, int RUN>
METAL_FUNC void register_butterflies(thread float* x) {
#pragma unroll
  for (int half_run = 1; half_run < RUN; half_run *= 2) {
#pragma unroll
    for (int pair = 0; pair < COUNT / 2; pair++) {
      const int i = first_of_pair(pair, half_run);
      const float a = x[i];
      const float b = x[i + half_run];
      x[i] = a + b;
      x[i + half_run] = a - b;
    }
  }
}

// The stage of a Hadamard transform that joins values of lanes that are `step` apart.
template <int COUNT>
METAL_FUNC void lane_stage(thread float* x, int lane, int step) {
  const float sign = (lane & step) == 0 ? 1.0f : -1.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    x[i] = fma(sign, x[i], simd_shuffle_xor(x[i], ushort(step)));
  }
}

// The Hadamard transform of a vector of DIM values, not normalised. DIM / COUNT neighbouring lanes share it:
// this lane has x[COUNT], the values from lane * COUNT on. The first stages are within a lane.
template <int DIM, int COUNT>
METAL_FUNC void lane_butterflies(thread float* x, int lane) {
  register_butterflies<COUNT, COUNT>(x);
#pragma unroll
  for (int step = 1; step < DIM / COUNT; step *= 2) {
    lane_stage<COUNT>(x, lane, step);
  }
}

// The Hadamard transform of every run of POWER values of a vector, not normalised. LANE_COUNT neighbouring
// lanes share it: this lane has x[COUNT], every LANE_COUNT-th value from `lane` on. The first stages are
// between lanes.
template <int COUNT, int POWER, int LANE_COUNT>
METAL_FUNC void strided_butterflies(thread float* x, int lane) {
#pragma unroll
  for (int step = 1; step < (POWER < LANE_COUNT ? POWER : LANE_COUNT); step *= 2) {
    lane_stage<COUNT>(x, lane, step);
  }
  register_butterflies<COUNT, POWER / LANE_COUNT>(x);
}

// Coordinate i of the ORDER x ORDER matrix times x, which is ORDER rows of POWER values. ORDER is 1,
// 12, 20 or 28 for a Hadamard rotation, and DIM with POWER 1 for a dense one.
template <int ORDER, int POWER, bool TRANSPOSED, typename Matrix>
METAL_FUNC float matrix_row(Matrix matrix, const threadgroup float* x, int i) {
  if constexpr (ORDER == 1) {
    return x[i];
  } else {
    // Seen from here, all columns are at constant offsets.
    matrix += uint(i) / POWER * (TRANSPOSED ? 1 : ORDER);
    x += uint(i) % POWER;
    float sum = 0.0f;
    for (int column = 0; column < ORDER; column++) {
      sum += matrix[column * (TRANSPOSED ? ORDER : 1)] * x[column * POWER];
    }
    return sum;
  }
}

// The matrix, not transposed, times `values`, DIM floats in threadgroup memory. A lane computes the coordinates
// that it has in strided_butterflies together, so that most values are loaded once for all of them.
template <int DIM, int ORDER, int POWER, int COUNT, int LANE_COUNT, typename Matrix>
METAL_FUNC void strided_matrix_rows(
    thread float* x, Matrix matrix, const threadgroup float* values, int lane) {
  matrix += uint(lane) / POWER * ORDER;
  values += uint(lane) % POWER;
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    x[k] = 0.0f;
  }
  for (int column = 0; column < ORDER; column++) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int i = k * LANE_COUNT;
      if (i + lane < DIM) {
        x[k] += matrix[i / POWER * ORDER + column] * values[column * POWER + i % POWER];
      }
    }
  }
}

// The sum over COUNT neighbouring lanes, which share a vector or a token. All of them get it.
template <int COUNT>
METAL_FUNC float shared_sum(float x) {
#pragma unroll
  for (ushort step = 1; step < COUNT; step *= 2) {
    x += simd_shuffle_xor(x, step);
  }
  return x;
}

// The largest value over COUNT neighbouring lanes. All of them get it.
template <int COUNT>
METAL_FUNC float shared_max(float x) {
#pragma unroll
  for (ushort step = 1; step < COUNT; step *= 2) {
    x = max(x, simd_shuffle_xor(x, step));
  }
  return x;
}
