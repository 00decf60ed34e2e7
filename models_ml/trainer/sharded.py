"""Embedding tables split by rows over the ranks, for tables that are too large for one of them.

Each rank holds R / W of a table's rows, their gradients and their optimizer state, and no rank ever holds the whole. Looking up
is DTensor's: the ranks' codes are gathered, each rank reads the rows it has, and the sums go back to who asked. Checkpoints
hold whole tables, so the number of ranks may change between runs. DTensor is imported where a table is looked up: it takes half
a second of processor time, which a server, that imports this file with the models, need not spend.
R rows of a table, W ranks, D width, C codes of a rank.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models_ml.trainer.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class RowShardedEmbedding(nn.Module):
    """In the place of an nn.Embedding: `weight` is this rank's rows [ceil(R / W), D]; behind the last of all they are zeros.

    All ranks must call it as often as one another; their codes may differ, in number too.
    """

    def __init__(self, table: nn.Embedding, mesh: DeviceMesh):
        super().__init__()
        self.num_embeddings, self.padding_idx, self._mesh = table.num_embeddings, table.padding_idx, mesh
        self.weight = nn.Parameter(self.rows_of(table.weight.detach()))

    def rows_of(self, whole_RD: Tensor) -> Tensor:
        """This rank's rows of a whole table, as a copy."""
        size, rank = self._mesh.size(), self._mesh.get_local_rank()
        part = -(-self.num_embeddings // size)
        padded = F.pad(whole_RD, (0, 0, 0, part * size - len(whole_RD)))
        return padded[rank * part : (rank + 1) * part].clone()

    def whole(self, rows: Tensor) -> Tensor:
        """The table [R, D] of all ranks' rows; all ranks must ask."""
        return self._of_all(rows.detach()).full_tensor()[: self.num_embeddings]

    def forward(self, codes: Tensor) -> Tensor:
        """[..., D] of int64 codes in [0, R)."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        flat_C = codes.flatten()
        most = torch.tensor([len(flat_C)], device=flat_C.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._mesh.get_group())
        padded_C = F.pad(flat_C, (0, int(most) - len(flat_C)))
        asked = DTensor.from_local(padded_C, self._mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])
        found = cast("DTensor", F.embedding(asked, self._of_all(self.weight)))
        found_CD = found.redistribute(placements=[Shard(0)]).to_local()[: len(flat_C)]
        if self.padding_idx is not None:
            found_CD = found_CD * (flat_C != self.padding_idx).unsqueeze(1)  # so that its row has no gradient
        return found_CD.unflatten(0, codes.shape)

    def _of_all(self, rows: Tensor) -> "DTensor":
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False)


class ShardedTables:
    """The tables of an objective that are split, from `split` to `join`."""

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, fewest_rows: int):
        """fewest_rows: that a table has to have to be split; 0 splits none."""
        self._objective, self._optimizer, self._ranks = objective, optimizer, ranks
        self._fewest = fewest_rows if ranks.size > 1 else 0
        self.tables: dict[str, RowShardedEmbedding] = {}

    def split(self) -> None:
        """Puts sharded tables into the objective, and their rows into the optimizer where the whole ones stood."""
        if not self._fewest:
            return
        mesh = DeviceMesh(self._ranks.device.type, torch.arange(self._ranks.size))
        for name, module in list(self._objective.named_modules()):
            if isinstance(module, nn.Embedding) and module.num_embeddings >= self._fewest:
                self.tables[name] = sharded = RowShardedEmbedding(module, mesh)
                self._put(name, sharded, module.weight, sharded.weight)
                # DDP divides what it adds up by the number of ranks; these rows it never sees
                sharded.weight.register_hook(lambda gradient: gradient / self._ranks.size)

    def join(self) -> None:
        """Puts whole tables back; all ranks must."""
        for name, sharded in self.tables.items():
            whole_RD = sharded.whole(sharded.weight)
            table = nn.Embedding(len(whole_RD), whole_RD.shape[1], padding_idx=sharded.padding_idx, _weight=whole_RD)
            self._put(name, table, sharded.weight, table.weight)
        self.tables = {}

    def _put(self, name: str, module: nn.Module, before: Tensor, after: Tensor) -> None:
        self._objective.set_submodule(name, module)
        for group in self._optimizer.param_groups:
            group["params"] = [after if parameter is before else parameter for parameter in group["params"]]

    @property
    def names(self) -> list[str]:
        """Of the parameters that differ from rank to rank."""
        return [f"{name}.weight" for name in self.tables]

    def norm(self) -> Tensor:
        """Of all ranks' gradients of the split tables together; all ranks must ask."""
        square = torch.zeros((), device=self._ranks.device)
        for sharded in self.tables.values():
            if sharded.weight.grad is not None:
                square += sharded.weight.grad.square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def whole_state(self) -> dict[str, Any]:
        """(model, optimizer) with whole tables, as an objective that is not split has them; all ranks must ask."""
        return self._changed(
            lambda sharded, rows: sharded.whole(rows), self._objective.state_dict(), self._optimizer.state_dict()
        )

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """`whole_state`'s answer, of any number of ranks."""
        state = self._changed(lambda sharded, whole: sharded.rows_of(whole), model, optimizer)
        self._objective.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _changed(
        self, change: Callable[[RowShardedEmbedding, Tensor], Tensor], model: dict[str, Tensor], optimizer: dict[str, Any]
    ) -> dict[str, Any]:
        model, states = dict(model), dict(optimizer["state"])
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for name, sharded in self.tables.items():
            model[f"{name}.weight"] = change(sharded, model[f"{name}.weight"])
            [number] = [number for number, parameter in enumerate(parameters) if parameter is sharded.weight]
            if number in states:
                states[number] = {
                    key: change(sharded, value) if isinstance(value, Tensor) and value.dim() else value
                    for key, value in states[number].items()
                }
        return {"model": model, "optimizer": {**optimizer, "state": states}}
