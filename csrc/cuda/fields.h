// Fields of the structs that the bindings fill: each is listed once, as FIELDS(X) with an X(type, name) for every field.
#pragma once

#include <array>
#include <cstdint>

#define RODE_DECLARE(type, name) type name{};

namespace rode::cuda {

using Strides = std::array<int64_t, 2>;
using ThreeFlags = std::array<bool, 3>;

}  // namespace rode::cuda
