// CPU executor for Metal compute kernels. Every Metal thread is a fiber. Threadgroups run one after
// another on each worker; inside one, SIMD groups of 32 lanes take turns, and a lane runs until it
// reaches a SIMD function or a barrier.
#include "executor.h"
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <immintrin.h>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>

__thread Worker* worker = nullptr;
std::atomic<bool> abort_launch{false};

// ---------------------------------------------------------------- reports
static const u32 MAX_REPORTS_PER_KIND = 3;
static std::mutex report_mutex;
static std::vector<std::string> report_texts;
static std::unordered_map<std::string, u32> report_counts;

void report(const char* kind, const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::lock_guard<std::mutex> lock(report_mutex);
  if (report_counts[kind]++ < MAX_REPORTS_PER_KIND)
    report_texts.push_back(std::string(kind) + ": " + text);
}

const char* code_address(void* pc) {
  static thread_local char text[32];
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fbase) return "?";
  // `pc` is a return address: one byte less lies in the call itself.
  snprintf(text, sizeof text, "+0x%lx", (u64)pc - (u64)info.dli_fbase - 1);
  return text;
}

// ---------------------------------------------------------------- fibers
// Saves the callee-saved registers on the old stack, restores them from the new one. (swapcontext
// does the same with a system call each time: ten times slower.)
asm(R"(
.text
.globl mol_switch
.hidden mol_switch
.type mol_switch,@function
mol_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size mol_switch,.-mol_switch
)");

static void fiber_main() {
  Worker* self = worker;
  Fiber& me = *self->current;
  self->launch.entry(self->launch.arguments, &me.position);
  me.state = DONE;
  SimdGroup& group = self->group_of(me);
  group.alive &= ~me.bit();
  group.ready &= ~me.bit();
  self->back_to_scheduler();
  __builtin_unreachable();
}

static Context new_context(char* stack, u32 index) {
  u64 top = (u64)stack + STACK_SIZE - (index % 16) * 64;  // staggered, to spread over cache sets
  u64* pointer = (u64*)(top & ~63ull);
  *--pointer = 0;                // return address of fiber_main, never used; keeps the alignment
  *--pointer = (u64)fiber_main;  // where the first switch "returns" to
  for (int i = 0; i < 6; i++) *--pointer = 0;
  return pointer;
}

static char* reserve(size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
}

Worker::Worker(Launch& launch, u32 id)
    : launch(launch), stacks(reserve(STACK_SIZE * MAX_THREADS)), arena(reserve(ARENA_SIZE)) {
  random_state = 0x9E3779B97F4A7C15ull ^ (launch.options.seed * 7919 + id + 1);
}
Worker::~Worker() {
  munmap(stacks, STACK_SIZE * MAX_THREADS);
  munmap(arena, ARENA_SIZE);
}
u32 Worker::random() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (u32)(random_state >> 16);
}
void Worker::resume(Context& save, Fiber& next) {
  current = &next;
  mol_switch(&save, next.context);
}
void Worker::back_to_scheduler() { mol_switch(&current->context, scheduler); }

// ---------------------------------------------------------------- scheduling inside a SIMD group
template <class F> static void for_lanes(u32 mask, F action) {
  for (; mask; mask &= mask - 1) action((u32)__builtin_ctz(mask));
}

u32 Worker::pick_lane(u32 mask, u32 last) {
  if (launch.options.order == REVERSE) return 31 - __builtin_clz(mask);
  if (launch.options.order == RANDOM) {
    for (u32 skip = random() % __builtin_popcount(mask); skip; skip--) mask &= mask - 1;
    return __builtin_ctz(mask);
  }
  u32 later = last < 31 ? mask & (~0u << (last + 1)) : 0;
  return __builtin_ctz(later ? later : mask);
}

// All lanes of `mask` have called the same SIMD function: collect their values, wake them.
void Worker::complete_simd(SimdGroup& group, u32 mask) {
  SimdSlots* slots = &group.ring[group.next_slot++ % 64];
  slots->mask = mask;
  slots->have_result = 0;
  for_lanes(mask, [&](u32 lane) {
    Fiber& fiber = fibers[group.first + lane];
    memcpy(slots->data + (size_t)fiber.value_size * lane, fiber.value, fiber.value_size);
    fiber.slots = slots;
    fiber.state = READY;
  });
  group.waiting &= ~mask;
  group.ready |= mask;
}

