// Memory checker. Kernels are compiled with clang's -fsanitize=thread and the undefined behaviour
// checks, but linked without those runtimes: the calls that clang inserts end up here, where each
// access is checked against the buffers, the threadgroup variables and the barrier intervals.
#include "executor.h"
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

static const u64 HARMLESS_DISTANCE = 4096;  // a read this near a buffer does not end the launch

// One access of a kernel: its first byte, its size, the code that makes it.
struct Touch {
  u64 address;
  u32 size;
  bool is_write;
  void* pc;
  const char* verb() const { return is_write ? "write" : "read"; }
};

static bool inside(u64 address, const void* begin, u64 size) {
  return address - (u64)begin < size;
}

static Region* find_region(std::vector<Region>& regions, const Touch& touch) {
  for (Region& region : regions)
    if (touch.address >= region.begin && touch.address + touch.size <= region.end) return &region;
  return nullptr;
}

// Bytes before (negative) or behind the region.
static long distance_to(const Region& region, const Touch& touch) {
  if (touch.address < region.begin) return -(long)(region.begin - touch.address);
  return (long)(touch.address + touch.size - region.end);
}

// Outside every buffer: say which one is near, end the launch when the access would do harm.
static void report_outside(const Touch& touch) {
  Dl_info info;
  if (!touch.is_write && dladdr((void*)touch.address, &info)) return;  // the kernel's own tables
  const Region* nearest = nullptr;
  long distance = INT64_MAX;
  for (const Region& region : worker->launch.buffers) {
    long candidate = distance_to(region, touch);
    if (labs(candidate) >= labs(distance)) continue;
    distance = candidate;
    nearest = &region;
  }
  report("oob-device",
         "%s of %u bytes, %+ld bytes from buffer '%s' (threadgroup %u, thread %u) at %s",
         touch.verb(), touch.size, distance, nearest ? nearest->name : "none",
         worker->threadgroup_index, worker->current->index, code_address(touch.pc));
  if (touch.is_write || (u64)labs(distance) > HARMLESS_DISTANCE) {
    abort_launch = true;
    worker->back_to_scheduler();
  }
}

// ---------------------------------------------------------------- races
static Access access_now(const Region& region) {
  const Fiber& me = *worker->current;
  u32 epoch = region.kind == THREADGROUP ? me.threadgroup_epoch : me.device_epoch;
  return {worker->threadgroup_index * MAX_THREADS + me.index + 1, epoch, me.simdgroup_epoch};
}
static u32 thread_of(const Access& access) { return (access.thread - 1) % MAX_THREADS; }
static u32 threadgroup_of(const Access& access) { return (access.thread - 1) / MAX_THREADS; }

// Two accesses race unless a barrier with the right memory flags lies between them.
static bool conflict(const Access& earlier, const Access& now) {
  if (!earlier.thread || earlier.thread == now.thread) return false;
  if (threadgroup_of(earlier) != threadgroup_of(now)) return true;
  if (earlier.epoch != now.epoch) return false;
  bool same_simdgroup = thread_of(earlier) / SIMD_WIDTH == thread_of(now) / SIMD_WIDTH;
  return !(same_simdgroup && earlier.simd_epoch < now.simd_epoch);  // simdgroup_barrier between
}

static void check_write(const Region& region, Shadow& shadow, const Access& now, u64 offset,
                        const char* kind, void* pc) {
  // Only the last reader is kept: with several readers, one of them is another thread.
  const Access& read = shadow.read;
  bool other_readers = shadow.several_readers && read.thread == now.thread &&
                       read.epoch == now.epoch && read.simd_epoch >= now.simd_epoch;
  if (conflict(read, now) || other_readers)
    report(kind, "write by thread %u of what thread %u read in the same barrier interval "
           "('%s'+%lu) at %s", thread_of(now), thread_of(read), region.name, offset,
           code_address(pc));
  shadow.write = now;
  shadow.read.thread = 0;
  shadow.several_readers = false;
  shadow.initialised = true;
}

static void check_read(const Region& region, Shadow& shadow, const Access& now, u64 offset,
                       void* pc) {
  if (!shadow.initialised)
    report(region.kind == THREADGROUP ? "uninit-threadgroup" : "uninit-output",
           "read of never-written '%s'+%lu by thread %u at %s", region.name, offset,
           thread_of(now), code_address(pc));
  const Access& read = shadow.read;
  if (read.epoch != now.epoch) shadow.several_readers = false;
  else if (read.thread && read.thread != now.thread) shadow.several_readers = true;
  shadow.read = now;
}

