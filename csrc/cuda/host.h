// What the host sides of both passes have in common.
#pragma once

#include "forward.h"
#include "ptx.cuh"

namespace rode::cuda {

template <class T>
gpu::gmem<const T> matrix(const Matrix& m, int64_t rows, int64_t columns) {
  return gpu::gmem<const T>(static_cast<const T*>(m.data), rows > 0 ? (rows - 1) * m.row + columns : 0);
}
template <class T>
gpu::gmem<const T> array(const void* data, int64_t count) {
  return gpu::gmem<const T>(static_cast<const T*>(data), count);
}
template <class T>
gpu::gmem<T> output(void* data, int64_t count) {
  return gpu::gmem<T>(static_cast<T*>(data), count);
}

// Bytes by which rows `ld` elements apart can be copied: 16, 4 or one element.
template <class T>
int copy_width(const void* data, int64_t ld) {
  const auto fits = [&](uint64_t n) {
    return reinterpret_cast<uintptr_t>(data) % n == 0 && static_cast<uint64_t>(ld) * sizeof(T) % n == 0;
  };
  return fits(16) ? 16 : fits(4) ? 4 : static_cast<int>(sizeof(T));
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// What becomes of the launches that a pass describes: they are started, or only asked how much shared memory they take.
struct Start {
  template <class Kernel, class Params>
  int operator()(const gpu::Launch& l, Kernel kernel, const Params& params) const {
    return gpu::launch(l, kernel, params);
  }
};
struct MostShared {
  unsigned& bytes;
  template <class Kernel, class Params>
  int operator()(const gpu::Launch& l, Kernel, const Params&) const {
    if (l.shared_bytes > bytes) bytes = l.shared_bytes;
    return 0;
  }
};

}  // namespace rode::cuda
