"""What goes wrong in a group of ranks, and what a user can do about it."""

# Kinds of faults. After any of them the state of the ranks is unknown: all are ended and started anew.
START, DEVICE, ENDED, SILENT, SLOW, STUCK = "start", "device", "ended", "silent", "slow", "stuck"
MEMORY, CUDA, EXCHANGE, EXCEPTION = "memory", "cuda", "exchange", "exception"

REMEDIES = {
    START: "Look at the log above for what the processes said.",
    DEVICE: "See whether nvidia-smi lists that GPU and whether other programs hold its memory.",
    ENDED: "If the machine ran out of main memory, its system log says so: free some, or use fewer GPUs.",
    SILENT: "If it comes again, see nvidia-smi and the system log for that GPU, or leave it out.",
    SLOW: "If the picture is very large, use more GPUs or a smaller size; else see nvidia-smi for that GPU.",
    STUCK: "If it comes again, see nvidia-smi and the system log for that GPU, or leave it out.",
    MEMORY: "Choose precision int4, a smaller picture, or close other programs on that GPU.",
    CUDA: "See the system log for that GPU's errors (Xid); if it comes again, leave that GPU out.",
    EXCHANGE: "See whether the GPUs can reach each other: nvidia-smi topo -m, and NCCL_DEBUG=INFO in the log.",
    EXCEPTION: "The log has the whole report; please pass it on to the makers of this pack.",
}


class GroupError(RuntimeError):
    """A request that the group could not do, twice. The message names rank, device, cause and remedy."""

    __module__ = "builtins"  # the host shows users an error's full type name, which would hold the pack's path


class Refused(ValueError):
    """A rank found a request wrong, as this process would have; the ranks are well."""

    __module__ = "builtins"


class Fault(Exception):
    """kind: a key of REMEDIES; what: a sentence without its subject, 'ended', 'ran out of memory: …'; rank: whose."""

    def __init__(self, kind: str, what: str, rank: int | None = None, device: str = ""):
        self.kind, self.what, self.rank, self.device = kind, what, rank, device
        super().__init__(f"{self.subject} {what}")

    @property
    def subject(self) -> str:
        return "the group of ranks" if self.rank is None else f"rank {self.rank} ({self.device})"

    @property
    def remedy(self) -> str:
        return REMEDIES[self.kind]
