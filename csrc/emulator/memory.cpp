// Memory: bounds, alignment, races, copies on their way, and counts of traffic.
#include <algorithm>
#include <bit>
#include <cstring>

#include "machine.h"

namespace rode::emulator {
namespace {

std::string by(uint16_t accessor, uint16_t line) {
  const int thread = accessor & kThread;
  const std::string lanes = "warp " + std::to_string(thread / kWarp);
  const std::string name = accessor & kSeveralBlocks  ? "several blocks"
                           : accessor & kSeveralWarps ? "several warps"
                           : accessor & kSeveralLanes ? lanes
                                                      : "thread " + std::to_string(thread);
  return name + ", line " + std::to_string(line);
}

// Adds `more` to a short list of (sector, bytes used in it).
struct Sectors {
  struct Entry {
    uintptr_t sector;
    uint32_t bytes;
  } entry[2 * kWarp];
  int n = 0;

  void add(uintptr_t sector, uint32_t bytes) {
    for (int i = n - 1; i >= 0; --i)  // from the end: neighbours share
      if (entry[i].sector == sector) {
        entry[i].bytes |= bytes;
        return;
      }
    entry[n++] = {sector, bytes};
  }
};

}  // namespace

void Machine::reset(uint64_t seed, int architecture) {
  max_shared(architecture);  // or it throws
  architecture_ = architecture;
  random_.seed(seed);
  launches.clear();
  shared_loads = shared_stores = {};
  buffers_.clear();
  pages_.clear();
  std::fill(std::begin(recent_), std::end(recent_), std::pair<uintptr_t, Page*>{});
}

Page& Machine::page(uintptr_t address) {
  const uintptr_t number = address / kPage;
  auto& [known, recent] = recent_[number % std::size(recent_)];
  if (!recent || known != number) {
    auto& slot = pages_[number];
    if (!slot) slot = std::make_unique<Page>();
    known = number;
    recent = slot.get();
  }
  return *recent;
}

void Machine::undefined(void* data, size_t bytes) {
  if (bytes > 0) std::memset(data, 0xff, bytes);  // memory without bytes may have no address
  const auto first = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t a = first; a < first + bytes; a += kGrain) *global_cells(a) = Cell{.writer = kUndefined};
}

Buffer* Machine::buffer(const void* data, size_t bytes) {
  const auto low = reinterpret_cast<uintptr_t>(data);
  return &buffers_.try_emplace({low, low + bytes}, Buffer{low, low + bytes, {}, {}}).first->second;
}

const Buffer* Machine::find(const void* data) const {
  const auto found = buffers_.lower_bound({reinterpret_cast<uintptr_t>(data), 0});
  return found != buffers_.end() && found->first.first == reinterpret_cast<uintptr_t>(data) ? &found->second : nullptr;
}

// ---- Rules

void Machine::bounds(int64_t address, int64_t bytes, int64_t align, int64_t low, int64_t high, const char* verb, At at) {
  if (address < low || address + bytes > high)
    fail(std::string(verb) + " out of bounds: bytes " + std::to_string(address - low) + " to " +
             std::to_string(address - low + bytes) + " of a range of " + std::to_string(high - low),
         at);
  if (address % align != 0)
    fail(std::string(verb) + " misaligned: " + std::to_string(align) + " bytes, " + std::to_string(address % align) +
             " past a multiple of that",
         at);
}

// Whether what `accessor` did at `stamp` comes before what this thread does now.
bool Machine::ordered(uint32_t stamp, uint16_t accessor, uint16_t me) const {
  if (stamp < launch_start_) return true;
  if (accessor & kSeveralBlocks || stamp < block_start_) return false;  // nothing orders blocks of a launch
  if (stamp < barrier_) return true;
  if (accessor & kSeveralWarps || (accessor & kThread) / kWarp != warp_->index) return false;
  return stamp < warp_->synced || accessor == me;
}

