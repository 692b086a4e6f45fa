"""gloo, the backend between ranks on CPUs: the mean of gradients, and which network the ranks use."""

import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import psutil
import torch
from composer import Callback, Logger, State
from composer.utils import dist, get_device
from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
ANYWHERE = "192.0.2.1"
"""An address that is assigned to no host (RFC 5737): the way to it is the default route."""


class GlooMean(Callback):
    """Divides gradients by the world size: FSDP2 asks gloo for their mean, and with PyTorch 2.7 gets the sum."""

    # Lion uses only signs, but its momentum would have another scale in a run that resumes on more or fewer ranks.

    @classmethod
    def where_needed(cls) -> list[Callback]:
        """The callback, where ranks communicate through gloo."""
        return [cls()] if dist.get_world_size() > 1 and torch.distributed.get_backend() == "gloo" else []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """After the last microbatch and before the optimizer."""
        for group in state.optimizers[0].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(dist.get_world_size())


def name_interface() -> None:
    """Choose the network interface between ranks.

    On one machine it is the loopback, where no other machine can connect; between several, the interface that reaches
    the first machine, unless GLOO_SOCKET_IFNAME is set.
    """
    # gloo's own choice is the address of this machine's host name, often a loopback address: rank 1 then fails at once,
    # and rank 0 waits without end.
    if _one_machine():
        if name := interface_to(LOOPBACK):
            os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def meet_on_loopback(timeout: float) -> None:
    """Connect the ranks of one machine on its loopback; PyTorch's own rendezvous listens on every network.

    Args:
        timeout: seconds that a rank waits for the others, here and in every exchange.
    """
    world, rank = dist.get_world_size(), dist.get_global_rank()
    if world == 1 or not _one_machine():
        return
    port, patience, listener = int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout), None
    if rank == 0:
        listener = socket.create_server((LOOPBACK, port), backlog=world).detach()
    # Without libuv: that store does not accept a socket made outside of it.
    store = TCPStore(LOOPBACK, port, world, rank == 0, patience, master_listen_fd=listener, use_libuv=False)
    backend = get_device(None).dist_backend
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def _one_machine() -> bool:
    return os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host."""
    own = _own_address(host)
    if own is not None and ip_address(own).is_loopback and host != own:
        own = _own_address(ANYWHERE)  # many systems list their host name in /etc/hosts as 127.0.1.1
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if any(address.address == own for address in known)), None)


def _own_address(host: str) -> str | None:
    """This machine's address on the way to a host; None where there is no way."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.connect(address)  # nothing is sent
        except OSError:
            return None
        return probe.getsockname()[0].partition("%")[0]