// Lanes wait at different calls: the earliest in the code goes first, so that lanes still inside a
// loop catch up with those that have left it.
void Worker::settle_simd(u32 group_index, u32 mask) {
  SimdGroup& group = groups[group_index];
  auto site_of = [&](u32 lane) { return fibers[group.first + lane].call_site; };
  void* site = (void*)~0ull;
  for_lanes(mask, [&](u32 lane) { site = std::min(site, site_of(lane)); });
  u32 here = 0;
  for_lanes(mask, [&](u32 lane) { here |= (u32)(site_of(lane) == site) << lane; });
  if (here != group.full_mask())
    report("divergent-simd",
           "simd function reached by lanes %08x of %08x (threadgroup %u, simdgroup %u) at %s", here,
           group.full_mask(), threadgroup_index, group_index, code_address(site));
  complete_simd(group, here);
}

void Worker::settle_simdgroup_barrier(SimdGroup& group, u32 mask) {
  if (mask != group.alive)
    report("divergent-barrier", "simdgroup_barrier reached by lanes %08x of %08x", mask,
           group.alive);
  for_lanes(mask, [&](u32 lane) {
    Fiber& fiber = fibers[group.first + lane];
    fiber.state = READY;
    fiber.simdgroup_epoch++;
  });
  group.waiting &= ~mask;
  group.ready |= mask;
}

// No lane can run: settle what they wait for. False when only the threadgroup can go on.
bool Worker::settle(u32 group_index) {
  SimdGroup& group = groups[group_index];
  if (!group.waiting) return false;
  u32 in_simd = 0;
  for_lanes(group.waiting, [&](u32 lane) {
    in_simd |= (u32)(fibers[group.first + lane].state == WAITS_SIMD) << lane;
  });
  if (in_simd) settle_simd(group_index, in_simd);
  else settle_simdgroup_barrier(group, group.waiting);
  return true;
}

void Worker::run_group(u32 group_index) {
  SimdGroup& group = groups[group_index];
  u32 last = 31;
  do {
    while (group.ready && !abort_launch) {
      last = pick_lane(group.ready, last);
      resume(scheduler, fibers[group.first + last]);
    }
  } while (!abort_launch && settle(group_index));
}

// The current fiber waits: go straight to the next lane, or to the scheduler when there is none.
void Worker::wait(State state, void* site) {
  Fiber& me = *current;
  SimdGroup& group = group_of(me);
  me.state = state;
  me.call_site = site;
  if (state != WAITS_BARRIER) group.waiting |= me.bit();
  group.ready &= ~me.bit();
  if (group.ready && !abort_launch)
    resume(me.context, fibers[group.first + pick_lane(group.ready, me.lane)]);
  else
    back_to_scheduler();
}

// The memory of one threadgroup variable; every thread of the threadgroup gets the same.
void* Worker::threadgroup_variable(u32 id, u32 size, u32 align) {
  auto known = variable_by_id.find(id);
  if (known != variable_by_id.end()) return (void*)threadgroup_variables[known->second].begin;
  align = std::max(align, 16u);
  size_t offset = (arena_used + align - 1) & ~(size_t)(align - 1);
  if (offset + size + 64 > ARENA_SIZE) {
    fprintf(stderr, "metal_on_linux: more than 1 MiB of threadgroup memory\n");
    abort();
  }
  char* memory = arena + offset;
  arena_used = offset + size + 64;  // a gap between variables, to notice overruns
  memset(memory, 0xff, size);       // uninitialised: NaN or -1
  variable_by_id[id] = threadgroup_variables.size();
  std::vector<Shadow> shadow(launch.options.memory_check ? size : 0);
  threadgroup_variables.push_back(
      {(u64)memory, (u64)memory + size, THREADGROUP, 1, "threadgroup", std::move(shadow)});
  return memory;
}

