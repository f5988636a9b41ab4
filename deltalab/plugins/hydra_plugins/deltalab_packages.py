"""Hydra's search path: the configs of installed packages that bring options for deltalab."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class PackagesSearchPath(SearchPathPlugin):
    """Append the `conf` of every package that `deltalab.settings.packages` finds."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from deltalab.settings import packages

        for package in packages():
            search_path.append(provider=package.name, path=f"file://{package.conf}")
