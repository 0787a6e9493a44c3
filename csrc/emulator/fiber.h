// A stack that can be left and entered again, on which a CUDA thread runs. The switch by hand costs 8 ns where
// swapcontext, which also swaps the signal mask through the kernel, costs 300.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(RODE_UCONTEXT)

namespace rode::emulator {

struct Fiber {
  void* stack_pointer = nullptr;
};

extern "C" void rode_fiber_switch(void** leave, void* enter);

inline void prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // where the entry would return to; it never does, and the slot keeps the ABI's alignment
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;  // the six registers that the switch restores, whatever they hold
}
inline void change(Fiber& leave, Fiber& enter) { rode_fiber_switch(&leave.stack_pointer, enter.stack_pointer); }

}  // namespace rode::emulator

#else
#include <ucontext.h>

namespace rode::emulator {

struct Fiber {
  ucontext_t context;
};

inline void prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
inline void change(Fiber& leave, Fiber& enter) { swapcontext(&leave.context, &enter.context); }

}  // namespace rode::emulator
#endif
