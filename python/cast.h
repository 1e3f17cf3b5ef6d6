// How Python calls a kernel: pointers arrive as integers (Tensor.data_ptr(), 0 for null). While the
// kernel runs, the interpreter lock is released and the floating-point mode is the standard one.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "steppo/floats.h"

namespace steppo::binding {

template <class A>
using FromPython = std::conditional_t<std::is_pointer_v<A>, std::uintptr_t, A>;

template <class A>
A cast(FromPython<A> value) {
  if constexpr (std::is_pointer_v<A>) {
    return reinterpret_cast<A>(value);
  } else {
    return value;
  }
}

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

template <class... A>
void def(pybind11::module_& m, const char* name, void (*kernel)(A...)) {
  m.def(name, [kernel](FromPython<A>... values) {
    without_lock([&] {
      const StandardFloats standard;
      kernel(cast<A>(values)...);
    });
  });
}

}  // namespace steppo::binding
