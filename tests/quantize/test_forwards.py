"""Running a block while its layers change: every way gives the same, and a failure leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, DecoderWalk, linear_layers, set_linear_weight
from quantize.checkpoint import open_checkpoint
from quantize.forwards import (
    Stream,
    parallel_forward,
    rerun_forward,
    run_block,
    suspended_forward,
)
from quantize.groups import find_groups
from quantize.statistics import Statistics

FORWARDS = [suspended_forward, rerun_forward, parallel_forward]
SEQUENTIAL = [suspended_forward, rerun_forward]
TOKENS = 16


class Bench:
    """A block of a tiny Llama and the hidden states that enter it, in three batches, the last one smaller."""

    def __init__(self, path: Path) -> None:
        self.walk = DecoderWalk(open_checkpoint(str(path)), torch.device("cpu"), torch.float32)
        ids = torch.randint(3, 300, (5, TOKENS), generator=torch.Generator().manual_seed(0))
        self.batches = [self.walk.block_inputs(part) for part in torch.split(ids, 2)]
        self.arguments: Arguments = self.walk.block_arguments(TOKENS)[0]

    def block(self) -> AbstractContextManager[nn.Module]:
        return self.walk.loaded_block(0)

    def groups(self, block: nn.Module) -> list[list[str]]:
        return find_groups(block, self.batches, self.arguments)


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Bench:
    return Bench(tiny_llama)


class Run:
    """One forward over all batches with a solver that rounds weights coarsely; notes all that passes."""

    def __init__(
        self,
        bench: Bench,
        forward: Callable[..., None],
        groups: list[list[str]] | None = None,
        reference: list[Tensor] | None = None,
    ) -> None:
        self.solved: list[tuple[list[str], Tensor]] = []
        self.drifts: list[Tensor | None] = []
        self.reference_outputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.loads: list[int] = []
        with bench.block() as block:
            layers = linear_layers(block)

            def solve(names: list[str], statistics: Statistics) -> None:
                self.solved.append((names, statistics.hessian()))
                self.drifts.append(statistics.drift())
                for name in names:
                    weight = layers[name].get_parameter("weight")
                    set_linear_weight(layers[name], (weight * 8).round() / 8)

            def load(batch: int) -> Tensor:
                self.loads.append(batch)
                return bench.batches[batch]

            def store(batch: int, hidden: Tensor) -> None:
                assert batch not in self.outputs
                self.outputs[batch] = hidden

            groups = bench.groups(block) if groups is None else groups
            twin = copy.deepcopy(block)
            stream = reference and Stream(twin, reference.__getitem__, self.reference_outputs.__setitem__)
            forward(groups, len(bench.batches), bench.arguments, Stream(block, load, store), stream, solve)
            assert hooks(block) == hooks(twin) == 0
            self.final = [run_block(block, hidden, bench.arguments).detach() for hidden in bench.batches]


def hooks(block: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in block.modules())


def layer_inputs(bench: Bench, layer: str, round_first: list[str]) -> list[Tensor]:
    """What reaches ``layer`` in each batch once the layers ``round_first`` are rounded."""
    seen: list[Tensor] = []
    with bench.block() as block, torch.no_grad():
        layers = linear_layers(block)
        for name in round_first:
            set_linear_weight(layers[name], (layers[name].get_parameter("weight") * 8).round() / 8)
        handle = layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for hidden in bench.batches:
            run_block(block, hidden, bench.arguments)
        handle.remove()
    return seen


def test_suspending_equals_rerunning_to_the_bit(bench: Bench) -> None:
    suspended, rerun = Run(bench, suspended_forward), Run(bench, rerun_forward)
    assert [names for names, _ in suspended.solved] == [names for names, _ in rerun.solved]
    for (names, left), (_, right) in zip(suspended.solved, rerun.solved, strict=True):
        assert torch.equal(left, right), names
    assert suspended.outputs.keys() == rerun.outputs.keys() == set(range(len(bench.batches)))
    for batch in suspended.outputs:
        assert torch.equal(suspended.outputs[batch], rerun.outputs[batch])


@pytest.mark.parametrize("forward", FORWARDS)
def test_every_group_is_solved_once_in_order(bench: Bench, forward: Callable[..., None]) -> None:
    run = Run(bench, forward)
    with bench.block() as block:
        assert [names for names, _ in run.solved] == bench.groups(block)


@pytest.mark.parametrize("forward", FORWARDS)
def test_outputs_are_the_quantized_blocks(bench: Bench, forward: Callable[..., None]) -> None:
    run = Run(bench, forward)
    with bench.block() as block:
        unquantized = [run_block(block, hidden, bench.arguments).detach() for hidden in bench.batches]
    for batch, output in run.outputs.items():
        assert torch.equal(output, run.final[batch])
        assert output.shape == bench.batches[batch].shape
        assert not torch.allclose(output, unquantized[batch], atol=1e-4)


@pytest.mark.parametrize("forward", SEQUENTIAL)
def test_each_group_sees_the_groups_before_it_quantized(bench: Bench, forward: Callable[..., None]) -> None:
    earlier: list[str] = []
    for names, hessian in Run(bench, forward).solved:
        expected = Statistics()
        for inputs in layer_inputs(bench, names[0], round_first=earlier):
            expected.add(inputs)
        assert torch.equal(hessian, expected.hessian()), names
        earlier += names


def test_parallel_forward_sees_unquantized_inputs_only(bench: Bench) -> None:
    parallel, sequential = Run(bench, parallel_forward), Run(bench, rerun_forward)
    for names, hessian in parallel.solved:
        expected = Statistics()
        for inputs in layer_inputs(bench, names[0], round_first=[]):
            expected.add(inputs)
        assert torch.equal(hessian, expected.hessian()), names
    assert torch.equal(parallel.solved[0][1], sequential.solved[0][1])
    for (names, left), (_, right) in list(zip(parallel.solved, sequential.solved, strict=True))[1:]:
        assert not torch.equal(left, right), names


@pytest.mark.parametrize("forward", FORWARDS)
def test_layers_left_out_of_the_groups_keep_their_weights(bench: Bench, forward: Callable[..., None]) -> None:
    groups = [["self_attn.v_proj"], ["mlp.down_proj"]]
    run = Run(bench, forward, groups)
    assert [names for names, _ in run.solved] == groups
    assert len(run.outputs) == len(bench.batches)
    assert all(torch.equal(run.outputs[batch], run.final[batch]) for batch in run.outputs)


def test_suspending_loads_each_batch_once(bench: Bench) -> None:
    assert Run(bench, suspended_forward).loads == [0, 1, 2]
    assert Run(bench, rerun_forward).loads == [0, 1, 2] * 5


@pytest.mark.parametrize("forward", SEQUENTIAL)
def test_no_batch_is_run_beyond_the_group_it_is_needed_for(bench: Bench, forward: Callable[..., None]) -> None:
    calls: list[str] = []
    with bench.block() as block:
        groups = bench.groups(block)
        layers = linear_layers(block)
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            layers[name].register_forward_hook(lambda *_, name=name: calls.append(name))
        batches = len(bench.batches)
        stream = Stream(block, bench.batches.__getitem__, lambda batch, hidden: None)
        forward(groups, batches, bench.arguments, stream, None, lambda names, statistics: None)
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            layers[name]._forward_hooks.clear()
    assert calls.count("mlp.down_proj") == batches
    # Rerunning comes past q for each later group and once at the end.
    assert calls.count("self_attn.q_proj") == batches * (1 if forward is suspended_forward else len(groups))


@pytest.mark.parametrize("failing_group", [0, 2])
@pytest.mark.parametrize("forward", FORWARDS)
def test_failure_of_the_solver_propagates_and_leaves_no_hooks(
    bench: Bench, forward: Callable[..., None], failing_group: int
) -> None:
    stored: list[int] = []
    with bench.block() as block:
        groups = bench.groups(block)
        before = [run_block(block, hidden, bench.arguments).detach() for hidden in bench.batches]

        def solve(names: list[str], statistics: Statistics) -> None:
            if names == groups[failing_group]:
                raise ValueError("the Hessian cannot be factorised")

        with pytest.raises(ValueError, match="the Hessian cannot be factorised"):
            stream = Stream(block, bench.batches.__getitem__, lambda batch, _: stored.append(batch))
            forward(groups, len(bench.batches), bench.arguments, stream, None, solve)
        assert hooks(block) == 0
        after = [run_block(block, hidden, bench.arguments).detach() for hidden in bench.batches]
    assert stored == []
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


@pytest.mark.parametrize("forward", FORWARDS)
def test_failure_to_load_or_store_propagates(bench: Bench, forward: Callable[..., None]) -> None:
    def load(batch: int) -> Tensor:
        if batch == 1:
            raise OSError("cannot read batch 1")
        return bench.batches[batch]

    def store(batch: int, hidden: Tensor) -> None:
        raise OSError("cannot write")

    with bench.block() as block:
        groups = bench.groups(block)
        for loads, message in ((load, "cannot read batch 1"), (bench.batches.__getitem__, "cannot write")):
            with pytest.raises(OSError, match=message):
                stream = Stream(block, loads, store)
                forward(groups, len(bench.batches), bench.arguments, stream, None, lambda names, statistics: None)
            assert hooks(block) == 0


@pytest.mark.parametrize("columns", [6, 700])  # below and above one tile of the symmetric update
def test_hessian_is_twice_the_mean_outer_product(columns: int) -> None:
    inputs = torch.randn(3, 10, columns, generator=torch.Generator().manual_seed(0))
    rows = inputs.view(-1, columns).double()
    statistics = Statistics()
    for part in (inputs[:1], inputs[1:, :4], inputs[1:, 4:], torch.empty(0, columns)):
        statistics.add(part)
    assert statistics.count == 30
    assert statistics.hessian().dtype == torch.float32
    assert torch.equal(statistics.hessian(), statistics.hessian().t())
    assert torch.allclose(statistics.hessian().double(), 2 / 30 * rows.t() @ rows, rtol=1e-5, atol=1e-6)
    assert statistics.drift() is None


def test_drift_is_twice_the_mean_product_of_deviation_and_input() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, reference = (torch.randn(3, 10, 6, generator=generator) for _ in range(2))
    statistics = Statistics()
    for part in (slice(0, 1), slice(1, 3)):
        statistics.add(inputs[part], reference[part])
    deviation, rows = (reference - inputs).view(-1, 6).double(), inputs.view(-1, 6).double()
    drift = statistics.drift()
    assert drift is not None
    assert torch.allclose(drift.double(), 2 / 30 * deviation.t() @ rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forward", FORWARDS)
def test_drift_is_collected_against_the_unquantized_model(bench: Bench, forward: Callable[..., None]) -> None:
    undamaged = [hidden + 0.01 * torch.sin(torch.arange(hidden.numel())).view_as(hidden) for hidden in bench.batches]
    run, plain = Run(bench, forward, reference=undamaged), Run(bench, forward)
    with bench.block() as block:
        for batch, hidden in enumerate(undamaged):
            assert torch.equal(run.reference_outputs[batch], run_block(block, hidden, bench.arguments))
    # The reference neither changes what is quantized nor what comes out.
    for (names, left), (_, right) in zip(run.solved, plain.solved, strict=True):
        assert torch.equal(left, right), names
    assert all(torch.equal(run.outputs[batch], plain.outputs[batch]) for batch in run.outputs)
    earlier: list[str] = []
    for (names, _), drift in zip(run.solved, run.drifts, strict=True):
        expected = Statistics()
        damaged = layer_inputs(bench, names[0], round_first=[] if forward is parallel_forward else earlier)
        kept, bench.batches = bench.batches, undamaged
        clean = layer_inputs(bench, names[0], round_first=[])
        bench.batches = kept
        for inputs, reference in zip(damaged, clean, strict=True):
            expected.add(inputs, reference)
        wanted = expected.drift()
        assert drift is not None and wanted is not None and torch.equal(drift, wanted), names
        earlier += names


def test_hessian_of_half_precision_inputs_is_summed_in_float32() -> None:
    inputs = torch.full((5000, 2), 10.0, dtype=torch.float16)  # the sum, 500000, is beyond float16
    statistics = Statistics()
    statistics.add(inputs)
    assert statistics.hessian().tolist() == [[200.0, 200.0], [200.0, 200.0]]


def test_hessian_without_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="no inputs were added"):
        Statistics().hessian()


def test_groups_leave_out_what_is_not_reached_and_remove_their_hooks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)
            self.last = nn.Linear(4, 4)
            self.right = nn.Linear(4, 4)
            self.left = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, scale: float, *, shift: float) -> tuple[Tensor, None]:
            inner = hidden * scale + shift
            both: Tensor = self.left(inner) + self.right(inner)
            # Equal values in another tensor are another input.
            return self.last(both.clone()) + self.left.weight.sum(), None

    block = Block()
    assert find_groups(block, [torch.randn(2, 3, 4)], ((2.0,), {"shift": 1.0})) == [["left", "right"], ["last"]]
    assert hooks(block) == 0
