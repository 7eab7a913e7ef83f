"""Groups and statistics where batches miss layers: experts see only the tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

from quantize.blocks import DecoderWalk, linear_layers, set_linear_weight
from quantize.checkpoint import open_checkpoint
from quantize.forwards import Stream, parallel_forward, rerun_forward, run_block, suspended_forward
from quantize.groups import find_groups
from quantize.statistics import Statistics

Group = list[str]
FORWARDS = [suspended_forward, rerun_forward, parallel_forward]
UNREACHED = 7


def expert_layers(number: int) -> Group:
    """Names inside a block of one expert's layers."""
    return [f"mlp.experts.{number}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


class Bench:
    """The first block of a tiny Qwen3-MoE and one short window in each batch, so that every batch misses some experts."""

    def __init__(self, path: Path) -> None:
        self.walk = DecoderWalk(open_checkpoint(str(path)), torch.device("cpu"), torch.float32)
        windows = torch.randint(3, 300, (6, 3), generator=torch.Generator().manual_seed(0))
        self.batches = [self.walk.block_inputs(window) for window in torch.split(windows, 1)]
        self.arguments = self.walk.block_arguments(3)[0]
        self.reached = [self.layers_reached(hidden) for hidden in self.batches]

    def layers_reached(self, hidden: Tensor) -> list[str]:
        """Linear layers in the order in which one batch comes to them."""
        calls: list[str] = []
        with self.walk.loaded_block(0) as block, torch.no_grad():
            handles = [
                layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
                for name, layer in linear_layers(block).items()
            ]
            run_block(block, hidden, self.arguments)
            for handle in handles:
                handle.remove()
        return calls

    def groups(self) -> list[Group]:
        with self.walk.loaded_block(0) as block:
            return find_groups(block, self.batches, self.arguments)

    def run(
        self, forward: Callable[..., None], groups: list[Group], change: bool = True
    ) -> tuple[list[tuple[Group, Tensor | None]], list[Tensor]]:
        """What ``forward`` gives the solver, and the block's outputs; the solver rounds weights coarsely if it may."""
        solved: list[tuple[Group, Tensor | None]] = []
        outputs: dict[int, Tensor] = {}
        with self.walk.loaded_block(0) as block:
            layers = linear_layers(block)

            def solve(names: Group, statistics: Statistics) -> None:
                solved.append((names, statistics.hessian() if statistics.count else None))
                for name in names if change else ():
                    set_linear_weight(layers[name], (layers[name].get_parameter("weight") * 8).round() / 8)

            count = len(self.batches)
            stream = Stream(block, self.batches.__getitem__, outputs.__setitem__)
            forward(groups, count, self.arguments, stream, None, solve)
        return solved, [outputs[batch] for batch in range(count)]


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Path],
    close_expert: Callable[[Path, int], None],
) -> Bench:
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    path = make_checkpoint(tmp_path_factory.mktemp("routing") / "qwen3_moe", config)
    close_expert(path, UNREACHED)
    return Bench(path)


def test_groups_hold_experts_that_the_first_batch_misses(bench: Bench) -> None:
    everywhere = {name for reached in bench.reached for name in reached}
    assert len(bench.reached[0]) < len(everywhere)
    groups = bench.groups()
    assert {name for group in groups for name in group} == everywhere
    assert sum(map(len, groups)) == len(everywhere)
    assert groups[:2] == [[f"self_attn.{name}_proj" for name in "qkv"], ["self_attn.o_proj"]]
    for number in {int(name.split(".")[2]) for name in everywhere if "experts" in name}:
        gate, up, down = expert_layers(number)
        assert groups[groups.index([gate, up]) + 1] == [down]
    assert not any(f"experts.{UNREACHED}." in name for name in everywhere)


def test_order_of_groups_is_an_order_of_execution_of_every_batch(bench: Bench) -> None:
    place = {name: number for number, group in enumerate(bench.groups()) for name in group}
    for reached in bench.reached:
        places = [place[name] for name in reached]
        assert places == sorted(places)


def test_no_batch_is_taken_that_is_not_needed(bench: Bench) -> None:
    taken: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number, hidden in enumerate(bench.batches):
            taken.append(number)
            yield hidden

    with bench.walk.loaded_block(0) as block:
        find_groups(block, batches(), bench.arguments)
    assert taken == list(range(len(bench.batches)))  # the closed expert is looked for everywhere
    taken.clear()
    with bench.walk.loaded_block(1) as block:
        assert len(find_groups(block, batches(), bench.arguments)) == 4
    assert taken == [0]


class Routes(nn.Module):
    """Comes to its layers in the order that the first numbers of the input name."""

    def __init__(self, with_empty: bool = False) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))
        self.with_empty = with_empty

    def forward(self, hidden: Tensor) -> Tensor:
        named = [int(number) for number in hidden[0, :, 0] if number >= 0]
        for number, step in enumerate(self.steps) if self.with_empty else ((n, self.steps[n]) for n in named):
            step(hidden[0, 1:] + 1 if number in named else hidden[0, :0])
        return hidden


