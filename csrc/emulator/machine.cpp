// Scheduling: the next thread to run, collectives of warps and blocks, and the way out of a kernel after a failure.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <string_view>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

#if defined(__x86_64__) && !defined(RODE_UCONTEXT)
// System V: what a call preserves is six registers and the stack pointer (kernels do not change the floating-point mode).
asm(R"(
.text
.globl rode_fiber_switch
.hidden rode_fiber_switch
.type rode_fiber_switch, @function
rode_fiber_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size rode_fiber_switch, .-rode_fiber_switch
)");
#endif

namespace rode::emulator {
namespace {

constexpr size_t kStack = 128 * 1024, kGuard = 4096;

std::string list(uint32_t lanes, int warp) {
  char text[64];
  std::snprintf(text, sizeof text, "lanes 0x%08x of warp %d", lanes, warp);
  return text;
}

bool same(const At& a, const At& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}

std::string location(const At& at) { return std::string(at.file_name()) + ":" + std::to_string(at.line()); }

}  // namespace

Machine the_machine;

// CUDA programming guide, "Technical Specifications per Compute Capability".
unsigned max_shared(int architecture) {
  switch (architecture) {
    case 80:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
  }
  throw std::invalid_argument("the emulator knows the architectures 80, 86, 89, 90, 100 and 120, got " + std::to_string(architecture));
}

void Machine::fail(const std::string& what, At at) {
  char where[160];
  std::snprintf(where, sizeof where, ": kernel %s, block (%u, %u, %u), thread %d: ", launch_->kernel, block_.x, block_.y,
                block_.z, lane_ ? lane_->index : warp_->index * kWarp);
  failure_ = location(at) + where + what;
  // Not thrown from here: no unwinder knows how this stack was entered. The kernel's frames hold nothing to destroy.
  if (lane_) change(lane_->fiber, scheduler_);
  throw Error(failure_);
}

void Machine::lane_main() {
  Machine& m = machine();
  (*m.kernel_)();
  Warp& warp = *m.warp_;
  Lane& lane = *m.lane_;
  if (!lane.copies.empty()) m.fail("exits with asynchronous copies on their way", lane.copies.front().at);
  warp.exited |= 1u << lane.index % kWarp;
  if (warp.exited == kAll) {
    m.count_requests(warp);
    m.leave_to_scheduler();
  }
  m.next_lane("exited", warp.waiting ? warp.at : At::current());
}

void Machine::leave_to_scheduler() { change(lane_->fiber, scheduler_); }

// Runs another lane of this warp until this one can go on.
void Machine::next_lane(const char* how, At at) {
  Lane& leaving = *lane_;
  Warp& warp = *warp_;
  if (warp.ready == 0)
    fail(std::string(warp.what) + " by part of a warp: " + list(warp.waiting, warp.index) + " wait at " + location(warp.at) +
             "; the others exited, this one last " + how,
         at);
  const int mine = leaving.index % kWarp;
  const int next = (mine + 1 + std::countr_zero(std::rotr(warp.ready, mine + 1))) % kWarp;
  warp.ready &= ~(1u << next);
  lane_ = &warp.lane[next];
  change(leaving.fiber, lane_->fiber);
}

void Machine::collect(const char* what, const void* argument, Collective run, At at) {
  Warp& warp = *warp_;
  Lane& lane = *lane_;
  const uint32_t mine = 1u << lane.index % kWarp;
  if (warp.waiting == 0) {
    warp.what = what;
    warp.at = at;
  } else if (warp.what != what || !same(warp.at, at)) {
    fail(std::string(what) + " by part of a warp: " + list(warp.waiting, warp.index) + " are in " + warp.what + " at " +
             location(warp.at),
         at);
  }
  lane.argument = argument;
  warp.waiting |= mine;
  if (warp.waiting != kAll) return next_lane("waiting here", at);
  count_requests(warp);
  if (!run) {  // a barrier: the scheduler lets the whole block go on
    warp.at_barrier = true;
    return leave_to_scheduler();
  }
  const void* arguments[kWarp];
  for (int i = 0; i < kWarp; ++i) arguments[i] = warp.lane[i].argument;
  run(warp, arguments);
  warp.waiting = 0;
  warp.ready = kAll & ~mine;
  if (switching_ && random_() % 4 < static_cast<unsigned>(switching_)) {
    warp.ready |= mine;
    leave_to_scheduler();
  }
}

void Machine::sync_warp(At at) {
  collect("sync_warp", nullptr, [](Warp& warp, const void* const*) { warp.synced = ++machine().clock_; }, at);
}

bool Machine::barrier(const char* what, bool vote, At at) {
  votes_ |= vote;
  collect(what, nullptr, nullptr, at);
  return vote_;
}

void Machine::release_barrier() {
  const auto at_barrier = [](const auto& warp) { return warp->at_barrier; };
  const Warp& first = **std::find_if(warps_.begin(), warps_.end(), at_barrier);
  for (auto& warp : warps_) {
    if (warp->at_barrier && same(first.at, warp->at) && first.what == warp->what) continue;
    warp_ = warp.get();
    fail("divergent barrier: this warp " + (warp->at_barrier ? "is at " + location(warp->at) : "has exited") + ", warp " +
             std::to_string(first.index) + " waits in " + first.what + " here",
         first.at);
  }
  barrier_ = ++clock_;
  vote_ = std::exchange(votes_, false);
  for (auto& warp : warps_) {
    warp->at_barrier = false;
    warp->waiting = 0;
    warp->ready = kAll;
    warp->synced = barrier_;
  }
}

void Machine::run_block() {
  block_start_ = barrier_ = ++clock_;
  std::fill(shared_.begin(), shared_.end(), ~uint64_t{0});  // NaN in every format, and no valid index
  std::fill(shared_cells_.begin(), shared_cells_.end(), Cell{.writer = kUndefined});
  votes_ = false;
  for (auto& warp : warps_) {
    warp->ready = kAll;
    warp->waiting = warp->exited = 0;
    warp->at_barrier = false;
    warp->synced = block_start_;
    for (Lane& lane : warp->lane) {
      unsigned char* stack = stacks_ + static_cast<size_t>(lane.index) * kStack;
      ASAN_UNPOISON_MEMORY_REGION(stack + kGuard, kStack - kGuard);  // frames that a failure left behind
      prepare(lane.fiber, stack + kGuard, kStack - kGuard, lane_main);
      lane.groups = 0;
      lane.copies.clear();
    }
    for (Site& site : warp->sites) {
      site.used = 0;
      std::fill(std::begin(site.count), std::end(site.count), uint16_t{0});
    }
  }
  std::vector<Warp*> can_run;
  for (;;) {
    can_run.clear();
    bool finished = true;
    for (auto& warp : warps_) {
      finished &= warp->exited == kAll;
      if (warp->exited != kAll && !warp->at_barrier) can_run.push_back(warp.get());
    }
    if (finished) return;
    if (can_run.empty()) {
      release_barrier();
      continue;
    }
    warp_ = can_run[random_() % can_run.size()];
    const int turn = static_cast<int>(random_() % kWarp);
    const int next = (turn + std::countr_zero(std::rotr(warp_->ready, turn))) % kWarp;
    warp_->ready &= ~(1u << next);
    lane_ = &warp_->lane[next];
    change(scheduler_, lane_->fiber);
    lane_ = nullptr;
    if (!failure_.empty()) throw Error(failure_);
  }
}

void Machine::launch(const gpu::Launch& launch, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const auto refuse = [&](const std::string& why) { throw Error("launch of " + std::string(launch.kernel) + ": " + why); };
  if (launch.threads == 0 || launch.threads > 1024 || launch.threads % kWarp != 0)
    refuse("expected whole warps and at most 1024 threads, got " + std::to_string(launch.threads));
  if (const unsigned most = max_shared(architecture_); launch.shared_bytes > most)
    refuse("it asks for " + std::to_string(launch.shared_bytes) + " bytes of shared memory, a block on sm_" +
           std::to_string(architecture_) + " gets at most " + std::to_string(most));
  if (!launch.grid.x || !launch.grid.y || !launch.grid.z || launch.grid.y > 65535 || launch.grid.z > 65535)
    refuse("grid outside of what a device takes");
  launch_ = &launch;
  kernel_ = &kernel;
  lane_ = nullptr;
  failure_.clear();
  launches.push_back(launch);
  launch_start_ = ++clock_;
  switching_ = static_cast<int>(random_() % 4);
  while (warps_.size() * kWarp < launch.threads) {
    warps_.push_back(std::make_unique<Warp>());
    warps_.back()->index = static_cast<int>(warps_.size()) - 1;
    for (int i = 0; i < kWarp; ++i) warps_.back()->lane[i].index = warps_.back()->index * kWarp + i;
  }
  warps_.resize(launch.threads / kWarp);
  if (stack_count_ < launch.threads) {
    if (stacks_) munmap(stacks_, stack_count_ * kStack);
    stacks_ = static_cast<unsigned char*>(
        mmap(nullptr, launch.threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stacks_ == MAP_FAILED) refuse("no memory for the threads' stacks");
    stack_count_ = launch.threads;
    for (size_t i = 0; i < stack_count_; ++i) mprotect(stacks_ + i * kStack, kGuard, PROT_NONE);
  }
  shared_.resize((launch.shared_bytes + 7) / 8);
  shared_cells_.resize(shared_.size() * sizeof(uint64_t) / kGrain);
  std::vector<uint64_t> order(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  for (uint64_t i : order) {
    block_ = {static_cast<unsigned>(i % launch.grid.x), static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
              static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
    run_block();
  }
}

}  // namespace rode::emulator
