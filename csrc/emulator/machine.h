// The emulated machine: threads as fibers, warps, one block at a time, and the state of every byte that they share.
//
// Time is one counter, `clock`, that steps at every event that orders memory. Each warp remembers when it was last
// synchronised, the block when its last barrier was; a byte remembers the stamps of its last write and read. Two accesses
// are ordered where such an event lies between them, and are a race otherwise, in whatever order they happened to run.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../cuda/types.cuh"
#include "fiber.h"

namespace rode::emulator {

using At = std::source_location;
inline constexpr int kWarp = 32;
inline constexpr uint32_t kAll = 0xffffffffu;

// A mistake of a kernel; the message names kernel, block, thread and source line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- Memory

// The state of two bytes, the smallest unit that kernels may touch.
struct Cell {
  uint32_t written = 0, read = 0;            // stamps
  uint16_t writer = 0, reader = 0;           // thread, or one of the codes below
  uint16_t written_line = 0, read_line = 0;  // for the message
};
inline constexpr uint16_t kThread = 0x3ff, kInFlight = 0x800, kUndefined = 0x1000;                // writer
inline constexpr uint16_t kSeveralLanes = 0x400, kSeveralWarps = 0x800, kSeveralBlocks = 0x1000;  // reader
inline constexpr int kGrain = 2, kSector = 32, kPage = 4096;

// Bytes of one global sector that this launch touched, and when the counts last saw it.
struct Touched {
  uint32_t bytes = 0, launch = 0, block = 0;
};
struct Page {
  Cell cells[kPage / kGrain];
  Touched loads[kPage / kSector], stores[kPage / kSector];
};

// Bytes are counted as asked for; a sector is 32 bytes, the smallest unit that the caches move.
struct Traffic {
  uint64_t accesses = 0, bytes = 0;             // by threads
  uint64_t requests = 0, sectors = 0, used = 0;  // by warps: unique sectors of each request (L2), bytes used in them
  uint64_t block_sectors = 0;                    // unique in each block: a perfect L1
  uint64_t launch_sectors = 0, launch_used = 0;  // unique in each launch: DRAM behind a perfect L2
};
struct Buffer {
  uintptr_t low, high;
  Traffic loads, stores;
};
struct SharedTraffic {
  uint64_t requests = 0, phases = 0, conflicts = 0;  // conflicts: passes beyond the phases that the width needs
};

// ---- Threads

enum class Space : uint8_t { global, shared };

// Accesses of one warp at one line of the source, lane by lane; the next synchronisation completes them.
struct Request {
  uintptr_t address[kWarp];
  uint8_t bytes[kWarp];  // 0: predicated off
  Buffer* buffer[kWarp];
};
struct Site {
  const char* file;
  uint32_t line, column;
  Space space;
  bool write;
  uint16_t count[kWarp];
  std::vector<Request> requests;
  size_t used = 0;
};

struct Copy {  // one cp.async on its way
  int64_t to;
  uintptr_t from;
  int bytes, valid;
  uint32_t group, issued;
  At at;
};

struct Lane {
  Fiber fiber;
  int index = 0;
  uint32_t groups = 0;  // cp.async groups committed so far
  const void* argument = nullptr;  // of the collective it waits in; lives on its stack
  std::vector<Copy> copies;
};

struct Warp {
  int index = 0;
  uint32_t ready = 0, waiting = 0, exited = 0;  // lanes; the running lane is in none of them
  bool at_barrier = false;
  uint32_t synced = 0;         // stamp of the last __syncwarp or barrier
  const char* what = nullptr;  // the collective that lanes wait in, and where
  At at;
  Lane lane[kWarp];
  std::vector<Site> sites;
};

using Collective = void (*)(Warp&, const void* const* arguments);

// Compute capabilities (80 for 8.0) that can be emulated. They differ in one thing: shared memory that a block may ask for.
inline constexpr int kLeastArchitecture = 86;  // of those, one that gives the least: what runs on it runs on the others
// Bytes of it; throws std::invalid_argument for other architectures.
unsigned max_shared(int architecture);

class Machine {
 public:
  // Forgets all counts and shadows. The seed decides the order of blocks, warps and lanes, the architecture how much shared memory
  // a launch may ask for.
  void reset(uint64_t seed, int architecture = kLeastArchitecture);
  // [data, data + bytes) holds garbage: a read before a write is an error. The bytes are poisoned.
  void undefined(void* data, size_t bytes);
  Buffer* buffer(const void* data, size_t bytes);
  const Buffer* find(const void* data) const;
  const std::map<std::pair<uintptr_t, uintptr_t>, Buffer>& buffers() const { return buffers_; }
  void launch(const gpu::Launch& launch, const std::function<void()>& kernel);

