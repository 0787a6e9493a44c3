// Memory that a thread keeps from call to call, for scratch that comes and goes as a stack does: fresh pages would cost more than
// many a call's work.
#pragma once

#include <cstddef>

namespace rode {

// `bytes`, a multiple of 64, on a cache line; null where what this thread keeps has no room.
void* take_scratch(std::size_t bytes);

// What this thread took last, `kept` if it was not null. Once it has nothing, room is made for as much as was wanted at a time, up
// to 32 MiB: the next calls find it.
void give_back_scratch(std::size_t bytes, bool kept);

// Bytes that the threads of this process have taken at a time at most, summed over those that live.
std::size_t scratch_bytes();

}  // namespace rode