void Machine::check(Cell* cells, int bytes, bool write, uint16_t me, Space space, At at) {
  const uint32_t now = warp_->synced;
  const auto line = static_cast<uint16_t>(at.line());
  const char* where = space == Space::shared ? "shared" : "global";
  const auto race = [&](const char* verb, uint32_t stamp, uint16_t accessor, uint16_t other_line) {
    fail(std::string("race in ") + where + " memory: " + (write ? "a write" : "a read") + " here, not ordered after the " + verb +
             " by " + by(accessor, other_line) + (stamp < block_start_ ? " of another block" : ""),
         at);
  };
  Cell before, after;
  for (Cell* cell = cells; cell != cells + (bytes + kGrain - 1) / kGrain; ++cell) {
    if (cell != cells && std::memcmp(cell, &before, sizeof before) == 0) {  // as its neighbour was: what a wide access left
      *cell = after;
      continue;
    }
    before = *cell;
    if (cell->writer & kInFlight)
      fail(std::string(write ? "write to" : "read of") + " shared memory that an asynchronous copy is on its way to, issued by " +
               by(cell->writer & kThread, cell->written_line),
           at);
    if (cell->writer & kUndefined && !write)
      fail(std::string("read of ") + where + " memory that was never written", at);
    if (!ordered(cell->written, cell->writer & kThread, me))
      race("write", cell->written, cell->writer & kThread, cell->written_line);
    if (write) {
      if (!ordered(cell->read, cell->reader, me)) race("read", cell->read, cell->reader, cell->read_line);
      cell->written = now;
      cell->writer = me;
      cell->written_line = line;
      after = *cell;
      continue;
    }
    uint16_t reader = me;  // unless others read as well since the last event that would order a write after them
    if (cell->read >= launch_start_ && (cell->reader == kSeveralBlocks || cell->read < block_start_))
      reader = kSeveralBlocks;
    else if (cell->read >= barrier_ && (cell->reader & kSeveralWarps || (cell->reader & kThread) / kWarp != warp_->index))
      reader = kSeveralWarps;
    else if (cell->read >= warp_->synced && cell->reader != me)
      reader = static_cast<uint16_t>(kSeveralLanes | warp_->index * kWarp);
    cell->read = now;
    cell->reader = reader;
    cell->read_line = line;
    after = *cell;
  }
}

// ---- Accesses

void Machine::global(uintptr_t address, int bytes, Buffer* buffer, bool write, bool when, At at) {
  record(Space::global, write, address, when ? bytes : 0, buffer, at);
  if (!when) return;
  if (!buffer) fail("access through a null gmem", at);
  bounds(static_cast<int64_t>(address), bytes, bytes, static_cast<int64_t>(buffer->low),
         static_cast<int64_t>(buffer->high), write ? "global store" : "global load", at);
  check(global_cells(address), bytes, write, static_cast<uint16_t>(thread()), Space::global, at);
}

void* Machine::shared(int64_t address, int bytes, int64_t low, int64_t high, bool write, bool when, At at) {
  record(Space::shared, write, static_cast<uintptr_t>(address), when ? bytes : 0, nullptr, at);
  if (!when) return nullptr;
  bounds(address, bytes, bytes, low, high, write ? "shared store" : "shared load", at);
  check(shared_cells(address), bytes, write, static_cast<uint16_t>(thread()), Space::shared, at);
  return shared_bytes(address);
}

const void* Machine::matrix_row(int64_t address, int64_t low, int64_t high, At at) {
  bounds(address, 16, 16, low, high, "ldmatrix", at);
  check(shared_cells(address), 16, false, static_cast<uint16_t>(kSeveralLanes | warp_->index * kWarp), Space::shared, at);
  return shared_bytes(address);
}

void Machine::copy(int64_t to, int64_t low, int64_t high, uintptr_t from, Buffer* buffer, int bytes, int valid, At at) {
  const auto me = static_cast<uint16_t>(thread());
  if (valid < 0 || valid > bytes) fail("cp_async of " + std::to_string(valid) + " valid bytes", at);
  record(Space::global, false, from, valid, buffer, at);
  record(Space::shared, true, static_cast<uintptr_t>(to), bytes, nullptr, at);
  if (valid > 0) {
    if (!buffer) fail("cp_async through a null gmem", at);
    bounds(static_cast<int64_t>(from), valid, bytes, static_cast<int64_t>(buffer->low),
           static_cast<int64_t>(buffer->high), "cp_async from global memory", at);
    check(global_cells(from), valid, false, me, Space::global, at);
  }
  bounds(to, bytes, bytes, low, high, "cp_async to shared memory", at);
  check(shared_cells(to), bytes, true, me, Space::shared, at);
  for (int i = 0; i < bytes / kGrain; ++i) shared_cells(to)[i].writer |= kInFlight;
  std::memset(shared_bytes(to), 0xff, static_cast<size_t>(bytes));
  lane_->copies.push_back({to, from, bytes, valid, lane_->groups, warp_->synced, at});
}

void Machine::commit() { ++lane_->groups; }

// Copies land here, as late as they may, and count as written now: others see them after the next barrier.
void Machine::wait(uint32_t pending) {
  auto& copies = lane_->copies;
  const auto landed = std::find_if(copies.begin(), copies.end(),
                                   [&](const Copy& c) { return c.group + pending >= lane_->groups; });
  for (auto copy = copies.begin(); copy != landed; ++copy) {
    if (copy->valid > 0) {  // the source is read until now
      const Cell* source = global_cells(copy->from);
      for (int i = 0; i < (copy->valid + kGrain - 1) / kGrain; ++i)
        if (source[i].written > copy->issued)
          fail("overwritten while this copy was on its way, by " + by(source[i].writer & kThread, source[i].written_line), copy->at);
      check(global_cells(copy->from), copy->valid, false, static_cast<uint16_t>(thread()), Space::global, copy->at);
      std::memcpy(shared_bytes(copy->to), reinterpret_cast<const void*>(copy->from), static_cast<size_t>(copy->valid));
    }
    std::memset(shared_bytes(copy->to) + copy->valid, 0, static_cast<size_t>(copy->bytes - copy->valid));
    for (int i = 0; i < copy->bytes / kGrain; ++i) {
      shared_cells(copy->to)[i].writer = static_cast<uint16_t>(thread());
      shared_cells(copy->to)[i].written = warp_->synced;
    }
  }
  copies.erase(copies.begin(), landed);
}

