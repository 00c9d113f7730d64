"""Hypothesis runs the block manager against a naive reference: dicts of lists, and a memory of tokens by slot.

The reference learns only physical block numbers from the manager. It computes from the tokens alone what is stored, who
holds which block, which lookup hits, and what each slot contains.
"""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import labkit as lk

TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=14)
SALTS = st.sampled_from([None, None, None, "x"])
ADAPTERS = st.sampled_from([None, None, None, "A"])
POLICIES = ["lru", "lru", "ttl", "fifo", "lfu", "slru", "s3-fifo", "cost", lambda block: -block.freed_at]
SECOND = 1_000_000_000


def make(policy):
    return lk.TTL(seconds=1.0) if policy == "ttl" else policy


class BlockMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(4, 14), size=st.integers(1, 4), policy=st.sampled_from(POLICIES))
    def begin(self, num_blocks, size, policy):
        self.bm = lk.BlockManager(num_blocks, size, eviction=make(policy))
        self.size, self.num_blocks, self.policy = size, num_blocks, policy
        self.in_order = policy in ("lru", "ttl")  # blocks are evicted in the order of their release
        self.tables: dict[str, list[int]] = {}  # name -> token ids
        self.root: dict[str, tuple] = {}  # name -> (salt, adapter)
        self.blocks: dict[str, list[int]] = {}  # name -> physical blocks
        self.stored: dict[int, tuple] = {}  # block -> (salt, adapter, every token up to its end)
        self.idle: list[int] = []  # stored blocks that nobody holds, in order of release
        self.since: dict[int, int] = {}  # idle block -> when it was released
        self.memory: dict[tuple[int, int], int] = {}  # (block, place) -> token
        self.pins: list[tuple[object, list[int], int | None]] = []
        self.made, self.now = 0, 0

    # -- the reference -------------------------------------------------------------------------------------------

    def count(self) -> Counter:
        held = [block for blocks in self.blocks.values() for block in blocks]
        return Counter(held + [block for _, blocks, _ in self.pins for block in blocks])

    def hit(self, tokens, root, most=None) -> int:
        """Whole blocks that a prompt may take from the cache."""
        known = set(self.stored.values())
        usable = max(len(tokens) - 1, 0) // self.size if most is None else most
        k = 0
        while k < usable and (*root, tuple(tokens[: (k + 1) * self.size])) in known:
            k += 1
        return k

    def release(self, blocks) -> None:
        """Call after `blocks` were taken out of the books, last of the chain first."""
        count = self.count()
        for block in reversed(blocks):
            if not count[block] and block in self.stored and block not in self.idle:
                self.idle.append(block)
                self.since[block] = self.now

    def take_over(self, name: str, fresh: list[int]) -> None:
        """`fresh` blocks were given to a table: nobody held them, and what they stored is gone."""
        evicted = [block for block in fresh if block in self.stored]
        assert all(block in self.idle for block in evicted), "a block in use was given away"
        if self.in_order:
            assert evicted == self.idle[: len(evicted)], "not the longest unused first"
        for block in evicted:
            self.idle.remove(block)
            del self.stored[block]

    def write(self, name: str, start: int, tokens) -> None:
        blocks, root = self.blocks[name], self.root[name]
        self.tables[name][start:] = tokens
        everything = self.tables[name]
        for at in range(start, len(everything)):
            self.memory[blocks[at // self.size], at % self.size] = everything[at]
        for i in range(start // self.size, len(everything) // self.size):
            self.stored[blocks[i]] = (*root, tuple(everything[: (i + 1) * self.size]))

    def num_blocks_for(self, n: int) -> int:
        return -(-n // self.size)

    def state(self) -> tuple:
        bm = self.bm
        tables = {name: (bm.table(name).blocks, bm.table(name).tokens) for name in bm.tables.row_of}
        return tables, bm.pool.count.tolist(), list(bm.pool.free), bm.eviction.candidates(), dict(bm.prefix.block_of)

    # -- rules ---------------------------------------------------------------------------------------------------

    @rule(tokens=TOKENS, salt=SALTS, adapter=ADAPTERS)
    def allocate(self, tokens, salt, adapter):
        self.made += 1
        name, root = f"t{self.made}", (salt, adapter)
        k = self.hit(tokens, root)
        needed = self.num_blocks_for(len(tokens)) - k
        look = self.bm.lookup(tokens, salt=salt, adapter=adapter)
        assert look.num_hit == k * self.size
        revived = sum(block in self.idle for block in look.blocks)
        available = self.num_blocks - len(self.count()) - revived
        if needed > available:
            before = self.state()
            with pytest.raises(lk.OutOfBlocksError, match=f"table '{name}' needs {needed} more blocks"):
                self.bm.allocate(name, tokens, salt=salt, adapter=adapter)
            assert self.state() == before
            return
        blocks = self.bm.allocate(name, tokens, salt=salt, adapter=adapter).blocks
        for i in range(k):
            assert self.stored[blocks[i]] == (*root, tuple(tokens[: (i + 1) * self.size]))
        self.idle = [block for block in self.idle if block not in blocks[:k]]
        self.take_over(name, blocks[k:])
        self.tables[name], self.root[name], self.blocks[name] = list(tokens[: k * self.size]), root, blocks
        self.write(name, k * self.size, tokens[k * self.size :])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def append(self, data, tokens):
        self.append_to(data.draw(st.sampled_from(sorted(self.tables))), tokens)

    def partial(self) -> list[str]:
        return sorted(name for name, tokens in self.tables.items() if len(tokens) % self.size)

    @precondition(lambda self: self.partial())
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6), one_leaves=st.booleans())
    def fork_and_write_on(self, data, tokens, one_leaves):
        """Both write into the block they share, in either order; or one leaves, and the other need not copy."""
        source = data.draw(st.sampled_from(self.partial()))
        first, second = data.draw(st.permutations([source, self.fork_from(source)]))
        self.append_to(first, tokens)
        self.every_table_reads_back_its_own_tokens()
        if one_leaves:
            self.free_table(first)
        self.append_to(second, tokens[::-1])

    def append_to(self, name, tokens):
        old, have = list(self.blocks[name]), len(self.tables[name])
        inside = have < len(old) * self.size
        last = old[have // self.size] if inside else None
        copies = inside and (self.count()[last] > 1 or last in self.stored)
        needed = self.num_blocks_for(have + len(tokens)) - len(old) + copies
        if needed > self.num_blocks - len(self.count()):
            before = self.state()
            with pytest.raises(lk.OutOfBlocksError):
                self.bm.append(name, tokens)
            assert self.state() == before
            return
        blocks = self.bm.append(name, tokens).blocks
        assert blocks[: have // self.size] == old[: have // self.size]
        fresh = blocks[len(old) :]
        if copies:
            copy = blocks[have // self.size]
            assert copy != last, "written into a block that another table shares or that is stored"
            for place in range(have % self.size):
                self.memory[copy, place] = self.memory[last, place]
            fresh = [copy, *fresh]
        elif inside:
            assert blocks[have // self.size] == last, "copied without need"
        count = self.count()
        assert not any(count[block] for block in fresh)
        released = [last] if copies else []
        self.blocks[name] = blocks
        if copies and self.in_order and last in self.stored and not self.count()[last]:
            self.take_over(name, fresh[:1])  # the copy is taken before the original is released
            self.release(released)
            fresh = fresh[1:]
        else:
            self.release(released)
        self.take_over(name, fresh)
        self.write(name, have, tokens)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        self.fork_from(data.draw(st.sampled_from(sorted(self.tables))))

    def fork_from(self, source) -> str:
        self.made += 1
        name = f"t{self.made}"
        self.bm.fork(source, name)
        self.tables[name], self.root[name] = list(self.tables[source]), self.root[source]
        self.blocks[name] = list(self.blocks[source])
        return name

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        self.free_table(data.draw(st.sampled_from(sorted(self.tables))))

    def free_table(self, name):
        self.bm.free(name)
        blocks = self.blocks.pop(name)
        del self.tables[name], self.root[name]
        self.release(blocks)

    @rule(tokens=TOKENS, ttl=st.sampled_from([None, 1.0]))
    def pin(self, tokens, ttl):
        k = self.hit(tokens, (None, None), most=len(tokens) // self.size)
        pin = self.bm.pin(tokens, ttl=ttl)
        assert pin.num_tokens == k * self.size
        self.idle = [block for block in self.idle if block not in pin.blocks]
        self.pins.append((pin, list(pin.blocks), None if ttl is None else self.now + SECOND))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        pin, blocks, _ = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.bm.unpin(pin)
        self.release(blocks)

    @rule()
    def half_a_second_passes(self):
        self.now += SECOND // 2
        self.bm.tick(self.now)
        if self.policy == "ttl":
            for block in [block for block in self.idle if self.since[block] <= self.now - SECOND]:
                self.idle.remove(block)
                del self.stored[block]
        for entry in [entry for entry in self.pins if entry[2] is not None and entry[2] <= self.now]:
            self.pins.remove(entry)
            self.release(entry[1])

    @rule(policy=st.sampled_from(POLICIES[2:]))
    def swap_the_eviction_policy(self, policy):
        self.bm.eviction = make(policy)
        self.policy, self.in_order = policy, False
        self.since.update(dict.fromkeys(self.idle, self.now))  # a new policy counts from now on

    @rule()
    def reset(self):
        if self.count():
            before = self.state()
            with pytest.raises(RuntimeError, match="blocks are in use"):
                self.bm.reset()
            assert self.state() == before
        else:
            self.bm.reset()
            self.stored.clear()
            self.idle.clear()

    @rule(
        bad=st.sampled_from(
            [
                lambda bm: bm.free("nobody"),
                lambda bm: bm.append("nobody", [1]),
                lambda bm: bm.fork("nobody", "new"),
                lambda bm: bm.allocate("new", [0, 0.5]),
                lambda bm: bm.allocate("new", [0, -1]),
                lambda bm: bm.allocate("", [1]),
            ]
        )
    )
    def bad_input_changes_nothing(self, bad):
        before = self.state()
        with pytest.raises(ValueError):
            bad(self.bm)
        assert self.state() == before

    # -- laws ----------------------------------------------------------------------------------------------------

    @invariant()
    def laws_hold(self):
        self.bm.check()

    @invariant()
    def counts_are_tables_plus_pins(self):
        count = self.count()
        assert self.bm.pool.count.tolist() == [count[block] for block in range(self.num_blocks + 1)]
        assert sorted(self.bm.eviction.candidates()) == sorted(self.idle)
        assert self.bm.num_used + self.bm.num_cached + self.bm.num_free == self.num_blocks

    @invariant()
    def every_table_reads_back_its_own_tokens(self):
        for name, tokens in self.tables.items():
            table = self.bm.table(name)
            assert table.tokens == tokens and table.blocks == self.blocks[name]
            assert len(table) == self.num_blocks_for(len(tokens))
            read = [self.memory[table.place(i)] for i in range(len(tokens))]
            assert read == tokens, f"{name} reads back other tokens than it wrote"

    @invariant()
    def lookups_hit_what_is_stored(self):
        for name, tokens in self.tables.items():
            salt, adapter = self.root[name]
            look = self.bm.lookup([*tokens, 1], salt=salt, adapter=adapter)
            assert look.num_hit == self.hit([*tokens, 1], (salt, adapter)) * self.size
            assert self.bm.explain([*tokens, 1], salt=salt, adapter=adapter).num_hit == look.num_hit


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
