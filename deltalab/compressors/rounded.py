"""Codes of singular vectors that are rounded, with or without a look at the layer's inputs."""

from deltalab.edits.coded import Coded


class Rounded(Coded):
    """An edit with a field `rounding`: by "gptq" alone it sees the inputs' second moments."""

    rounding: str

    @property
    def axes(self) -> bool:
        """Where it looks at a layer's inputs."""
        return self.rounding == "gptq"

    @property
    def needs(self) -> tuple[str, ...]:
        """What `encode` asks for, the inputs' second moments where it looks at them."""
        return tuple(n for n in super().needs if n != "gram" or self.rounding == "gptq")