// ---------------------------------------------------------------- functions that kernels call
extern "C" {
u32 mol_lane() { return worker->current->lane; }

__attribute__((noinline)) SimdSlots* mol_simd_exchange(const void* value, u32 size) {
  Worker* self = worker;
  Fiber& me = *self->current;
  SimdGroup& group = self->group_of(me);
  void* site = __builtin_return_address(0);
  memcpy(me.value, value, size);
  me.value_size = size;
  // The common case: the last lane to arrive, all at one site. It need not wait at all.
  bool is_last = group.ready == me.bit() && (group.waiting | me.bit()) == group.full_mask();
  for (u32 lane = 0; lane < group.size && is_last; lane++)
    is_last = lane == me.lane || self->fibers[group.first + lane].call_site == site;
  if (is_last) {
    me.call_site = site;
    self->complete_simd(group, group.full_mask());
  } else {
    self->wait(WAITS_SIMD, site);
  }
  return me.slots;
}
void mol_barrier(u32 memory_flags, u32 is_simdgroup) {
  worker->current->barrier_flags = memory_flags;
  worker->wait(is_simdgroup ? WAITS_SIMD_BARRIER : WAITS_BARRIER, __builtin_return_address(0));
}
void mol_report_bad_lane(u32 lane) {
  report("simd-inactive-lane", "lane %u is read, but not active or not in 0..31, at %s", lane,
         code_address(__builtin_return_address(0)));
}
void mol_report_bad_bits(u32 offset, u32 bits) {
  report("bits-range", "offset %u + %u bits exceeds the type at %s", offset, bits,
         code_address(__builtin_return_address(0)));
}
void* mol_threadgroup_alloc(u32 id, u32 size, u32 align) {
  return worker->threadgroup_variable(id, size, align);
}
}

// ---------------------------------------------------------------- one threadgroup
static Uint3 uint3(const u32* v) { return {v[0], v[1], v[2], 0}; }

// `at` is the threadgroup's position. Metal clips the last threadgroups of a grid that is not a
// multiple of the threadgroup size: group_size is what is left.
void Worker::set_up_position(ThreadPosition& position, const u32* at) {
  const Uint3& size = position.group_size;
  u32 index = position.index, rows = index / size.x;
  position.in_threadgroup = {index % size.x, rows % size.y, rows / size.y, 0};
  position.in_grid = {at[0] * launch.threadgroup_size[0] + position.in_threadgroup.x,
                      at[1] * launch.threadgroup_size[1] + position.in_threadgroup.y,
                      at[2] * launch.threadgroup_size[2] + position.in_threadgroup.z, 0};
  position.group_position = uint3(at);
  position.group_count = uint3(launch.threadgroups);
  position.grid_size = uint3(launch.grid);
  position.full_group_size = uint3(launch.threadgroup_size);
  position.lane = index % SIMD_WIDTH;
  position.simdgroup = index / SIMD_WIDTH;
  position.simdgroups = groups.size();
  position.simd_width = SIMD_WIDTH;
  position.quadgroup = index / 4;
  position.quadgroups = (fibers.size() + 3) / 4;
  position.quad_lane = index % 4;
}

void Worker::set_up_fiber(Fiber& fiber, u32 index) {
  fiber.context = new_context(stacks + STACK_SIZE * index, index);
  fiber.state = READY;
  fiber.index = index;
  fiber.lane = index % SIMD_WIDTH;
  fiber.threadgroup_epoch = fiber.device_epoch = fiber.simdgroup_epoch = 0;
}

void Worker::set_up_group(SimdGroup& group, u32 index) {
  group.first = index * SIMD_WIDTH;
  group.size = std::min(SIMD_WIDTH, (u32)fibers.size() - group.first);
  group.alive = group.ready = group.full_mask();
  group.waiting = 0;
}

