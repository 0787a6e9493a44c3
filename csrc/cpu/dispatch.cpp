#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#ifdef RODE_X86
#include <cpuid.h>
#define RODE_FOR_EACH_ISA(F) F(avx512bf16) F(avx512) F(avx2) F(generic)
#else
#define RODE_FOR_EACH_ISA(F) F(generic)
#endif

namespace rode {

#define RODE_DECLARE(NAME)                                                \
  namespace NAME {                                                        \
  void forward(const Problem&, const ForwardArrays&);                     \
  void backward(const Problem&, const BackwardArrays&);                   \
  void forward_siblings(const Problem*, const ForwardArrays*, int64_t);   \
  void backward_siblings(const Problem*, const BackwardArrays*, int64_t); \
  void keep_mask(const Dropout&, uint64_t, int64_t, float*);              \
  }
RODE_FOR_EACH_ISA(RODE_DECLARE)

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*forward)(const Problem&, const ForwardArrays&);
  void (*backward)(const Problem&, const BackwardArrays&);
  void (*forward_siblings)(const Problem*, const ForwardArrays*, int64_t);
  void (*backward_siblings)(const Problem*, const BackwardArrays*, int64_t);
  void (*keep_mask)(const Dropout&, uint64_t, int64_t, float*);
};

#ifdef RODE_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() {
  unsigned a, b, c = 0, d;  // Clang's __builtin_cpu_supports does not know f16c in every version
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif
bool has_generic() { return true; }

#define RODE_ROW(NAME) \
  {#NAME, has_##NAME, NAME::forward, NAME::backward, NAME::forward_siblings, NAME::backward_siblings, NAME::keep_mask},
const Isa kIsas[] = {RODE_FOR_EACH_ISA(RODE_ROW)};  // best first
std::atomic<const Isa*> chosen{nullptr};  // callers hold no lock

const Isa& current() {
  if (chosen.load(std::memory_order_relaxed) == nullptr) set_isa("");
  return *chosen.load(std::memory_order_relaxed);
}

}  // namespace

void set_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : kIsas) {
    names += std::string(names.empty() ? "" : ", ") + isa.name;
    if (!name.empty() && name != isa.name) continue;
    if (isa.supported()) {
      chosen.store(&isa, std::memory_order_relaxed);
      return;
    }
    if (!name.empty()) throw std::invalid_argument("this processor does not support '" + name + "'");
  }
  throw std::invalid_argument("expected one of " + names + ", got '" + name + "'");
}

const char* isa() { return current().name; }

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void forward(const Problem& p, const ForwardArrays& a) { current().forward(p, a); }
void backward(const Problem& p, const BackwardArrays& a) { current().backward(p, a); }
void forward_siblings(const Problem* p, const ForwardArrays* a, int64_t count) { current().forward_siblings(p, a, count); }
void backward_siblings(const Problem* p, const BackwardArrays* a, int64_t count) { current().backward_siblings(p, a, count); }
void keep_mask(const Dropout& d, uint64_t first, int64_t n, float* out) { current().keep_mask(d, first, n, out); }

}  // namespace rode
