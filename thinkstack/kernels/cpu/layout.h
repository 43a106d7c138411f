// The layout of a structure that Python fills, which structures.py compares when the library is loaded.
#pragma once
#include <cstddef>
#include <cstdint>

struct Field {
  const char* name;  // "" after the last field, with the size of the structure
  int64_t offset, size;
};

// LAYOUT(Name, Type, FIELD(first) FIELD(second) ...) exports layout_Name: every field of the type in order.
#define FIELD(field) {#field, offsetof(T, field), sizeof(T::field)},
#define LAYOUT(name, type, fields)                                            \
  extern "C" const Field* layout_##name() {                                   \
    using T = type;                                                           \
    static const Field found[] = {fields{"", 0, int64_t(sizeof(T))}};         \
    return found;                                                             \
  }