void Worker::set_up_threadgroup(u32 x, u32 y, u32 z) {
  u32 at[3] = {x, y, z}, size[3];
  for (int i = 0; i < 3; i++) {
    u32 left = launch.grid[i] - at[i] * launch.threadgroup_size[i];
    size[i] = std::min(launch.threadgroup_size[i], left);
  }
  u32 count = size[0] * size[1] * size[2];
  threadgroup_index = x + launch.threadgroups[0] * (y + launch.threadgroups[1] * z);
  arena_used = 64;
  variable_by_id.clear();
  threadgroup_variables.clear();
  fibers.resize(count);
  groups.resize((count + SIMD_WIDTH - 1) / SIMD_WIDTH);
  for (u32 i = 0; i < count; i++) {
    set_up_fiber(fibers[i], i);
    fibers[i].position.index = i;
    fibers[i].position.group_size = uint3(size);
    set_up_position(fibers[i].position, at);
  }
  for (u32 i = 0; i < groups.size(); i++) set_up_group(groups[i], i);
}

// All threads that are left wait at a threadgroup barrier: let them pass. False when none is left.
bool Worker::pass_barrier() {
  u32 waiting = 0, done = 0;
  void* site = nullptr;
  bool several_sites = false;
  for (Fiber& fiber : fibers) {
    done += fiber.state == DONE;
    if (fiber.state != WAITS_BARRIER) continue;
    if (waiting++ == 0) site = fiber.call_site;
    several_sites |= fiber.call_site != site;
    fiber.state = READY;
    fiber.device_epoch += fiber.barrier_flags & 1;              // mem_flags::mem_device
    fiber.threadgroup_epoch += (fiber.barrier_flags >> 1) & 1;  // mem_flags::mem_threadgroup
    group_of(fiber).ready |= fiber.bit();
  }
  if (waiting && done)
    report("divergent-barrier",
           "threadgroup_barrier at %s reached by %u of %zu threads (the others have returned)",
           code_address(site), waiting, fibers.size());
  if (several_sites)
    report("divergent-barrier", "threads wait at different barriers (one of them at %s)",
           code_address(site));
  return waiting;
}

static void check_threadgroup_memory(const std::vector<Region>& variables) {
  u64 used = 0;
  for (const Region& variable : variables) used += variable.end - variable.begin;
  if (used > MAX_THREADGROUP_BYTES)
    report("limit-threadgroup-memory", "%lu bytes of threadgroup memory; the limit is %u", used,
           MAX_THREADGROUP_BYTES);
}

void Worker::run_threadgroup(u32 x, u32 y, u32 z) {
  set_up_threadgroup(x, y, z);
  u32 count = groups.size();
  do {
    u32 start = launch.options.order == RANDOM ? random() % count : 0;
    for (u32 i = 0; i < count; i++)
      run_group(launch.options.order == REVERSE ? count - 1 - i : (i + start) % count);
  } while (!abort_launch && pass_barrier());
  check_threadgroup_memory(threadgroup_variables);
}

// ---------------------------------------------------------------- faults and denormals
// A wild pointer or an integer division by zero ends the launch, not the process.
static const int FAULT_SIGNALS[] = {SIGSEGV, SIGFPE, SIGBUS};
static thread_local sigjmp_buf fault_exit;

