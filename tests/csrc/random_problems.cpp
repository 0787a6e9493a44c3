// Random problems for the CPU core without Python, each compared with the formula in float64. test_sanitizers.py builds it.
//
//   random_problems FIRST COUNT ISA...
//
// Problems FIRST to FIRST + COUNT - 1, on each of these instruction sets that this processor has, with one thread and with several;
// some of them with siblings, and some from two callers at once. Arrays are blocks of memory of just their size, freed after each
// problem: AddressSanitizer sees what is read beyond them, or later.
#include <stdexcept>
#include <thread>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/scratch.h"
#include "trial.h"

// csrc/cpu/scratch.cpp is compiled with these names. Where threads keep no scratch each block of it is malloc's, and its end is
// watched too.
namespace rode {
bool keeps_scratch = true;
void* take_kept_scratch(std::size_t bytes);
void give_back_kept_scratch(std::size_t bytes, bool kept);
void* take_scratch(std::size_t bytes) { return keeps_scratch ? take_kept_scratch(bytes) : nullptr; }
void give_back_scratch(std::size_t bytes, bool kept) {
  if (keeps_scratch) give_back_kept_scratch(bytes, kept);
}
}  // namespace rode

namespace {

void run_alone(const Trial& trial, int threads, const std::string& how) {
  const rode::Problem p = trial.problem(threads);
  const Trial::Forward f = trial.start_forward();
  rode::forward(p, f.arrays);
  trial.check(f, how);
  const Table dx = trial.empty_dx();
  const Trial::Backward b = trial.start_backward(f, dx);
  rode::backward(p, b.arrays);
  trial.check(b, how);
  trial.check_dx(dx, trial.expected_dx(), how);
}

void run_siblings(const std::vector<Trial>& trials, int threads, const std::string& how) {
  const int64_t count = static_cast<int64_t>(trials.size());
  std::vector<rode::Problem> problems;
  std::vector<Trial::Forward> forward;
  std::vector<Trial::Backward> backward;
  std::vector<rode::ForwardArrays> forward_arrays;
  std::vector<rode::BackwardArrays> backward_arrays;
  for (const Trial& trial : trials) {
    problems.push_back(trial.problem(threads));
    forward.push_back(trial.start_forward());
    forward_arrays.push_back(forward.back().arrays);
  }
  rode::forward_siblings(problems.data(), forward_arrays.data(), count);
  const Table dx = trials[0].empty_dx();
  Numbers expected_dx = trials[0].expected_dx();
  for (int64_t j = 0; j < count; ++j) {
    trials[j].check(forward[j], how);
    backward.push_back(trials[j].start_backward(forward[j], dx));
    backward_arrays.push_back(backward.back().arrays);
    for (size_t i = 0; j > 0 && i < expected_dx.of.size(); ++i) expected_dx.of[i] += trials[j].expected_dx().of[i];
  }
  rode::backward_siblings(problems.data(), backward_arrays.data(), count);
  for (int64_t j = 0; j < count; ++j) trials[j].check(backward[j], how);
  trials[0].check_dx(dx, expected_dx, how);
}

template <class Run>
void twice_at_once(const Run& run) {
  std::thread other(run);
  run();
  other.join();
}

void run(int64_t number, const std::vector<std::string>& isas) {
  std::vector<Trial> trials;
  trials.emplace_back(number);
  for (int64_t j = 1; number % 4 == 1 && j < 3; ++j) trials.push_back(Trial(number + j * 1000003, &trials[0]));
  for (const std::string& isa : isas)
    for (int threads : {1, 2, 3 + static_cast<int>(number % 3)}) {
      rode::set_isa(isa);
      rode::keeps_scratch = (number + threads) % 2 == 0;
      const std::string how = isa + ", " + std::to_string(threads) + " threads" + (rode::keeps_scratch ? "" : ", no kept scratch");
      const auto alone = [&] { run_alone(trials[0], threads, how); };
      const auto siblings = [&] { run_siblings(trials, threads, how + ", siblings"); };
      number % 4 == 3 && threads == 2 ? twice_at_once(alone) : alone();
      if (trials.size() > 1) number % 8 == 5 && threads == 2 ? twice_at_once(siblings) : siblings();
    }
}

bool has(const std::string& isa) {
  try {
    rode::set_isa(isa);
    return true;
  } catch (const std::invalid_argument&) {  // not built, or not in this processor
    return false;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::puts("expected the first problem's number, how many problems to run, and on which instruction sets"), 2;
  twice_at_once(rode::isa);  // the first calls, which choose the best one
  const int64_t first = std::atoll(argv[1]), count = std::atoll(argv[2]);
  std::vector<std::string> isas;
  for (int i = 3; i < argc; ++i)
    if (has(argv[i])) isas.push_back(argv[i]);
  for (int64_t number = first; number < first + count; ++number) run(number, isas);
  std::printf("%lld problems are right on", static_cast<long long>(count));
  for (const std::string& isa : isas) std::printf(" %s", isa.c_str());
  std::puts("");
}
