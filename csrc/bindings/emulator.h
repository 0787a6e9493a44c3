// Bindings of the emulated machine: its seed and architecture, undefined memory, and the counts of traffic and launches.
#pragma once

#include <pybind11/pybind11.h>

#include "../emulator/machine.h"

namespace rode::emulator {

inline pybind11::dict counts(const Traffic& t) {
  using namespace pybind11::literals;
  return pybind11::dict("accesses"_a = t.accesses, "bytes"_a = t.bytes, "requests"_a = t.requests, "sectors"_a = t.sectors,
                        "used"_a = t.used, "block_sectors"_a = t.block_sectors, "launch_sectors"_a = t.launch_sectors,
                        "launch_used"_a = t.launch_used);
}

inline pybind11::dict counts(const SharedTraffic& t) {
  using namespace pybind11::literals;
  return pybind11::dict("requests"_a = t.requests, "phases"_a = t.phases, "conflicts"_a = t.conflicts);
}

inline void bind(pybind11::module_& m) {
  pybind11::register_local_exception<Error>(m, "EmulatorError", PyExc_RuntimeError);
  m.def(
      "reset", [](uint64_t seed, int architecture) { machine().reset(seed, architecture); }, pybind11::arg("seed"),
      pybind11::arg("architecture") = kLeastArchitecture);
  m.def("max_shared", &max_shared, pybind11::arg("architecture"));
  m.def("undefined", [](uintptr_t data, size_t bytes) { machine().undefined(reinterpret_cast<void*>(data), bytes); });
  m.def("traffic", [](uintptr_t data) {
    const Buffer* buffer = machine().find(reinterpret_cast<void*>(data));
    if (!buffer) throw pybind11::key_error("no kernel was given this address");
    return pybind11::make_tuple(counts(buffer->loads), counts(buffer->stores));
  });
  m.def("all_traffic", [] {  // loads and stores of every buffer
    pybind11::list all;
    for (const auto& [range, buffer] : machine().buffers()) {
      all.append(counts(buffer.loads));
      all.append(counts(buffer.stores));
    }
    return all;
  });
  m.def("shared_traffic", [] { return pybind11::make_tuple(counts(machine().shared_loads), counts(machine().shared_stores)); });
  m.def("launches", [] {
    using namespace pybind11::literals;
    pybind11::list all;
    for (const gpu::Launch& l : machine().launches)
      all.append(pybind11::dict("kernel"_a = l.kernel, "grid"_a = pybind11::make_tuple(l.grid.x, l.grid.y, l.grid.z),
                                "threads"_a = l.threads, "shared_bytes"_a = l.shared_bytes));
    return all;
  });
}

}  // namespace rode::emulator
