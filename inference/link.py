"""What ranks say to each other, and how many bytes of it: ``torch.distributed``, gloo between CPUs and nccl between GPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Link:
    """One rank's end of a process group.

    Attributes:
        rank, ranks: its number from 0, and how many there are.
        reduced_bytes, gathered_bytes, sent_bytes: of the tensors this rank has put into sums and maxima, into gatherings, and
            into messages. On the wire a sum is more or less, as the backend does it: ``2 (ranks - 1) / ranks`` times its bytes
            in a ring.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self.reduced_bytes = self.gathered_bytes = self.sent_bytes = 0
        self._group = group

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all ranks, element by element, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(operation)
        self._group.allreduce([x], options).wait()
        self.reduced_bytes += x.numel() * x.element_size()
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's ``x``, all of one shape."""
        found = [torch.empty_like(x) for _ in range(self.ranks)]
        self._group.allgather([found], [x.contiguous()]).wait()
        self.gathered_bytes += x.numel() * x.element_size()
        return found

    def send(self, x: Tensor, to: int) -> dist.Work:
        """Start sending; ``x`` must stay as it is until the result has been waited for."""
        self.sent_bytes += x.numel() * x.element_size()
        return self._group.send([x], to, 0)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Fill ``x`` with what ``source`` sends next."""
        self._group.recv([x], source, 0).wait()
        return x

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """``source``'s ``x`` on all ranks, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._group.broadcast([x], options).wait()
        if self.rank == source:
            self.sent_bytes += x.numel() * x.element_size()
        return x
