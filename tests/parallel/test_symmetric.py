"""Sums through memory that all ranks can read, with ranks as threads and a stand-in for what torch has on GPUs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import labkit.parallel.symmetric as module
from labkit.parallel.connect import TorchGroup

CPU = torch.device("cpu")


class Board:
    """What the ranks have shown each other: one group, its memory, its operations and its process group."""

    def __init__(self, ranks, wrong=0.0, missing=None):
        self.ranks, self.wrong, self.missing = ranks, wrong, missing
        self.barrier = threading.Barrier(ranks)
        self.shown = [None] * ranks
        self.me = threading.local()
        self.calls = []

    def everyone(self, x):
        """x of every rank, by rank."""
        self.shown[self.me.rank] = x
        self.barrier.wait(10)
        found = [one.clone() for one in self.shown]
        self.barrier.wait(10)
        return found

    def sum(self, x):
        total = torch.stack([one.float() for one in self.everyone(x)]).sum(0).to(x.dtype)
        return total + self.wrong * self.me.rank

    def note(self, what):
        if self.me.rank == 0:
            self.calls.append(what)

    def empty(self, *size, dtype, device):
        if self.me.rank == self.missing:
            raise RuntimeError("no peer access")
        return torch.empty(*size, dtype=dtype, device=device)

    def rendezvous(self, tensor, name):
        assert name == "0"

    def one_shot_all_reduce(self, x, how, name):
        self.note("one")
        return self.sum(x)

    def two_shot_all_reduce_(self, x, how, name):
        self.note("two")
        x.copy_(self.sum(x))

    def all_reduce(self, x, group):
        self.note("nccl")
        x.copy_(torch.stack(self.everyone(x)).sum(0))

    def all_gather(self, out, x, group):
        for mine, given in zip(out, self.everyone(x), strict=True):
            mine.copy_(given)

    def run(self, function):
        def one(rank):
            self.me.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.ranks) as pool:
            return [future.result(20) for future in [pool.submit(one, rank) for rank in range(self.ranks)]]


GROUP = SimpleNamespace(group_name="0")


@pytest.fixture
def stand_in(monkeypatch):
    def use(board):
        import torch.distributed._symmetric_memory as memory

        monkeypatch.setattr(memory, "empty", board.empty)
        monkeypatch.setattr(memory, "rendezvous", board.rendezvous)
        monkeypatch.setattr(torch.ops, "symm_mem", board)
        return board

    return use


@pytest.mark.parametrize("ranks", [2, 3])
def test_small_messages_are_summed_there_and_others_by_the_process_group(stand_in, ranks):
    board = stand_in(Board(ranks))
    xs = {
        "small": torch.arange(8.0), "odd": torch.arange(7.0), "large": torch.ones(2**19),
        "middle": torch.ones(200, 2**10, dtype=torch.bfloat16), "integers": torch.arange(8),
    }  # fmt: skip

    def rank(number):
        fast = module.symmetric(GROUP, number, ranks, CPU, board)
        group = TorchGroup(GROUP, number, ranks, fast)
        group.dist = board
        if number == 0:
            board.calls.clear()
        found = {name: group.all_reduce(x * (number + 1)) for name, x in xs.items()}
        return found, group.all_reduce(torch.ones(4), torch.full((4,), 0.5))

    factor = sum(range(1, ranks + 1))
    for found, added in board.run(rank):
        assert all(torch.equal(found[name], x * factor) for name, x in xs.items())
        assert added.tolist() == [ranks + 0.5] * 4
    middle = "one" if ranks == 2 else "nccl"
    small = "one" if ranks == 2 else "two"
    assert board.calls == [small, "nccl", "nccl", middle, "nccl", small]


@pytest.mark.parametrize(
    "board", [Board(2, wrong=0.5), Board(3, wrong=1e-5), Board(2, missing=1)], ids=["wrong", "unequal bits", "missing"]
)
def test_where_it_is_missing_or_wrong_on_one_rank_no_rank_uses_it(stand_in, board, caplog):
    caplog.set_level("INFO", "labkit.engine")
    stand_in(board)
    found = board.run(lambda rank: module.symmetric(GROUP, rank, board.ranks, CPU, board))
    assert found == [None] * board.ranks
    assert len(caplog.records) == 1 and "NCCL sums small messages, too" in caplog.text


def test_what_was_tried_is_tried_for_both_dtypes_and_kinds(stand_in):
    board = stand_in(Board(2))
    assert all(board.run(lambda rank: module.symmetric(GROUP, rank, 2, CPU, board)))
    assert board.calls.count("one") == len(module.SIZES) * len(module.DTYPES)


def test_the_engine_can_leave_it_to_nccl():
    from labkit.engine.build import Options

    assert Options(disable_custom_all_reduce=True).disable_custom_all_reduce
    with pytest.raises(ValueError, match="disable_custom_all_reduce"):
        Options(disable_custom_all_reduce="yes")
