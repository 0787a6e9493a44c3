// Several mixtures that read the same x: what each of them needs, side by side.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "expand.h"

namespace {

// An object for each mixture. They take scratch when they are made, so the last one goes first.
template <class Object>
class Each {
 public:
  Each() = default;
  Each(const Each&) = delete;
  ~Each() {
    while (!all_.empty()) all_.pop_back();
  }

  template <class... Arguments>
  void add(Arguments&&... arguments) {
    all_.push_back(std::make_unique<Object>(std::forward<Arguments>(arguments)...));
  }
  Object& operator[](int64_t j) const { return *all_[j]; }

 private:
  std::vector<std::unique_ptr<Object>> all_;
};

// The most tokens that a unit of any of them has, and whether each thread lays out the weights of all for itself.
inline int64_t unit_of_all(const rode::Problem* p, int64_t count) {
  int64_t unit = 0;
  for (int64_t j = 0; j < count; ++j) unit = unit_tokens(p[j]) > unit ? unit_tokens(p[j]) : unit;
  return unit;
}
template <class T>
bool own_weights(const rode::Problem* p, int64_t count) {
  int64_t bytes = 0;
  for (int64_t j = 0; j < count; ++j) bytes += weight_bytes<T>(p[j]);
  return p->threads > 1 && bytes <= kOwnBytes;
}

}  // namespace
