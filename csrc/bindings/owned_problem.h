// A Problem together with the arrays it points to, made from what Python hands over.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../problem.h"

namespace rode {

inline uint64_t dropout_threshold(double p) { return static_cast<uint64_t>(std::floor(std::ldexp(p, 32))); }

struct OwnedProblem {
  std::vector<int64_t> offsets;
  std::vector<double> scaling;
  Problem problem;

  OwnedProblem(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
               const std::vector<double>& factors, double dropout_p, bool dense)
      : offsets{0}, scaling(factors) {
    for (int64_t rank : ranks) offsets.push_back(offsets.back() + rank);
    problem.dtype = static_cast<DType>(dtype);
    problem.tokens = tokens;
    problem.in_features = in_features;
    problem.out_features = out_features;
    problem.experts = static_cast<int64_t>(ranks.size());
    problem.total_rank = offsets.back();
    problem.offsets = offsets.data();
    problem.scaling = scaling.data();
    problem.dense = dense;
    problem.dropout.on = dropout_p > 0.0;
    problem.dropout.threshold = dropout_threshold(dropout_p);
  }
  OwnedProblem(const OwnedProblem&) = delete;  // the problem points into this object
};

}  // namespace rode