// ---- Counts

void Machine::record(Space space, bool write, uintptr_t address, int bytes, Buffer* buffer, At at) {
  auto& sites = warp_->sites;
  auto site = std::find_if(sites.begin(), sites.end(), [&](const Site& s) {
    return s.line == at.line() && s.column == at.column() && s.file == at.file_name() && s.space == space && s.write == write;
  });
  if (site == sites.end())
    site = sites.insert(site, Site{at.file_name(), at.line(), at.column(), space, write, {}, {}, 0});
  const int lane = thread() % kWarp;
  const uint16_t turn = site->count[lane]++;
  if (turn == 0xffff) fail("65536 accesses here without synchronisation: does it wait for another block?", at);
  if (turn >= site->used) {
    if (turn >= site->requests.size()) site->requests.emplace_back();
    std::memset(site->requests[turn].bytes, 0, sizeof site->requests[turn].bytes);
    site->used = turn + 1u;
  }
  Request& request = site->requests[turn];
  request.address[lane] = address;
  request.bytes[lane] = static_cast<uint8_t>(bytes);
  request.buffer[lane] = buffer;
}

void Machine::count_requests(Warp& warp) {
  for (Site& site : warp.sites) {
    if (site.used == 0) continue;
    for (size_t i = 0; i < site.used; ++i) {
      const Request& request = site.requests[i];
      if (site.space == Space::global)
        count_global(request, site.write);
      else
        count_shared(site.write ? shared_stores : shared_loads, request.address, request.bytes);
    }
    site.used = 0;
    std::fill(std::begin(site.count), std::end(site.count), uint16_t{0});
  }
}

void Machine::count_global(const Request& request, bool write) {
  Sectors sectors;
  Traffic* traffic = nullptr;
  for (int i = 0; i < kWarp; ++i) {
    if (request.bytes[i] == 0) continue;
    if (!traffic) {
      traffic = write ? &request.buffer[i]->stores : &request.buffer[i]->loads;
      ++traffic->requests;
    }
    ++traffic->accesses;
    traffic->bytes += request.bytes[i];
    const uintptr_t offset = request.address[i] % kSector;  // accesses are aligned: none crosses a sector
    sectors.add(request.address[i] / kSector, ((1u << request.bytes[i]) - 1) << offset);
  }
  for (int i = 0; i < sectors.n; ++i) {
    const uintptr_t sector = sectors.entry[i].sector;
    const uint32_t bytes = sectors.entry[i].bytes;
    Page& p = page(sector * kSector);
    Touched& touched = (write ? p.stores : p.loads)[sector % (kPage / kSector)];
    ++traffic->sectors;
    traffic->used += static_cast<uint64_t>(std::popcount(bytes));
    if (touched.launch != launch_start_) {
      touched = {0, launch_start_, 0};
      ++traffic->launch_sectors;
    }
    if (touched.block != block_start_) {
      touched.block = block_start_;
      ++traffic->block_sectors;
    }
    traffic->launch_used += static_cast<uint64_t>(std::popcount(bytes & ~touched.bytes));
    touched.bytes |= bytes;
  }
}

// 32 banks of 4 bytes; 8-byte accesses go in 2 phases of 16 lanes, 16-byte ones in 4 of 8. A phase takes as many passes
// as the busiest bank (or group of banks, for wide accesses) has different words.
void Machine::count_shared(SharedTraffic& traffic, const uintptr_t* address, const uint8_t* bytes) {
  const unsigned width = std::max<unsigned>(*std::max_element(bytes, bytes + kWarp), 4);
  const int lanes = static_cast<int>(4 * kWarp / width);  // of a phase, and groups of banks
  ++traffic.requests;
  for (int first = 0; first < kWarp; first += lanes) {
    uintptr_t words[kWarp][kWarp];
    int n[kWarp] = {}, passes = 0;
    for (int i = first; i < first + lanes; ++i) {
      if (bytes[i] == 0) continue;
      const uintptr_t word = address[i] / width, group = word % static_cast<unsigned>(lanes);
      uintptr_t* known = words[group];
      if (std::find(known, known + n[group], word) == known + n[group]) known[n[group]++] = word;
      passes = std::max(passes, n[group]);
    }
    if (passes == 0) continue;
    ++traffic.phases;
    traffic.conflicts += static_cast<uint64_t>(passes - 1);
  }
}

void Machine::count_matrix_rows(const uintptr_t* rows, int n) {
  uint8_t bytes[kWarp] = {};
  std::fill(bytes, bytes + n, uint8_t{16});
  count_shared(shared_loads, rows, bytes);
}

}  // namespace rode::emulator
