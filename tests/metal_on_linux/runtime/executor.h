// Data shared by the executor and the memory checker. Mirrored in Python (executor.py) and in the
// kernels (include/shim_simd.h) where noted.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

const u32 MAX_THREADS = 1024, MAX_THREADGROUP_BYTES = 32768, SIMD_WIDTH = 32;
const size_t STACK_SIZE = 128 << 10;  // per Metal thread; only touched pages are real
const size_t ARENA_SIZE = 1 << 20;    // threadgroup memory of one threadgroup

struct alignas(16) Uint3 { u32 x, y, z, unused; };  // Metal's uint3 takes 16 bytes
struct ThreadPosition {                             // mirrored: _POSITION_STRUCT in executor.py
  Uint3 in_grid, in_threadgroup, group_position, group_count;
  Uint3 grid_size, group_size, full_group_size;
  u32 index, lane, simdgroup, simdgroups, simd_width, quadgroup, quadgroups, quad_lane;
};
typedef void (*EntryPoint)(const u64* arguments, const ThreadPosition*);

struct alignas(16) SimdSlots {  // mirrored: _simd_slots in shim_simd.h
  char data[SIMD_WIDTH * 16], result[SIMD_WIDTH * 16];
  u32 mask, have_result;
};

typedef void* Context;  // saved execution state of a fiber: its stack pointer
extern "C" void mol_switch(Context* from, Context to);

// One Metal thread.
enum State : u8 { READY, WAITS_SIMD, WAITS_BARRIER, WAITS_SIMD_BARRIER, DONE };
struct Fiber {
  Context context;
  State state;
  u32 index, lane;   // in the threadgroup, in the SIMD group
  void* call_site;   // where it waits
  char value[16];    // what it contributes to a SIMD operation
  u32 value_size;
  SimdSlots* slots;  // the result of that operation
  u32 barrier_flags;
  // Barrier intervals for the race detector: counted per memory kind.
  u32 threadgroup_epoch, device_epoch, simdgroup_epoch;
  ThreadPosition position;
  u32 bit() const { return 1u << lane; }
};

struct alignas(64) SimdGroup {
  SimdSlots ring[64];  // results stay valid while slower lanes still read them
  u32 next_slot, alive, ready, waiting;  // lane masks
  u32 first, size;                       // its fibers
  u32 full_mask() const { return size == 32 ? ~0u : (1u << size) - 1; }
};

// Race detector: the last write and the last read of one element. Thread 0 means none.
struct Access { u32 thread, epoch, simd_epoch; };
struct Shadow { Access write, read; bool several_readers, initialised; };

enum BufferKind : u32 { INPUT, OUTPUT, INITIALISED_OUTPUT, THREADGROUP };
struct Region {
  u64 begin, end;
  u32 kind, item_size;
  const char* name;
  std::vector<Shadow> shadow;  // empty when accesses need no tracking
};

// Both mirrored in executor.py.
struct BufferDescription { void* data; u64 bytes; u32 kind, item_size; const char* name; };
struct Options { u32 workers, order, seed, memory_check; };
enum Order : u32 { FORWARD, REVERSE, RANDOM };

// What all workers of a launch share.
struct Launch {
  EntryPoint entry;
  const u64* arguments;
  Options options;
  u32 grid[3], threadgroup_size[3], threadgroups[3];
  std::vector<Region> buffers;
  std::atomic<u64> next_threadgroup{0};
  u64 threadgroup_count() const {
    return (u64)threadgroups[0] * threadgroups[1] * threadgroups[2];
  }
};

// One OS thread; runs one threadgroup at a time.
struct Worker {
  Launch& launch;
  char *stacks, *arena;
  size_t arena_used;
  std::vector<Region> threadgroup_variables;
  std::unordered_map<u32, size_t> variable_by_id;  // declaration -> index of its Region
  std::vector<Fiber> fibers;
  std::vector<SimdGroup> groups;
  Context scheduler;
  Fiber* current = nullptr;
  u32 threadgroup_index;
  u64 random_state;

  Worker(Launch& launch, u32 id);
  ~Worker();
  Worker(const Worker&) = delete;
  void run_all();
  SimdGroup& group_of(const Fiber& fiber) { return groups[fiber.index / SIMD_WIDTH]; }
  void wait(State state, void* site);
  void back_to_scheduler();
  void complete_simd(SimdGroup& group, u32 mask);
  void* threadgroup_variable(u32 id, u32 size, u32 align);

 private:
  u32 random();
  void run_threadgroup(u32 x, u32 y, u32 z);
  void set_up_threadgroup(u32 x, u32 y, u32 z);
  void set_up_fiber(Fiber& fiber, u32 index);
  void set_up_position(ThreadPosition& position, const u32* at);
  void set_up_group(SimdGroup& group, u32 index);
  void run_group(u32 group_index);
  bool settle(u32 group_index);
  void settle_simd(u32 group_index, u32 mask);
  void settle_simdgroup_barrier(SimdGroup& group, u32 mask);
  bool pass_barrier();
  u32 pick_lane(u32 mask, u32 last);
  void resume(Context& save, Fiber& next);
};
extern __thread Worker* worker;
extern std::atomic<bool> abort_launch;

// Records a message; at most a few per kind are kept.
void report(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* code_address(void* pc);  // "+0x..." inside the kernel's library; Python adds the line
