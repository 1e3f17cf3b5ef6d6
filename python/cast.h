// How Python calls a kernel: pointers arrive as integers (Tensor.data_ptr(), 0 for null), and the
// interpreter lock is released while the kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

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

template <class... A>
void def(pybind11::module_& m, const char* name, void (*kernel)(A...)) {
  m.def(
      name, [kernel](FromPython<A>... values) { kernel(cast<A>(values)...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace steppo::binding
