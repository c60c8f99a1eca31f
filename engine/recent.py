"""The last few results of something, by key."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """At most `limit` values, the least recently used given up first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.values: OrderedDict[Hashable, Any] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.values

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, made if it is not there; what `make` raises leaves nothing behind."""
        if key not in self.values:
            value = make()
            while len(self.values) >= self.limit:
                self.values.popitem(last=False)
            self.values[key] = value
        self.values.move_to_end(key)
        return self.values[key]

    def drop(self, key: Hashable) -> None:
        """Forget one, if it is there."""
        self.values.pop(key, None)

    def clear(self) -> None:
        self.values.clear()
