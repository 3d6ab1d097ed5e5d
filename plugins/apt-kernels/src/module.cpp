// An empty Python module: it makes the library importable, and Python's packaging builds it.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_library", nullptr, 0, nullptr,
                                 nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__library() { return PyModule_Create(&definition); }
