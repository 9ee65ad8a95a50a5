"""Sharded training on two to four gloo processes: equal to that of one process, in as many collectives as promised."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from fused_dals import DALS, infer_depths
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint
from fused_dals.host_walk import HOST_WALK
from fused_dals.replicas import check_replicas_every, hash_of
from fused_dals.rounding import place_key
from fused_dals.sharding import RowsOverRanks, short, why_not_sharded
from tests import sharded_runs as runs
from tests.ranks import on_ranks

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

#: Sums of gradients and squares in other orders, over a few steps; seen: 4e-7.
CLOSE = 2e-6


@functools.cache
def alone(name: str) -> runs.Outcome:
    """The run of one process, which knows nothing of ranks."""
    return runs.train("single", runs.ALL[name])


def assert_equal_to_one_process(ranks: list[dict[str, runs.Outcome]]) -> None:
    for outcomes in ranks:
        for name, outcome in outcomes.items():
            expected = alone(name)
            assert outcome.phases == expected.phases and outcome.depths == expected.depths
            assert outcome.run_state["step"] == expected.run_state["step"] == runs.STEPS
            if name == "bfloat16 state":  # each shard draws random bits of its own
                assert runs.error(outcome, expected) < 2**-6, name
                continue
            assert runs.error(outcome, expected) < CLOSE, name
            assert outcome.ratios == pytest.approx(expected.ratios, rel=1e-4)


#: Collectives of a step: sums of norms, then what the loss adds, then what clipping adds.
SUMS = {"fsdp": (1, 1, 1), "hsdp": (1, 1, 1), "tp": (1, 1, 1), "tp_fsdp": (2, 1, 2), "ddp": (0, 1, 0)}


@pytest.mark.parametrize(
    ("layout", "world", "variants"),
    [
        ("ddp", 2, runs.SOME),
        ("tp", 2, runs.SOME),
        ("fsdp", 2, runs.ALL),
        ("fsdp", 4, runs.SOME),
        ("hsdp", 4, runs.SOME),
        ("tp_fsdp", 4, runs.SOME),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, dict) else str(value),
)
def test_equal_to_one_process(layout: str, world: int, variants: dict[str, Any]) -> None:
    """Weights, state, phases, depths and ratios; all ranks alike; a collective per way of being split, and the loss."""
    ranks = on_ranks(world, runs.train_variants, layout, variants)
    assert_equal_to_one_process(ranks)
    for name in variants:
        outcomes = [outcomes[name] for outcomes in ranks]
        first = outcomes[0]
        assert all(torch.equal(o.weights[key], first.weights[key]) for o in outcomes for key in first.weights)
        assert all(o.run_state == first.run_state and o.ratios == first.ratios for o in outcomes)
        norms, loss, clipping = SUMS[layout]
        wanted = norms + loss + (clipping if "clipped" in name else 0)
        assert all(sum(count.values()) == wanted for o in outcomes for count in o.counts), first.counts


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_a_step_of_shards_goes_on_with_the_tables_of_the_last(layout: str) -> None:
    """Whether a rank has the compiled walk or not: the even ones have it, where there is a compiler."""
    first, second = on_ranks(2, runs.train, layout, {"fused": True})
    assert first.preparations == second.preparations == [1]
    assert first.resumes_by is (Fingerprint if HOST_WALK.compiled is None else CompiledFingerprint)
    assert second.resumes_by is Fingerprint
    assert runs.error(first, second) == 0.0


def test_norms_of_shards_alone_are_found_out() -> None:
    """Negative control: what a plain LARS does is off by percents, and the comparison sees it."""
    (outcome, _) = on_ranks(2, runs.train_with_local_norms, "fsdp")
    assert runs.error(outcome, alone("foreach")) > 1e-2


def test_losses_of_each_rank_alone_are_found_out() -> None:
    """Negative control: replicas whose losses are not averaged part, and the comparison sees it."""
    options = {"foreach": True, "loss_group": False, "phase_thresholds": (0.01, 0.0), "ema_decay": (0.1, 0.5, 0.9)}
    expected = runs.train("single", {key: value for key, value in options.items() if key != "loss_group"})
    apart = on_ranks(2, runs.train, "ddp", options)
    assert max(runs.error(outcome, expected) for outcome in apart) > 1e-3
    together = on_ranks(2, runs.train, "ddp", {**options, "loss_group": None})
    assert max(runs.error(outcome, expected) for outcome in together) < CLOSE


# -- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1] * 4, [2] * 4, [1, 2, 1, 2, 1], [3, 1, 0, 0, 2]], ids=str)
def test_ranks_without_a_loss(counts: list[int]) -> None:
    """They take part with weight zero, however many losses the other rank has; nobody waits for ever."""
    ranks = on_ranks(2, runs.losses_of_some, counts)
    assert ranks[0] == ranks[1] == pytest.approx(runs.losses_of_some(counts))


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_a_dtensor(world: int) -> None:
    ranks = on_ranks(world, runs.loss_parallel_run)
    for found, expected in ranks:
        assert found == expected and len(set(found)) == 3
    assert ranks[0] == ranks[-1]


def test_a_loss_too_many_is_counted_in_the_next_step() -> None:
    """Its sum is on its way by then: one sum a step on all ranks, whatever one of them observes."""
    ranks = on_ranks(2, runs.losses_of_some, [1, 1, 1, 2, 1])
    ema = 1.0
    for mean in (2.0, 3.0, 4.0, (14.0 + 5.0) / 2):
        ema = 0.95 * ema + 0.05 * mean
    assert ranks[0] == ranks[1] and ranks[0][-1] == pytest.approx(ema)


def test_the_sum_of_losses_overlaps_with_backward() -> None:
    events = on_ranks(2, runs.overlap)
    later = ["begin", "backward", "step"]
    assert events[0] == events[1] == ["backward", "step", "begin"] * 2 + later * 2


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_missing_gradients(options: dict[str, Any]) -> None:
    """On all ranks: the parameter rests. On some: a gradient of zeros, as anywhere else in data parallel training."""
    expected = runs.without_some_gradients("single", options, zeros=True)
    for outcome in on_ranks(4, runs.without_some_gradients, "fsdp", options):
        assert runs.error(outcome, expected) < CLOSE
        assert outcome.ratios.keys() == expected.ratios.keys()


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_partial_gradients_are_added_up(options: dict[str, Any]) -> None:
    for sharded, plain, placements in on_ranks(3, runs.gradients_that_are_sums, options):
        for a, b in zip(sharded, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert placements == ["(Replicate(),)", "(Shard(dim=0),)"]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_an_overflow_on_one_shard_drops_the_step_everywhere(options: dict[str, Any]) -> None:
    expected, skipped = runs.scaled("single", options)
    assert skipped == 1
    for outcome, skipped in on_ranks(2, runs.scaled, "fsdp", options):
        assert skipped == 1 and runs.error(outcome, expected) < CLOSE


# -- wrapping, stages, ZeRO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, infer_depths], ids=["auto", "infer_depths"])
def test_parameters_swapped_after_construction(depth: Any) -> None:
    for outcome in on_ranks(2, runs.swapped, depth):
        assert outcome.depths == alone("foreach").depths
        assert runs.error(outcome, alone("foreach")) < CLOSE


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True, "max_grad_norm": 0.3}], ids=str)
def test_pipeline_stages(options: dict[str, Any]) -> None:
    """Depths over the whole model, one phase from the last stage's loss, one norm for clipping: the same bits."""
    expected = runs.stages(options)
    for weights, depths, phases in on_ranks(2, runs.stages, options):
        assert phases == expected.phases
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected.weights[name], rtol=1e-5, atol=1e-7)
            assert depths[name] == expected.depths[name]


