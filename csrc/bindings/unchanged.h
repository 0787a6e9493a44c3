// Whether what Python read to come to a decision is still as it was: dictionary items, attributes, results of functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace rode {

// Readings are taken when it is made, and again at each `holds`. To look through fifty of them in Python takes longer than the work
// on one token.
class Unchanged {
 public:
  using Items = std::vector<std::pair<pybind11::dict, pybind11::object>>;
  using Attributes = std::vector<std::pair<pybind11::object, pybind11::str>>;
  using Functions = std::vector<pybind11::object>;

  Unchanged(const Items& items, const Attributes& attributes, const Functions& functions) {
    for (const auto& [dict, key] : items) add(item, dict, key);
    for (const auto& [object, name] : attributes) add(attribute, object, name);
    for (const auto& function : functions) add(result, function, pybind11::object());
  }

  bool holds() const {
    for (const Reading& reading : readings_) {
      const pybind11::object now = read(reading);
      if (!same(reading.value, now) || reading.size != size_of(now)) return false;
    }
    return true;
  }

 private:
  enum Kind { item, attribute, result };
  struct Reading {
    Kind kind;
    pybind11::object owner, key;
    pybind11::object value;  // null: the dictionary has no such item, or reading raised an error
    Py_ssize_t size;
  };

  static pybind11::object read(const Reading& r) {
    PyObject* found = nullptr;
    switch (r.kind) {
      case item:
        found = PyDict_GetItemWithError(r.owner.ptr(), r.key.ptr());
        Py_XINCREF(found);
        break;
      case attribute:
        found = PyObject_GetAttr(r.owner.ptr(), r.key.ptr());
        break;
      case result:
        found = PyObject_CallNoArgs(r.owner.ptr());
        break;
    }
    if (!found) PyErr_Clear();
    return pybind11::reinterpret_steal<pybind11::object>(found);
  }

  // Versions and levels are new integers each time.
  static bool same(const pybind11::object& before, const pybind11::object& now) {
    if (before.ptr() == now.ptr()) return true;
    return before && now && PyLong_CheckExact(before.ptr()) && PyLong_CheckExact(now.ptr()) &&
           PyObject_RichCompareBool(before.ptr(), now.ptr(), Py_EQ) == 1;
  }

  // The entries of a dictionary or a list, which stays the same object when something is put into it; 0 for others.
  static Py_ssize_t size_of(const pybind11::object& o) {
    if (!o || !(PyDict_Check(o.ptr()) || PyList_Check(o.ptr()))) return 0;
    return PyObject_Size(o.ptr());
  }

  void add(Kind kind, const pybind11::object& owner, const pybind11::object& key) {
    Reading reading{kind, owner, key, pybind11::object(), 0};
    reading.value = read(reading);
    reading.size = size_of(reading.value);
    readings_.push_back(std::move(reading));
  }

  std::vector<Reading> readings_;
};

}  // namespace rode