  std::vector<gpu::Launch> launches;
  SharedTraffic shared_loads, shared_stores;  // copies into shared memory count as stores

  // ---- For primitives.h, called on a fiber
  int thread() const { return lane_->index; }
  gpu::Dim block() const { return block_; }
  const gpu::Launch& current() const { return *launch_; }
  void collect(const char* what, const void* argument, Collective run, At at);
  bool barrier(const char* what, bool vote, At at);
  void sync_warp(At at);
  void global(uintptr_t address, int bytes, Buffer* buffer, bool write, bool when, At at);
  void* shared(int64_t address, int bytes, int64_t low, int64_t high, bool write, bool when, At at);
  // A row of 16 bytes that the whole warp reads.
  const void* matrix_row(int64_t address, int64_t low, int64_t high, At at);
  void count_matrix_rows(const uintptr_t* rows, int n);  // a shared load of 16 bytes by each of n lanes
  void copy(int64_t to, int64_t low, int64_t high, uintptr_t from, Buffer* buffer, int bytes, int valid, At at);
  void commit();
  void wait(uint32_t pending);
  [[noreturn]] void fail(const std::string& what, At at);

 private:
  static void lane_main();
  void run_block();
  void next_lane(const char* how, At at);
  void leave_to_scheduler();
  void release_barrier();
  void check(Cell* cells, int bytes, bool write, uint16_t accessor, Space space, At at);
  bool ordered(uint32_t stamp, uint16_t accessor, uint16_t me) const;
  Page& page(uintptr_t address);
  Cell* global_cells(uintptr_t address) { return page(address).cells + address % kPage / kGrain; }
  Cell* shared_cells(int64_t address) { return shared_cells_.data() + address / kGrain; }
  unsigned char* shared_bytes(int64_t address) { return reinterpret_cast<unsigned char*>(shared_.data()) + address; }
  void bounds(int64_t address, int64_t bytes, int64_t align, int64_t low, int64_t high, const char* verb, At at);
  void record(Space space, bool write, uintptr_t address, int bytes, Buffer* buffer, At at);
  void count_requests(Warp& warp);
  void count_global(const Request& request, bool write);
  void count_shared(SharedTraffic& traffic, const uintptr_t* address, const uint8_t* bytes);

  int architecture_ = kLeastArchitecture;
  std::mt19937_64 random_{0};
  uint32_t clock_ = 0, launch_start_ = 0, block_start_ = 0, barrier_ = 0;
  int switching_ = 0;  // of 4: how readily a warp gives way after a collective
  const gpu::Launch* launch_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  gpu::Dim block_;
  Fiber scheduler_;
  Lane* lane_ = nullptr;
  Warp* warp_ = nullptr;
  std::vector<std::unique_ptr<Warp>> warps_;
  unsigned char* stacks_ = nullptr;
  size_t stack_count_ = 0;
  std::string failure_;
  bool vote_ = false, votes_ = false;  // of sync_threads_or: the last one's result, the next one's so far
  std::vector<uint64_t> shared_;  // 64-bit words, for alignment
  std::vector<Cell> shared_cells_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::pair<uintptr_t, Page*> recent_[64];
  std::map<std::pair<uintptr_t, uintptr_t>, Buffer> buffers_;
};

// One machine for the process; a launch from a second thread waits.
extern Machine the_machine;
inline Machine& machine() { return the_machine; }

}  // namespace rode::emulator
