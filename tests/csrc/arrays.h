// Arrays of every dtype for random_problems.cpp. Their numbers are decoded by hand: the core's types are what is tried.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/problem.h"

using rode::DType;

struct Random {
  std::mt19937_64 engine;
  // std::uniform_int_distribution differs between libraries
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  int64_t one_of(const std::vector<int64_t>& values) { return values[below(static_cast<int64_t>(values.size()))]; }
  double value() { return static_cast<double>(below(1 << 20)) / (1 << 19) - 1; }  // in [-1, 1)
};

struct Type {
  int64_t bytes;
  int bits;          // of a significand
  int least;         // exponent of the smallest step
  double tolerance;  // error of a sum, as a share of the sum of its terms' sizes
};
inline const Type& type_of(DType dtype) {
  static const Type types[] = {{8, 53, -1074, 1e-13}, {4, 24, -149, 1e-5}, {2, 11, -24, 2e-3}, {2, 8, -133, 1e-2}};
  return types[static_cast<int>(dtype)];
}

// v rounded to nearest even.
inline double rounded(DType dtype, double v) {
  if (v == 0) return v;
  const int step = std::max(std::ilogb(v) + 1 - type_of(dtype).bits, type_of(dtype).least);
  return std::ldexp(std::nearbyint(std::ldexp(v, -step)), step);
}

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline double decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double normal = std::ldexp(fraction + (exponent > 0 ? 1024 : 0), std::max(exponent, 1) - 25);
  const double size = exponent < 31 ? normal : fraction == 0 ? std::numeric_limits<double>::infinity() : kNaN;
  return bits >> 15 ? -size : size;
}
// The bits of v, which is a half or NaN.
inline uint16_t encode_half(double v) {
  if (v != v) return 0x7E00;
  const int sign = std::signbit(v) ? 0x8000 : 0, exponent = v == 0 ? -14 : std::max(std::ilogb(v), -14);
  const int steps = static_cast<int>(std::ldexp(std::fabs(v), 10 - exponent));  // 1024 or more in a normal number
  return static_cast<uint16_t>(sign | (steps + ((exponent + 14) << 10)));
}

// A matrix in a block of memory that ends with its last element; NaN wherever no element was set.
class Table {
 public:
  Table(DType dtype, int64_t rows, int64_t columns) : Table(dtype, rows, columns, {nullptr, columns, 1}, 0) {}

  // At some strides: rows one after the other or apart, transposed, every second column, or (`repeats`) all rows the same one.
  static Table at_some_strides(Random& random, DType dtype, int64_t rows, int64_t columns, bool repeats) {
    rode::Matrix m{nullptr, columns, 1};
    switch (random.below(repeats ? 7 : 6)) {
      case 3:
        m.row = columns + random.below(4);
        break;
      case 4:
        m.row = 1, m.column = rows + random.below(3);
        break;
      case 5:
        m.row = 2 * columns + 1, m.column = 2;
        break;
      case 6:
        m.row = 0;
    }
    return Table(dtype, rows, columns, m, random.below(4));
  }

  // Without a number, at the same strides.
  Table like() const { return Table(dtype_, rows_, columns_, {nullptr, matrix_.row, matrix_.column}, offset_); }

  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  bool repeats() const { return matrix_.row == 0; }
  const rode::Matrix& matrix() const { return matrix_; }
  void* data() const { return matrix_.data; }

  double get(int64_t r, int64_t c) const { return read(at(r, c)); }
  void set(int64_t r, int64_t c, double v) { write(at(r, c), v); }
  void fill(Random& random) {
    for (int64_t r = 0; r < rows_; ++r) fill_row(random, r);
  }
  void fill_row(Random& random, int64_t r) {
    for (int64_t c = 0; c < columns_; ++c) set(r, c, rounded(dtype_, random.value()));
  }
  // Elements of the block that are numbers.
  int64_t numbers() const {
    int64_t count = 0;
    for (int64_t i = 0; i < count_; ++i) count += read(i) == read(i);
    return count;
  }

 private:
  Table(DType dtype, int64_t rows, int64_t columns, const rode::Matrix& strides, int64_t offset)
      : dtype_(dtype), rows_(rows), columns_(columns), offset_(offset), matrix_(strides) {
    count_ = rows == 0 ? 0 : at(rows - 1, columns - 1) + 1;
    bytes_.reset(new char[count_ * type_of(dtype).bytes]);
    for (int64_t i = 0; i < count_; ++i) write(i, kNaN);
    if (count_ > 0) matrix_.data = bytes_.get() + offset * type_of(dtype).bytes;  // an empty tensor has no address
  }

  int64_t at(int64_t r, int64_t c) const { return offset_ + r * matrix_.row + c * matrix_.column; }

  template <class E>
  E load(int64_t i) const {
    E e;
    std::memcpy(&e, bytes_.get() + i * sizeof(E), sizeof e);
    return e;
  }
  template <class E>
  void store(int64_t i, E e) {
    std::memcpy(bytes_.get() + i * sizeof(E), &e, sizeof e);
  }

  double read(int64_t i) const {
    if (dtype_ == DType::float64) return load<double>(i);
    if (dtype_ == DType::float32) return load<float>(i);
    if (dtype_ == DType::float16) return decode_half(load<uint16_t>(i));
    const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(i)) << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  // v is a number of the type, or NaN.
  void write(int64_t i, double v) {
    const float narrow = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (dtype_ == DType::float64) store(i, v);
    if (dtype_ == DType::float32) store(i, narrow);
    if (dtype_ == DType::float16) store(i, encode_half(v));
    if (dtype_ == DType::bfloat16) store(i, static_cast<uint16_t>(bits >> 16));
  }

  DType dtype_;
  int64_t rows_, columns_, offset_, count_;
  rode::Matrix matrix_;
  std::unique_ptr<char[]> bytes_;
};

// A number together with the sum of the sizes of the terms that it is a sum of: rounding errors are a share of that.
struct Number {
  double value = 0, size = 0;
  Number() = default;
  Number(double v) : value(v), size(std::fabs(v)) {}
  Number(double v, double s) : value(v), size(s) {}
  Number& operator+=(const Number& n) {
    value += n.value, size += n.size;
    return *this;
  }
  friend Number operator*(const Number& a, const Number& b) { return {a.value * b.value, a.size * b.size}; }
};

// A matrix of them, zeros at first.
struct Numbers {
  int64_t rows = 0, columns = 0;
  std::vector<Number> of;
  Numbers() = default;
  Numbers(int64_t r, int64_t c) : rows(r), columns(c), of(r * c) {}
  Number& operator()(int64_t r, int64_t c) { return of[r * columns + c]; }
  const Number& operator()(int64_t r, int64_t c) const { return of[r * columns + c]; }
};
