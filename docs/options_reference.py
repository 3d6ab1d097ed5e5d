"""An extension of griffe: the signature and the arguments of a class of options.

`apt.options` makes both from the fields, so that the source alone does not show them.
"""

import inspect
import re
from typing import Any

from griffe import Class, Extension, Function, Parameter, ParameterKind, Parameters

from apt import options


class OptionsExtension(Extension):
    """Gives each class of options the constructor and the docstring that Python sees."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Read both from the class itself."""
        kind = getattr(options, cls.name, None)
        if not getattr(kind, "OPTIONS", ()) or cls.docstring is None:
            return
        cls.docstring.value = kind.__doc__
        given = map(_parameter, inspect.signature(kind).parameters.values())
        cls.set_member("__init__", Function("__init__", parameters=Parameters(*given)))


def _parameter(one: inspect.Parameter) -> Parameter:
    default = None if one.default is one.empty else repr(one.default)
    annotation = re.sub(r"\b(typing|pathlib)\.", "", inspect.formatannotation(one.annotation))
    kind = ParameterKind.keyword_only
    return Parameter(one.name, annotation=annotation, kind=kind, default=default)
