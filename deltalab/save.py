"""`python -m deltalab.save`, the first name of deltalab-apply's module, for scripts that have it.

Everywhere else `deltalab.save` is the front door's function, also after `import deltalab.save`.
"""

import sys

if __name__ == "__main__":
    from deltalab.applying import main

    main()
else:
    from deltalab.api import save

    sys.modules[__name__] = save  # type: ignore[assignment]