def test_depths_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depth does not know parameter 'head\.bias'"):
        DALS([("head.weight", nn.Parameter(torch.ones(2))), ("head.bias", nn.Parameter(torch.ones(2)))],
             depth=infer_depths(nn.Sequential(nn.Linear(2, 2))))  # fmt: skip


@pytest.mark.parametrize("options", [{"foreach": True, "max_grad_norm": 0.3}, {"fused": True}], ids=str)
def test_zero(options: dict[str, Any]) -> None:
    """Equal to one process; a checkpoint resumes to the same bits, counters included, and all ranks hold the same."""
    expected = runs.train("single", options)
    straight, resumed = (on_ranks(2, runs.zero, options, resume) for resume in (False, True))
    for name, weight in expected.weights.items():
        torch.testing.assert_close(straight[0][0][name], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(straight[0][0][name], straight[1][0][name])
        assert torch.equal(straight[0][0][name], resumed[0][0][name])
    group = straight[0][1]["param_groups"][0]
    assert {key: group[key] for key in expected.run_state} == pytest.approx(expected.run_state, rel=1e-4)
    assert set(straight[0][1]["state"]) == set(range(len(expected.weights)))


def test_zero_can_be_looked_into_by_names() -> None:
    ranks = on_ranks(2, runs.zero_looked_into)
    names = [name for name, _ in runs.model().named_parameters()]
    for said in ranks:
        assert said["depths"] == infer_depths(runs.model()) and list(said["depths"]) == names
        assert (said["phases"], said["current_lr"], said["skipped_steps"]) == ([2, 2], [0.1, 0.02], 1)
    assert sorted(ranks[0]["trust_ratios"].keys() | ranks[1]["trust_ratios"].keys()) == sorted(names)
    assert not ranks[0]["trust_ratios"].keys() & ranks[1]["trust_ratios"].keys()


def test_zero_warns_of_names_of_two_groups() -> None:
    (said,) = on_ranks(1, runs.zero_with_repeated_names)
    assert len(said) == 1 and said[0].startswith("ZeroDALS: parameter name 'weight' is that of two parameters.")


# -- where ranks might part ways ----------------------------------------------------------------------------------


def mean_after(losses: list[float]) -> list[float]:
    """E after each of these."""
    emas = losses[:1]
    for loss in losses[1:]:
        emas.append(0.95 * emas[-1] + 0.05 * loss)
    return emas


def test_loading_with_a_sum_on_its_way() -> None:
    """It counts in the step that follows, as the other ranks know nothing of the loss that began it."""
    ranks = on_ranks(2, runs.loading_under_way)
    assert ranks[0] == ranks[1] == pytest.approx(mean_after([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))


def test_the_end_of_torch_distributed_loses_no_loss() -> None:
    ranks = on_ranks(2, runs.after_the_end)
    assert ranks[0] == ranks[1] == pytest.approx(mean_after([1.0, 2.0, 3.0, 4.0, 5.0]))


@pytest.mark.parametrize("groups", [{}, {"partition_group": True}], ids=str)
def test_a_first_step_at_lr_0_is_a_step_for_all_or_for_none(groups: dict[str, Any]) -> None:
    assert on_ranks(2, runs.first_step_at_rest, groups) == [[2, 0], [2, 0]]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_unfreezing_a_shard(options: dict[str, Any]) -> None:
    """One rank alone has a gradient for it; the other was in the middle of steady steps."""
    (a, b), (again_a, again_b) = on_ranks(2, runs.unfreezing, options)
    assert torch.equal(a, again_a) and torch.equal(b, again_b) and not torch.equal(b, torch.ones(8, 4))


def test_a_gradient_on_another_mesh_is_refused() -> None:
    for said in on_ranks(2, runs.gradient_elsewhere):
        assert "parameter 'p' of group 0: it is distributed over" in said


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_nan_on_one_rank_drops_the_step_everywhere(layout: str, options: dict[str, Any]) -> None:
    """A shard's or a partition's; ratios stay those of the last step."""
    for skipped, before, after in on_ranks(2, runs.dropped, layout, options):
        assert skipped == 1 and before and after == before


def test_shards_draw_different_bits() -> None:
    keys = {place_key(0, 3, shard) for shard in range(1000)}
    assert len(keys) == 1000 and place_key(0, 3) in keys


@pytest.mark.parametrize("argument", ["loss_group", "partition_group"])
def test_process_groups_are_checked_and_not_pickled(argument: str) -> None:
    with pytest.raises(TypeError, match=f"DALS: {argument} must be a torch.distributed.ProcessGroup, got str"):
        DALS(nn.Linear(2, 2), **{argument: "world"})
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        optimizer = DALS(nn.Linear(2, 2), **{argument: torch.distributed.group.WORLD})
        assert copy.deepcopy(optimizer).state_dict() == optimizer.state_dict()
        with pytest.raises(TypeError, match=f"an optimizer with {argument}= cannot be pickled"):
            pickle.dumps(optimizer)
    finally:
        torch.distributed.destroy_process_group()


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_distributed_checkpoints(options: dict[str, Any], tmp_path: Path) -> None:
    """Sharded, full and flat; the same ranks: the same bits; two ranks: equal to the run of one process."""
    forms = list(runs.FORMS) if "foreach" in options else ["sharded"]
    straight = on_ranks(4, runs.run_and_save, "fsdp", options, str(tmp_path), forms)
    assert runs.error(straight[0], alone("foreach")) < CLOSE
    for form in forms:
        for outcome in on_ranks(4, runs.resume, "fsdp", options, str(tmp_path), form):
            assert runs.error(outcome, straight[0]) == 0.0 and outcome.run_state == straight[0].run_state
            assert outcome.state.keys() == straight[0].state.keys()
        if "foreach" in options:
            for outcome in on_ranks(2, runs.resume, "fsdp", options, str(tmp_path), form):
                assert runs.error(outcome, alone("foreach")) < CLOSE


def test_checkpoints_of_two_ranks_on_four(tmp_path: Path) -> None:
    options = {"foreach": True}
    on_ranks(2, runs.run_and_save, "fsdp", options, str(tmp_path), ["sharded"])
    for outcome in on_ranks(4, runs.resume, "tp_fsdp", options, str(tmp_path), "sharded"):
        assert runs.error(outcome, alone("foreach")) < CLOSE


# -- replicas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "parameter"), [("start", "embed.weight|gain"), ("loss", "."), ("bit", "blocks.0.down.bias"), ("", "")]
)
def test_replicas_that_part_are_named(mistake: str, parameter: str) -> None:
    for said in on_ranks(2, runs.replicas_apart, mistake):
        assert bool(said) == bool(mistake)
        if mistake:
            assert re.search(rf"parameter '({parameter}).*differ between the ranks \[0, 1\]", said), said


def test_replicated_shards_that_part_are_named() -> None:
    said = on_ranks(4, runs.replicas_of_hsdp)
    assert all("parameter 'head.weight'" in text and "(11, 12)" in text for text in said)
    assert "[0, 2]" in said[0] and "[1, 3]" in said[3]


def test_a_hash_sees_every_bit_and_every_place(seed: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(300).to(dtype)
        seen = {int(hash_of(x)), int(hash_of(x[:-1])), int(hash_of(x.flip(0)))}
        bits = x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])
        for i in range(300):
            flipped = bits.clone()
            flipped[i] ^= 1 << int(torch.randint(x.element_size() * 8 - 1, ()))
            seen.add(int(hash_of(flipped.view(dtype))))
        assert len(seen) == 303
        assert int(hash_of(x.reshape(20, 15).t().contiguous().t())) == int(hash_of(x))


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, "2"])
def test_how_often_is_checked(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        check_replicas_every(DALS(nn.Linear(2, 2)), steps)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_wrappers_that_join_tensors_are_refused() -> None:
    for said in on_ranks(2, runs.refused_wrappers):
        assert "use fully_shard (FSDP2)" in said["FSDP1 False"] and "use fully_shard (FSDP2)" in said["FSDP1 True"]
        assert "Use fused_dals.zero.ZeroDALS" in said["ZeRO"]


@pytest.mark.parametrize(
    ("attribute", "word"),
    [("ds_id", "ZeRO-3"), ("tensor_model_parallel", "parallelize_module"), ("_fsdp_flattened", "FSDP2")],
)
def test_other_frameworks_shards_are_refused(attribute: str, word: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = DALS(model)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
    before = model.weight.detach().clone()
    setattr(model.weight, attribute, True)
    with pytest.raises(RuntimeError, match=f"parameter 'weight' of group 0: .*{word}"):
        optimizer.step(loss=1.0)
    assert torch.equal(before, model.weight) and not optimizer.state
    delattr(model.weight, attribute)
    assert why_not_sharded(model.weight) == ""


def test_flattened_buffers_are_refused() -> None:
    """What DeepSpeed's ZeRO-1 and 2 and Megatron's distributed optimizer do to the groups of an optimizer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    biases = [(name, p) for name, p in model.named_parameters() if "bias" in name]
    for params, cut in (
        (model, [slice(0, 26)]),
        (model, [slice(0, 9), slice(9, 13)]),
        ([*biases], [slice(0, 6)]),
    ):
        optimizer = DALS(params)
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        before = flat.clone()
        parts = [nn.Parameter(flat[some]) for some in cut]
        for p in parts:
            p.grad = torch.ones_like(p)
        optimizer.param_groups[0]["params"] = parts
        with pytest.raises(RuntimeError, match=r"where a parameter of shape .* was\. DeepSpeed's ZeRO and Megatron's"):
            optimizer.step(loss=1.0)
        assert torch.equal(flat, before) and not optimizer.state


def test_layers_in_the_place_of_others_are_no_flattened_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a library that joins tensors is loaded, a buffer in a parameter's place is suspicious."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 10, bias=False), nn.Linear(10, 3, bias=False))
    optimizer = DALS(model)
    model[1], model[2] = nn.LayerNorm(8), nn.Linear(8, 3, bias=False)
    optimizer.param_groups[0].update(
        params=list(model.parameters()), param_names=[n for n, _ in model.named_parameters()]
    )
    model(torch.randn(5, 4)).square().mean().backward()
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    with pytest.raises(RuntimeError, match=r"a buffer of 8 elements where a parameter of shape \(10, 8\) was"):
        optimizer.step(loss=1.0)
    monkeypatch.delitem(sys.modules, "deepspeed")
    optimizer.step(loss=1.0)
    assert len(optimizer.state) == 4


def test_parameters_that_are_left_out_or_added_are_no_flattened_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = DALS(model)
    added = nn.Parameter(torch.ones(17))
    optimizer.param_groups[0]["params"] = [model[0].bias, model[1].weight, model[1].bias, model[0].weight, added]
    for p in (*model.parameters(), added):
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="param_names has 4 entries for 5 parameters"):
        optimizer.step(loss=1.0)
    assert len(optimizer.state) == 5


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_sums_over_ranks_are_exact_in_any_order(seed: int) -> None:
    """1024 sums of squares within a factor of 2^19 of each other: the same bits in every order; negative control."""
    squares = (1 + torch.rand(1024, dtype=torch.float64)) * 2.0 ** torch.randint(-18, 1, (1024,))
    rounded = short(squares)
    assert torch.equal(rounded, rounded.float().double())
    assert float((rounded / squares - 1).abs().max()) <= 2.0**-24
    orders = [torch.randperm(1024) for _ in range(20)]
    assert len({float(torch.cumsum(rounded[order], 0)[-1]) for order in orders}) == 1
    assert len({float(torch.cumsum(squares[order], 0)[-1]) for order in orders}) > 1
    extremes = torch.tensor([0.0, torch.inf, torch.nan, 1e300, 5e-324], dtype=torch.float64)
    assert short(extremes)[:4].tolist()[:2] == [0.0, torch.inf] and short(extremes)[2].isnan()
    assert float(short(extremes)[3]) == pytest.approx(1e300, rel=1e-7)


def test_rows_of_a_process_group_lie_together() -> None:
    """For two groups every group's rows are one run of memory; for three they are gathered."""
    two = RowsOverRanks([("a",), ("b",), ("a", "b"), (), ("b",), ("a",)], 2, torch.device("cpu"))
    assert all(isinstance(chosen, slice) for chosen in two._chosen)
    assert sorted(two.row) == list(range(6))
    of = {group: {two.row[i] for i, groups in enumerate(two.groups_of_rows) if group in groups} for group in "ab"}
    runs_of_rows = {g: set(range(6)[c]) for g, c in zip(two.process_groups, two._chosen, strict=True)}
    assert runs_of_rows == of
    three = RowsOverRanks([("a", "b"), ("b", "c"), ("a", "c"), ("a",)], 2, torch.device("cpu"))
    assert any(not isinstance(chosen, slice) for chosen in three._chosen)
