"""gloo, by which ranks on a CPU talk: the mean of their gradients, and the network between several nodes."""

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
"""An address that nobody has (RFC 5737): on the way to it is the default route."""


class GlooMean(Callback):
    """FSDP2 asks for the mean of the ranks' gradients; gloo, of PyTorch 2.7, gives their sum and does not say so.

    Lion sees only signs, but its momentum would have another scale in a run that goes on with more or fewer ranks.
    """

    @classmethod
    def where_needed(cls) -> list[Callback]:
        """The callback, where ranks talk through gloo."""
        return [cls()] if dist.get_world_size() > 1 and torch.distributed.get_backend() == "gloo" else []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """All microbatches are done, and the optimizer has not looked yet."""
        for group in state.optimizers[0].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(dist.get_world_size())


def name_interface() -> None:
    """Choose the network by which ranks talk: on one machine its loopback, where nobody else can connect.

    Between several, that by which the first one is reached, where nobody has chosen: gloo asks for the address of this
    machine's own name, which is often a loopback address; rank 1 then fails at once, and rank 0 waits without end.
    """
    if _one_machine():
        if name := interface_to(LOOPBACK):
            os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def meet_on_loopback(timeout: float) -> None:
    """Let several ranks of one machine find each other; PyTorch's own way would listen on every network.

    Args:
        timeout: seconds that a rank waits for the others, now and in every exchange.
    """
    world, rank = dist.get_world_size(), dist.get_global_rank()
    if world == 1 or not _one_machine():
        return
    port, patience, listener = int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout), None
    if rank == 0:
        listener = socket.create_server((LOOPBACK, port), backlog=world).detach()
    # PyTorch's newer store takes no socket that was made for it.
    store = TCPStore(LOOPBACK, port, world, rank == 0, patience, master_listen_fd=listener, use_libuv=False)
    backend = get_device(None).dist_backend
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def _one_machine() -> bool:
    return os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host."""
    own = _own_address(host)
    if own is not None and ip_address(own).is_loopback and host != own:
        own = _own_address(ANYWHERE)  # many systems have their own name in /etc/hosts as 127.0.1.1
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if any(one.address == own for one in known)), None)


def _own_address(host: str) -> str | None:
    """The address of this machine from which it would talk to a host; None where it cannot."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.connect(address)  # nothing is sent
        except OSError:
            return None
        return probe.getsockname()[0].partition("%")[0]
