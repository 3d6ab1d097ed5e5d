"""Import rules that import-linter has no contract for."""

import sys

import grimp


def test_the_solver_imports_numerical_packages_and_itself_only():
    """It includes the patterns and the module of devices, which import no more."""
    graph = grimp.build_graph("apt", include_external_packages=True)
    solver = {"apt.solver", "apt.patterns", "apt.devices"}
    solver |= graph.find_descendants("apt.solver") | graph.find_descendants("apt.patterns")
    imported = set.union(*(graph.find_modules_directly_imported_by(module) for module in solver))
    packages = {name.split(".")[0] for name in imported - solver}
    assert packages - sys.stdlib_module_names == {"torch", "numpy", "scipy"}
