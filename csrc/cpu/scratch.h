// Memory that a thread keeps from call to call, for scratch that comes and goes like a stack: fresh pages would cost more than the
// work of many calls.
#pragma once

#include <cstddef>

namespace rode {

// Takes `bytes`, a multiple of 64, on a cache line; null if the memory that this thread keeps has no room.
void* take_scratch(std::size_t bytes);

// Gives back the block that this thread took last; `kept`: it was not null. When nothing is taken, the thread makes room for the
// most that was wanted at a time, up to 32 MiB, for the next calls.
void give_back_scratch(std::size_t bytes, bool kept);

// The most bytes that each living thread of this process has taken at a time, summed.
std::size_t scratch_bytes();

}  // namespace rode
