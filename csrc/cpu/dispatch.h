// Picks the instruction set at run time: the same wheel serves every x86-64 (or other) processor.
#pragma once

#include <string>

#include "../problem.h"

namespace rode {

// Chooses by name ("avx512bf16", "avx512", "avx2", "generic"), or the best one of this processor for "". Throws
// std::invalid_argument for a name that was not built or that the processor lacks.
void set_isa(const std::string& name);
const char* isa();
bool has_openmp();

void forward(const Problem& problem, const ForwardArrays& arrays);
void backward(const Problem& problem, const BackwardArrays& arrays);
// `count` mixtures that read the same x, in arrays that lie in a row. They have the same dtype, tokens, in_features and threads;
// dropout's seeds may differ. All of them have the same dx, which gets the sum, or none has one.
void forward_siblings(const Problem* problems, const ForwardArrays* arrays, int64_t count);
void backward_siblings(const Problem* problems, const BackwardArrays* arrays, int64_t count);
// 1 where dropout keeps element first + i of x, else 0.
void keep_mask(const Dropout& dropout, uint64_t first, int64_t n, float* out);

}  // namespace rode
