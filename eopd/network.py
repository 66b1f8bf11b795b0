"""Where this machine is reached by another one."""

import socket


def address_towards(host: str, port: int) -> str:
    """Returns the address of this machine that ``host`` reaches. Nothing is sent to it.

    Raises:
        OSError: there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # UDP connect sends nothing
        probe.connect((host, port))
        return str(probe.getsockname()[0])
