"""Structures shared by Python and C++: a definition in Python, compared with that of the loaded library."""

import ctypes

STRUCTURES: dict[str, type[ctypes.Structure]] = {}
"""All defined structures, by name."""


class _Field(ctypes.Structure):
    """`Field` of layout.h."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64))


def define(name: str, pointers: str, integers: str, reals: str = "") -> type[ctypes.Structure]:
    """A ctypes structure with these fields in this order: pointers, 64-bit integers, doubles."""
    kinds = ((pointers, ctypes.c_void_p), (integers, ctypes.c_int64), (reals, ctypes.c_double))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    # slots: an unknown field is an error
    made = type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
    STRUCTURES[name] = made
    return made


def check_layout(library: ctypes.CDLL, kind: type[ctypes.Structure]) -> None:
    """Raise RuntimeError, which names the field, if a structure differs from that of the library (`layout_NAME`)."""
    name = kind.__name__
    try:
        exported = getattr(library, f"layout_{name}")
    except AttributeError:
        raise RuntimeError(f"the C++ library exports no layout of structure {name}; add LAYOUT({name}, ...)") from None
    exported.restype = ctypes.POINTER(_Field)
    theirs: list[tuple[str, int, int]] = []
    found = exported()
    while found[len(theirs)].name:
        field = found[len(theirs)]
        theirs.append((field.name.decode(), field.offset, field.size))
    theirs.append(("(size of the structure)", 0, found[len(theirs)].size))
    ours = [(field, getattr(kind, field).offset, getattr(kind, field).size) for field, *_ in kind._fields_]
    ours.append(("(size of the structure)", 0, ctypes.sizeof(kind)))
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            raise RuntimeError(
                f"structure {name}: Python has field {mine[0]} at byte {mine[1]} with {mine[2]} bytes, C++ has field "
                f"{other[0]} at byte {other[1]} with {other[2]} bytes; make both definitions equal"
            )