static void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!worker) {  // not ours
    signal(signal_number, SIG_DFL);
    raise(signal_number);
    return;
  }
  void* pc = (void*)(((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1);
  const char* what =
      signal_number == SIGFPE ? "integer division by zero or overflow" : "bad address";
  report("fault", "%s, address %p, threadgroup %u, thread %u at %s", what, info->si_addr,
         worker->threadgroup_index, worker->current ? worker->current->index : 0,
         code_address(pc));
  abort_launch = true;
  siglongjmp(fault_exit, 1);
}

struct FaultHandlers {
  struct sigaction old_actions[3];
  FaultHandlers() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(FAULT_SIGNALS[i], &action, &old_actions[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 3; i++) sigaction(FAULT_SIGNALS[i], &old_actions[i], nullptr);
  }
};

// Settings of an OS thread while it runs kernels.
struct ThreadSettings {
  std::vector<char> signal_stack = std::vector<char>(64 << 10);  // a fiber's own may be at fault
  stack_t old_stack{};
  u32 old_mode = _mm_getcsr();
  ThreadSettings() {
    stack_t alternative{};
    alternative.ss_sp = signal_stack.data();
    alternative.ss_size = signal_stack.size();
    sigaltstack(&alternative, &old_stack);
    _mm_setcsr(old_mode | 0x8040);  // MLX compiles kernels with denormals flushed to zero
  }
  ~ThreadSettings() {
    _mm_setcsr(old_mode);
    sigaltstack(&old_stack, nullptr);
  }
};

// ---------------------------------------------------------------- launch
void Worker::run_all() {
  ThreadSettings settings;
  worker = this;
  if (!sigsetjmp(fault_exit, 1)) {
    u64 total = launch.threadgroup_count();
    for (u64 i; (i = launch.next_threadgroup++) < total && !abort_launch;) {
      u64 index = launch.options.order == REVERSE ? total - 1 - i : i;
      u64 rows = index / launch.threadgroups[0];
      run_threadgroup(index % launch.threadgroups[0], rows % launch.threadgroups[1],
                      rows / launch.threadgroups[1]);
    }
  }
  worker = nullptr;
}

static std::vector<Region> regions(const BufferDescription* buffers, u32 count, bool memory_check) {
  std::vector<Region> result;
  for (u32 i = 0; i < count; i++) {
    const BufferDescription& buffer = buffers[i];
    Shadow fresh{};
    fresh.initialised = buffer.kind == INITIALISED_OUTPUT;
    bool track = memory_check && buffer.kind != INPUT;
    std::vector<Shadow> shadow(track ? buffer.bytes / buffer.item_size : 0, fresh);
    u64 begin = (u64)buffer.data;
    result.push_back({begin, begin + buffer.bytes, buffer.kind, buffer.item_size, buffer.name,
                      std::move(shadow)});
  }
  return result;
}

static void run_workers(Launch& launch) {
  const Options& options = launch.options;
  // The race detector wants one worker; permuted orders stay reproducible with one.
  u32 count = options.memory_check || options.order != FORWARD ? 1 : options.workers;
  if (!count) count = std::thread::hardware_concurrency();
  count = std::min<u64>(std::max(count, 1u), launch.threadgroup_count());
  auto work = [&](u32 id) { Worker(launch, id).run_all(); };
  FaultHandlers handlers;
  std::vector<std::thread> others;
  for (u32 id = 1; id < count; id++) others.emplace_back(work, id);
  work(0);
  for (std::thread& other : others) other.join();
}

static void report_unwritten(const Region& output) {
  u64 missing = 0, first = 0;
  for (u64 i = 0; i < output.shadow.size(); i++)
    if (!output.shadow[i].initialised && missing++ == 0) first = i;
  if (missing)
    report("unwritten-output", "%lu of %zu elements of '%s' never written (first: %lu)", missing,
           output.shadow.size(), output.name, first);
}

extern "C" {
// Runs a kernel over a grid.
void mol_launch(EntryPoint entry, const u64* arguments, const BufferDescription* buffers,
                u32 buffer_count, const u32* grid, const u32* threadgroup, const Options* options) {
  report_texts.clear();
  report_counts.clear();
  abort_launch = false;
  Launch launch{};
  launch.entry = entry;
  launch.arguments = arguments;
  launch.options = *options;
  launch.buffers = regions(buffers, buffer_count, options->memory_check);
  for (int i = 0; i < 3; i++) {
    u32 size = std::min(threadgroup[i], grid[i]);
    launch.grid[i] = grid[i];
    launch.threadgroup_size[i] = size;
    launch.threadgroups[i] = size ? (grid[i] + size - 1) / size : 0;
  }
  const u32* size = launch.threadgroup_size;
  u64 threads = (u64)size[0] * size[1] * size[2];
  if (threads > MAX_THREADS) {
    report("limit-threads", "%lu threads in a threadgroup; the limit is %u", threads, MAX_THREADS);
    return;
  }
  run_workers(launch);
  if (abort_launch) return;
  for (const Region& region : launch.buffers) report_unwritten(region);
}
u32 mol_report_count() { return report_texts.size(); }
const char* mol_report_text(u32 i) { return report_texts[i].c_str(); }
}
