// Python's side of the kernels. Tensors cross as addresses (data_ptr()) and sizes: the Python half of each op has checked dtype,
// layout and shape before, and holds the tensors while the call runs. Every call that computes releases the GIL.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

namespace nb = nanobind;
using Address = std::uintptr_t;
using Released = nb::call_guard<nb::gil_scoped_release>;

template <class T>
static inline T* at(Address address) { return reinterpret_cast<T*>(address); }
