"""The errors that cross module borders; the type says who is to blame."""


class GatekeeperError(Exception):
    """Anything gatekeeper raises on purpose."""


class ListenError(GatekeeperError):
    """A listening address could not be opened; the message names the address, the cause and, when known, its owner."""


class SnapshotError(GatekeeperError):
    """Bytes that claim to be a snapshot are not one: nothing in them may be used."""


class KernelError(GatekeeperError):
    """The kernel cannot refuse for us; the message says what is missing and how to mend it."""


class ChannelClosed(GatekeeperError):
    """The process at the other end of a control channel is gone."""