def route(*steps: int) -> Tensor:
    """A batch of one window that comes to these steps."""
    hidden = torch.full((1, 6, 4), -1.0)
    hidden[0, : len(steps), 0] = torch.tensor(steps, dtype=torch.float32)
    return hidden


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([(3, 1, 0)], [3, 1, 0]),
        ([(3, 0), (3, 2, 0), (3, 1, 0), (4,)], [3, 1, 2, 0, 4]),
        ([(4, 2), (2, 0), (1, 0)], [1, 4, 2, 0]),
        ([(2, 1), (1, 0), (0, 2)], [0, 1, 2]),  # no order serves all three
    ],
)
def test_sequences_of_batches_are_merged(routes: list[tuple[int, ...]], expected: list[int]) -> None:
    groups = find_groups(Routes(), [route(*steps) for steps in routes], ((), {}))
    assert groups == [[f"steps.{number}"] for number in expected]


def test_every_window_of_a_batch_is_looked_at() -> None:
    block = Routes()
    groups = find_groups(block, [torch.cat([route(2), route(0)]), torch.cat([route(2), route(4)])], ((), {}))
    assert groups == [["steps.0"], ["steps.2"], ["steps.4"]]


def test_layer_first_reached_later_stays_out_of_an_earlier_group() -> None:
    class Sharing(Routes):
        def forward(self, hidden: Tensor) -> Tensor:
            for number, step in enumerate(self.steps[:3]):
                step(hidden if number == 1 or hidden[0, 0, 0] > number else hidden[:, :0])
            return hidden

    block = Sharing()
    groups = find_groups(block, [route(0), route(1), route(4)], ((), {}))
    assert groups == [["steps.0"], ["steps.1"], ["steps.2"]]


@pytest.mark.parametrize("forward", FORWARDS)
def test_hessians_hold_the_rows_routed_to_each_expert(bench: Bench, forward: Callable[..., None]) -> None:
    groups = [*bench.groups(), expert_layers(UNREACHED)[:2]]
    solved, outputs = bench.run(forward, groups, change=False)
    assert [names for names, _ in solved] == groups
    inputs: dict[str, list[Tensor]] = {}
    with bench.walk.loaded_block(0) as block, torch.no_grad():
        for name, layer in linear_layers(block).items():
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        expected = [run_block(block, hidden, bench.arguments) for hidden in bench.batches]
        for layer in linear_layers(block).values():
            layer._forward_pre_hooks.clear()
    assert all(torch.equal(left, right) for left, right in zip(outputs, expected, strict=True))
    for names, found in solved[:-1]:
        statistics = Statistics()
        for rows in inputs[names[0]]:
            statistics.add(rows)
        assert statistics.count == sum(rows.numel() // rows.shape[-1] for rows in inputs[names[-1]])
        assert found is not None and torch.equal(found, statistics.hessian()), names
    assert solved[-1][1] is None
    some = [names for names, _ in solved if len(inputs.get(names[0], [])) in range(1, len(bench.batches))]
    assert some  # there are experts that only some batches reach


def test_suspending_equals_rerunning_where_batches_miss_experts(bench: Bench) -> None:
    groups = [expert_layers(UNREACHED)[:2], *bench.groups(), expert_layers(UNREACHED)[2:]]
    (suspended, left), (rerun, right) = bench.run(suspended_forward, groups), bench.run(rerun_forward, groups)
    assert [names for names, _ in suspended] == [names for names, _ in rerun] == groups
    assert suspended[0][1] is rerun[0][1] is suspended[-1][1] is rerun[-1][1] is None
    for (names, ours), (_, theirs) in zip(suspended[1:-1], rerun[1:-1], strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs), names
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(left, right, strict=True))
    unquantized = bench.run(suspended_forward, [])[1]
    assert not any(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(left, unquantized, strict=True))


@pytest.mark.parametrize("forward", FORWARDS)
def test_calls_without_rows_count_for_nothing(forward: Callable[..., None]) -> None:
    batches = [route(0, 3), route(3), route(1, 3)]
    groups = [[f"steps.{number}"] for number in range(5)]
    solved: dict[bool, list[tuple[Group, Tensor | None]]] = {False: [], True: []}
    for with_empty, found in solved.items():
        block = Routes(with_empty)
        assert find_groups(block, batches, ((), {})) == [["steps.0"], ["steps.1"], ["steps.3"]]

        def solve(names: Group, statistics: Statistics, found: list[tuple[Group, Tensor | None]] = found) -> None:
            found.append((names, statistics.hessian() if statistics.count else None))

        stream = Stream(block, batches.__getitem__, lambda *_: None)
        forward(groups, len(batches), ((), {}), stream, None, solve)
    assert [names for names, _ in solved[True]] == [names for names, _ in solved[False]] == groups
    for number, ((_, ours), (_, theirs)) in enumerate(zip(solved[True], solved[False], strict=True)):
        if number in (0, 1, 3):
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
            assert bool(torch.isfinite(ours).all())
        else:
            assert ours is theirs is None


def test_hessian_counts_rows() -> None:
    statistics = Statistics()
    statistics.add(torch.ones(0, 4))
    assert statistics.count == 0
    with pytest.raises(ValueError, match="no inputs were added"):
        statistics.hessian()
    statistics.add(torch.ones(2, 3, 4))
    statistics.add(torch.ones(5, 4))
    assert statistics.count == 11
