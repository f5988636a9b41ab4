from deltalab.testing import *  # noqa: F403  every edit of this package keeps the contract
