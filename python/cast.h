// How Python calls an operator: a tuple for each of its records, the place last. While it runs, the
// interpreter lock is released and the floating-point mode is the standard one.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "records.h"
#include "steppo/floats.h"

namespace steppo::binding {

// Runs body() without the interpreter lock. There is no guard object for it: once the interpreter
// has ended, taking the lock ends a thread (before Python 3.14), and a destructor would make that
// the end of the process by std::terminate.
template <class F>
void without_lock(F&& body) {
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    PyEval_RestoreThread(thread);
    throw;
  }
  PyEval_RestoreThread(thread);
}

// A tuple of the caller's, which keeps it alive. An object that owned it would be destroyed where
// the interpreter has ended and a thread that comes back is unwound, and would end the process.
template <class>
using Tuple = pybind11::handle;

template <class... Records>
void def(pybind11::module_& m, const char* name, void (*kernel)(const Records&...)) {
  m.def(name, [kernel](Tuple<Records>... tuples) {
    const std::tuple<Records...> records{record_of<Records>(tuples)...};
    without_lock([&] {
      const StandardFloats standard;
      std::apply(kernel, records);
    });
  });
  // The names that a test compares with those of the launchers.
  pybind11::dict operators = m.attr("operators");
  operators[name] = pybind11::make_tuple(Names<Records>::kRecord...);
  pybind11::dict records = m.attr("records");
  ((records[Names<Records>::kRecord] = pybind11::tuple(pybind11::cast(std::vector<std::string>(
        std::begin(Names<Records>::kFields), std::end(Names<Records>::kFields))))),
   ...);
}

}  // namespace steppo::binding
