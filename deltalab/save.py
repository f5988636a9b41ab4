"""The first name of deltalab-apply's module, for scripts that have it: `python -m deltalab.save`.

`deltalab.save` is the front door's function; who imports the module of that name can still call it.
"""

import sys
from types import ModuleType

from deltalab import api
from deltalab.applying import main


class _Callable(ModuleType):
    """A module that is called as the function is."""

    __call__ = staticmethod(api.save)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
