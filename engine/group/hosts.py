"""Several machines that form one group, as the environment of ComfyUI says."""

from collections.abc import Mapping
from dataclasses import dataclass

from .loopback import FIRST_PORT

COUNT, ADDRESS, TOKEN = "ZIMAGE_GROUP_HOSTS", "ZIMAGE_GROUP_ADDRESS", "ZIMAGE_GROUP_TOKEN"
ANYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Hosts:
    """count: of machines, this one included; address: of this one for the others; rendezvous: a free port of it, for
    torchrun. On the others, launcher/inside/node.py runs their ranks. All are given the same token, in the
    environment's ZIMAGE_GROUP_TOKEN.
    """

    count: int
    address: str
    rendezvous: int = FIRST_PORT - 1

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Hosts | None":
        """As ZIMAGE_GROUP_HOSTS and ZIMAGE_GROUP_ADDRESS say; None for this machine alone.

        Raises ValueError for what cannot be, and where the token is missing.
        """
        count, address = environ.get(COUNT) or "1", environ.get(ADDRESS, "")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(
                f"{COUNT} is {count!r}. It is how many machines share the work; unset it for this one alone."
            )
        if int(count) == 1:
            return None
        if not address or address in ANYWHERE:
            said = f"{COUNT} is {count}, but {ADDRESS} is {address!r}."
            raise ValueError(f"{said} Set it to the address by which the other machines reach this one.")
        if not environ.get(TOKEN):
            raise ValueError(f"{COUNT} is {count}, but {TOKEN} is not set. Set it to the same secret on every machine.")
        return cls(int(count), address)
