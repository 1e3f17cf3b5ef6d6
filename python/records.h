// How a tuple of Python becomes a record of csrc/include/steppo/records.inc: field by field, in the
// order of the table. Pointers arrive as integers (Tensor.data_ptr(), 0 for null).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>

#include "steppo/arguments.h"

namespace steppo::binding {

// The entries of a tuple, one after the other.
class Entries {
 public:
  Entries(pybind11::handle tuple, const char* record, Py_ssize_t fields) : tuple_(tuple) {
    if (!PyTuple_Check(tuple.ptr())) {
      throw pybind11::type_error(std::string(record) + ": got " + Py_TYPE(tuple.ptr())->tp_name +
                                 ", expected a tuple");
    }
    const Py_ssize_t size = PyTuple_GET_SIZE(tuple.ptr());
    if (size != fields) {
      throw pybind11::value_error(std::string(record) + ": got " + std::to_string(size) +
                                  " fields, expected " + std::to_string(fields));
    }
  }

  template <class T>
  void next(T& field) {
    PyObject* const entry = PyTuple_GET_ITEM(tuple_.ptr(), at_++);
    if constexpr (std::is_pointer_v<T>) {
      field = address<T>(entry);
    } else if constexpr (std::is_same_v<T, Number>) {
      number(entry, field);
    } else if constexpr (std::is_floating_point_v<T>) {
      field = PyFloat_AsDouble(entry);
    } else if constexpr (std::is_enum_v<T>) {
      // A name of a configuration travels as its position, among numbers.
      field = static_cast<T>(static_cast<int>(PyFloat_AsDouble(entry)));
    } else {
      field = static_cast<T>(PyLong_AsLongLong(entry));
    }
  }

 private:
  template <class T>
  static T address(PyObject* entry) {
    return reinterpret_cast<T>(static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(entry)));
  }

  // None, or (address, value). An address alone may be one that a GPU cannot read.
  static void number(PyObject* entry, Number& field) {
    field = {nullptr, 0.0, entry != Py_None};
    if (!field.is_given) return;
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 2) {
      throw pybind11::type_error("a number: expected None or (address, value)");
    }
    field.at = address<const double*>(PyTuple_GET_ITEM(entry, 0));
    field.value = PyFloat_AsDouble(PyTuple_GET_ITEM(entry, 1));
  }

  pybind11::handle tuple_;
  Py_ssize_t at_ = 0;
};

// The name of a record and the names of its fields.
template <class R>
struct Names;

#define STEPPO_RECORD(record)                       \
  template <>                                       \
  struct Names<record> {                            \
    static constexpr const char* kRecord = #record; \
    static constexpr const char* kFields[] = {
#define STEPPO_FIELD(type, name) #name,
#define STEPPO_END(record) \
  }                        \
  ;                        \
  }                        \
  ;
#include "steppo/records.inc"
#undef STEPPO_RECORD
#undef STEPPO_FIELD
#undef STEPPO_END

template <class R>
R record_of(pybind11::handle tuple);

#define STEPPO_RECORD(record)                                                          \
  template <>                                                                          \
  inline record record_of<record>(pybind11::handle tuple) {                            \
    Entries entries(tuple, Names<record>::kRecord, std::size(Names<record>::kFields)); \
    record made;
#define STEPPO_FIELD(type, name) entries.next(made.name);
#define STEPPO_END(record)                                   \
  if (PyErr_Occurred()) throw pybind11::error_already_set(); \
  return made;                                               \
  }
#include "steppo/records.inc"
#undef STEPPO_RECORD
#undef STEPPO_FIELD
#undef STEPPO_END

}  // namespace steppo::binding