static void check_race(const Region& region, Shadow& shadow, u64 offset, const Touch& touch) {
  const Access now = access_now(region);
  const char* kind = region.kind == THREADGROUP ? "race-threadgroup" : "race-device";
  if (conflict(shadow.write, now))
    report(kind, "%s by thread %u of what thread %u of threadgroup %u wrote in the same barrier "
           "interval ('%s'+%lu) at %s", touch.verb(), thread_of(now), thread_of(shadow.write),
           threadgroup_of(shadow.write), region.name, offset, code_address(touch.pc));
  if (touch.is_write) check_write(region, shadow, now, offset, kind, touch.pc);
  else check_read(region, shadow, now, offset, touch.pc);
}

// ---------------------------------------------------------------- every access
static void check_stack(const Touch& touch) {
  u32 index = worker->current->index;
  if (!inside(touch.address, worker->stacks + STACK_SIZE * index, STACK_SIZE))
    report("stack", "%s in another thread's private memory by thread %u at %s", touch.verb(), index,
           code_address(touch.pc));
}

// The SIMD slots and thread positions.
static bool is_executors_own(u64 address) {
  const auto& groups = worker->groups;
  const auto& fibers = worker->fibers;
  return inside(address, groups.data(), groups.size() * sizeof(SimdGroup)) ||
         inside(address, fibers.data(), fibers.size() * sizeof(Fiber));
}

static Region* touched_region(const Touch& touch) {
  if (!inside(touch.address, worker->arena, ARENA_SIZE)) {
    Region* buffer = find_region(worker->launch.buffers, touch);
    if (!buffer) report_outside(touch);
    return buffer;
  }
  Region* variable = find_region(worker->threadgroup_variables, touch);
  if (!variable)
    report("oob-threadgroup", "%s of %u bytes outside every threadgroup variable (thread %u) at %s",
           touch.verb(), touch.size, worker->current->index, code_address(touch.pc));
  return variable;
}

static void check_access(const Touch& touch) {
  if (inside(touch.address, worker->stacks, STACK_SIZE * MAX_THREADS)) return check_stack(touch);
  if (is_executors_own(touch.address)) return;
  Region* region = touched_region(touch);
  if (!region) return;
  if (touch.is_write && region->kind == INPUT)
    report("write-to-input", "buffer '%s' at %s", region->name, code_address(touch.pc));
  if (region->shadow.empty()) return;
  u64 offset = touch.address - region->begin;
  u64 last = (offset + touch.size - 1) / region->item_size;
  for (u64 i = offset / region->item_size; i <= last; i++)
    check_race(*region, region->shadow[i], i * region->item_size, touch);
}

// ---------------------------------------------------------------- calls of -fsanitize=thread
#define PC __builtin_return_address(0)
#define HOOKS(name, size)                                                                    \
  void __tsan_##name##read##size(void* p) { check_access({(u64)p, size, false, PC}); }       \
  void __tsan_##name##write##size(void* p) { check_access({(u64)p, size, true, PC}); }       \
  void __tsan_##name##read_write##size(void* p) {                                            \
    check_access({(u64)p, size, false, PC});                                                 \
    check_access({(u64)p, size, true, PC});                                                  \
  }
#define HOOKS_OF_SIZE(size) HOOKS(, size) HOOKS(unaligned_, size) HOOKS(volatile_, size)
extern "C" {
HOOKS_OF_SIZE(1) HOOKS_OF_SIZE(2) HOOKS_OF_SIZE(4) HOOKS_OF_SIZE(8) HOOKS_OF_SIZE(16)
void __tsan_init() {}
void* __tsan_memmove(void* to, const void* from, u64 size) {
  if (size) {
    check_access({(u64)from, (u32)size, false, PC});
    check_access({(u64)to, (u32)size, true, PC});
  }
  return memmove(to, from, size);
}
void* __tsan_memcpy(void* to, const void* from, u64 size) {
  return __tsan_memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, u64 size) {
  if (size) check_access({(u64)to, (u32)size, true, PC});
  return memset(to, value, size);
}

// ---------------------------------------------------------------- calls of the other checks
struct SourceLocation { const char* file; u32 line, column; };  // the head of every data block
#define UNDEFINED(name, kind, ...)                                                     \
  void __ubsan_handle_##name(SourceLocation* at __VA_ARGS__) {                         \
    const char* file = at->file ? at->file : "?";                                      \
    const char* slash = strrchr(file, '/');                                            \
    const char* name_only = slash ? slash + 1 : file;                                  \
    report(kind, "thread %u at %s:%u", worker->current->index, name_only, at->line);   \
  }
UNDEFINED(out_of_bounds, "ub-array-index", , u64)
UNDEFINED(shift_out_of_bounds, "ub-shift", , u64, u64)
UNDEFINED(divrem_overflow, "ub-division", , u64, u64)
UNDEFINED(float_cast_overflow, "ub-float-to-int", , u64)
UNDEFINED(load_invalid_value, "ub-bool-value", , u64)
UNDEFINED(missing_return, "ub-missing-return")
UNDEFINED(builtin_unreachable, "ub-unreachable")
UNDEFINED(type_mismatch_v1, "ub-alignment", , u64)
}
