// Peak rates of this processor: multiply-adds from registers, reads and copies of memory. Compiled by benchmarks/peak.py when it is
// needed, with -march=native. Functions run on `threads` threads and return the seconds from their common start to the last.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
#if defined(__aarch64__)
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+x"
#endif
// Independent sums: two units of latency 4 to 5 are kept busy, and 16 registers suffice. Variables, for compilers keep an array in memory.
constexpr int kChains = 12;
#define FOR_EACH_CHAIN(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

volatile float sink;  // what is stored there cannot be left out

template <class Work>
double timed(int threads, Work work) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
        pool.emplace_back([&, t] {
            ++ready;
            while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
            work(t);
        });
    while (ready.load() < threads) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    go.store(true, std::memory_order_release);
    for (auto& thread : pool) thread.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

float sum(Vector v) {
    float total = 0;
    for (size_t i = 0; i < kBytes / sizeof(float); ++i) total += v[i];
    return total;
}

void read(const char* p, size_t bytes) {
    Vector sums[8] = {};
    for (size_t i = 0; i < bytes; i += 8 * kBytes)
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) {
            Vector v;
            std::memcpy(&v, p + i + c * kBytes, kBytes);
            sums[c] += v;
        }
    for (const Vector& v : sums) sink = sum(v);
}

}  // namespace

extern "C" {

// Operations (a multiplication and an addition are two) of one repetition on one thread.
double float32_operations() { return 2.0 * kChains * kBytes / sizeof(float); }

double float32_seconds(long repetitions, int threads) {
    return timed(threads, [=](int t) {
        const Vector a = Vector{} + (0.5f + t), b = Vector{} + 0.25f;
#define START(c) Vector chain##c = a;
#define STEP(c)                \
    chain##c = chain##c * b + a; \
    asm volatile("" : IN_REGISTER(chain##c));  // neither merged with its neighbours nor left out
#define STORE(c) sink = sum(chain##c);
        FOR_EACH_CHAIN(START)
        for (long i = 0; i < repetitions; ++i) { FOR_EACH_CHAIN(STEP) }
        FOR_EACH_CHAIN(STORE)
#undef START
#undef STEP
    });
}

// 0 where the processor has no products of bfloat16 pairs.
double bfloat16_operations() {
#if defined(__AVX512BF16__)
    return 2.0 * kChains * 32;
#else
    return 0.0;
#endif
}

double bfloat16_seconds(long repetitions, int threads) {
#if defined(__AVX512BF16__)
    return timed(threads, [=](int t) {
        const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3d00);
#define START(c) __m512 chain##c = _mm512_set1_ps(float(t));
#define STEP(c)                                  \
    chain##c = _mm512_dpbf16_ps(chain##c, a, b); \
    asm volatile("" : IN_REGISTER(chain##c));
        FOR_EACH_CHAIN(START)
        for (long i = 0; i < repetitions; ++i) { FOR_EACH_CHAIN(STEP) }
        FOR_EACH_CHAIN(STORE)
    });
#else
    (void)repetitions, (void)threads;
    return 0.0;
#endif
}

// Reads `bytes`, a share for each thread.
double read_seconds(const char* from, size_t bytes, int threads) {
  const size_t per_thread = bytes / threads / (8 * kBytes) * (8 * kBytes);
  return timed(threads, [=](int t) { read(from + t * per_thread, per_thread); });
}

// The time to read `bytes` once, by this thread that has just done so: from cache as far as they fit.
double read_again_seconds(const char* from, size_t bytes, int times) {
    bytes = bytes / (8 * kBytes) * (8 * kBytes);
    read(from, bytes);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < times; ++i) read(from, bytes);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / times;
}

double copy_seconds(const char* from, char* to, size_t bytes, int threads) {
  const size_t per_thread = bytes / threads;
  return timed(threads, [=](int t) { std::memcpy(to + t * per_thread, from + t * per_thread, per_thread); });
}

}  // extern "C"
