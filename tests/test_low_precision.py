"""bfloat16 state with stochastic rounding, and bfloat16 weights that follow float32 master weights bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS, rounding
from fused_dals.memory_order import in_memory_order
from fused_dals.rounding import Rounding, join, place_key, random_bits, split, step_seed, stochastic_bfloat16
from tests.helpers import EVERY_PATH, ConvNet, batch, identical, snapshot, train_step

BF16, F32 = torch.bfloat16, torch.float32


SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.3895e38, -3.3895e38, 1e-40, -1e-45, float("inf"), float("-inf")]


def any_floats(count: int) -> Tensor:
    """float32 numbers with every bit at random, infinities among them, and no NaN."""
    raw = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32).view(F32)
    return torch.cat([torch.tensor(SPECIAL), raw[~raw.isnan()]])


def nearest_ties_away(w: Tensor) -> Tensor:
    """The rounding of compensated weights by arithmetic: torch's own, but for ties."""
    even = w.to(BF16)
    raw = w.view(torch.int32)
    tie = (raw & 0xFFFF) == 0x8000
    return torch.where(tie, ((raw + 0x8000) >> 16).to(torch.int16).view(BF16), even)


def test_a_weight_and_its_compensation_are_the_float32_weight(seed: int) -> None:
    w = any_floats(200_000)
    uppers = torch.arange(-1000, 1000, dtype=torch.int32) << 16
    edges = torch.cat([uppers | 0x7FFF, uppers | 0x8000]).view(F32)  # as far as they go, and ties
    w = torch.cat([w, edges[~edges.isnan()]])
    upper, lower = split(w)
    assert torch.equal(join(upper, lower).view(torch.int32), w.view(torch.int32))
    assert torch.equal(upper.view(torch.int16), nearest_ties_away(w).view(torch.int16))
    assert lower.min() == -(2**15) and lower.max() == 2**15 - 1, "all of int16 is in use: ties to even would not fit"


def test_nan_stays_nan() -> None:
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(F32)
    assert join(*split(nan)).isnan().all() and split(nan)[0].isnan().all()
    assert stochastic_bfloat16(nan, torch.tensor([0, 65535, 65535], dtype=torch.int32)).isnan().all()


def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_on_average(seed: int) -> None:
    w = any_floats(100_000)
    bits = torch.randint(0, 2**16, w.shape, dtype=torch.int32)
    low, high = stochastic_bfloat16(w, torch.zeros_like(bits)), stochastic_bfloat16(w, torch.full_like(bits, 65535))
    rounded = stochastic_bfloat16(w, bits)
    assert torch.equal(low.view(torch.int16).int(), w.view(torch.int32) >> 16)
    assert ((rounded == low) | (rounded == high)).all()
    held = w.to(BF16).to(F32)
    exact = held == w
    assert exact.sum() > 0 and torch.equal(rounded[exact].float(), w[exact])

    n = 2**20
    value = torch.full((n,), 1.0 + 0.3 * 2.0**-7)
    draw = Rounding(place_key(0, 3), step_seed(torch.tensor(7)))
    ups = stochastic_bfloat16(value, random_bits(0, n, draw) & 0xFFFF) > 1
    # The share of n draws has a standard deviation of 0.00045; six of them.
    assert ups.double().mean().item() == pytest.approx(0.3, abs=0.003)


def test_random_bits_are_even_and_differ_between_elements_steps_and_parameters(seed: int) -> None:
    draws = {
        (position, step): random_bits(0, 2**16, Rounding(place_key(0, position), step_seed(torch.tensor(float(step)))))
        for position in (0, 1, 2)
        for step in (0, 1, 1000)
    }
    for name, bits in draws.items():
        for bit in range(32):  # 65536 fair coins: standard deviation 0.002
            assert ((bits >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=0.012), (name, bit)
    values = [bits.double() / 2**32 for bits in draws.values()]  # int32: in [-0.5, 0.5)
    for i, a in enumerate(values):
        for b in values[:i]:  # correlations of independent draws have a standard deviation of 0.004
            assert abs(float((a * b).mean()) * 12) < 0.025
    assert len({tuple(bits[:4].tolist()) for bits in draws.values()}) == len(draws)


@pytest.mark.parametrize("start", [0, 2**31 - 2**10, 2**32, 3 * 2**32 + 5])
def test_random_bits_follow_their_definition(start: int, seed: int) -> None:
    """In integers without end, as kernels/rounding.py writes it; pieces are no part of it."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    key, of_step = torch.randint(2**32, (2,)).tolist()
    found = random_bits(start, start + 2**11, Rounding(key, torch.tensor(of_step)))
    expected = [mix((at % 2**32) ^ mix(at >> 32) ^ mix(of_step ^ key)) for at in range(start, start + 2**11)]
    assert [bits % 2**32 for bits in found.tolist()] == expected


def test_values_are_stored_in_pieces_as_at_once_and_in_any_layout(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    value = any_floats(3000)[: 3 * 5 * 70].view(3, 5, 70)
    draw = Rounding(place_key(0, 1), step_seed(torch.tensor(3)))
    for buffer in (torch.empty(3, 5, 70, dtype=BF16), torch.empty(70, 3, 5, dtype=BF16).permute(1, 2, 0)):
        monkeypatch.setattr(rounding, "_PIECE_ON_CPU", 1 << 18)
        whole = rounding.as_stored(value, buffer, draw, half=1)
        monkeypatch.setattr(rounding, "_PIECE_ON_CPU", 64)
        pieces = rounding.as_stored(value, buffer, draw, half=1)
        assert whole.stride() == buffer.stride() == pieces.stride()
        assert torch.equal(whole.view(torch.int16), pieces.view(torch.int16))
        order = in_memory_order(value, buffer)
        bits = random_bits(0, value.numel(), draw) >> 16 & 0xFFFF
        expected = stochastic_bfloat16(order, bits).view(torch.int16)
        assert torch.equal(in_memory_order(whole, buffer).view(torch.int16), expected)


class Bf16Net(ConvNet):
    """Parameters in bfloat16, the last layer in float32, as mixed models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.to(BF16)
        self.head[2].float()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x.to(self.scale.dtype))) * self.scale).flatten(1)
        out: Tensor = self.head[2](torch.relu(self.head[0](x)).float())
        return out


@pytest.mark.parametrize("path", EVERY_PATH)
def test_compensated_training_follows_float32_master_weights_bit_for_bit(path: str, seed: int) -> None:
    """The loop that people write: float32 masters are stepped with the gradients of their bfloat16 copies."""
    model = Bf16Net()
    plain = copy.deepcopy(model)
    optimizer = DALS(model, lr=0.3, compensated=True, total_steps=15, **EVERY_PATH[path])
    masters = {name: nn.Parameter(p.detach().float()) for name, p in plain.named_parameters()}
    stepped = DALS(list(masters.items()), lr=0.3, total_steps=15, **EVERY_PATH[path])
    data = batch(F32)
    for _ in range(12):
        loss = train_step(model, optimizer, data)
        x, y = data
        plain.zero_grad()
        copied = nn.functional.cross_entropy(plain(x), y)
        copied.backward()
        assert copied.item() == loss
        for name, p in plain.named_parameters():
            assert p.grad is not None
            masters[name].grad = p.grad.float()
        stepped.step(loss=copied)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p.copy_(nearest_ties_away(masters[name]) if p.dtype == BF16 else masters[name])
    moved = 0
    for name, p in model.named_parameters():
        if p.dtype == BF16:
            compensation = optimizer.state[p]["compensation"]
            assert compensation.dtype == torch.int16 and compensation.shape == p.shape
            assert torch.equal(join(p.detach(), compensation), masters[name].detach()), name
            moved += int((compensation != 0).sum())
        else:
            assert torch.equal(p, masters[name]) and "compensation" not in optimizer.state[p]
    assert moved > 100, "the weights hold more than bfloat16 could"


@pytest.mark.parametrize("path", EVERY_PATH)
def test_small_updates_are_lost_without_a_compensation(path: str, seed: int) -> None:
    """The negative control, and the reason for all this: bfloat16 weights of 1 do not see steps below 2^-9."""

    def after(compensated: bool) -> Tensor:
        p = nn.Parameter(torch.ones(64, dtype=BF16))
        optimizer = DALS([("w", p)], lr=1e-4, trust_clip=(1.0, 1.0), compensated=compensated, **EVERY_PATH[path])
        for _ in range(100):
            # Upwards, because the interpreter truncates where a GPU rounds.
            p.grad = -torch.ones_like(p)
            optimizer.step(loss=1.0)
        return p.detach().float()

    assert torch.equal(after(False), torch.ones(64))
    assert (after(True) > 1).all()


def test_float16_cannot_be_compensated_and_says_so() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = DALS([("w", p)], compensated=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'w' of group 0: it is float16, and compensated=True serves bfloat16"):
        optimizer.step(loss=1.0)
    assert torch.equal(p, torch.ones_like(p)) and not optimizer.state


@pytest.mark.parametrize("path", EVERY_PATH)
def test_bfloat16_state_trains_reproducibly_and_resumes_bit_for_bit(path: str, seed: int) -> None:
    def build(model: nn.Module) -> DALS:
        return DALS(model, lr=0.3, state_dtype=BF16, total_steps=12, **EVERY_PATH[path])

    model, data = ConvNet(), batch(F32)
    again = copy.deepcopy(model)
    optimizer, other = build(model), build(again)
    first = train_step(model, optimizer, data)
    losses = [train_step(model, optimizer, data) for _ in range(9)]
    assert losses[-1] < first
    assert {value.dtype for entry in optimizer.state.values() for value in entry.values()} == {BF16}

    for _ in range(4):
        train_step(again, other, data)
    resumed, fresh = copy.deepcopy(again), other.state_dict()
    third = build(resumed)
    third.load_state_dict(fresh)
    for _ in range(6):
        train_step(resumed, third, data)
    assert identical(snapshot(model, optimizer), snapshot(resumed, third))


def test_the_paths_round_alike(seed: int) -> None:
    """All draw the same bits: buffers differ only where the last bit of float32 arithmetic tips the scale."""
    models = {path: ConvNet() for path in EVERY_PATH}
    data = batch(F32)
    start = copy.deepcopy(models["reference"].state_dict())
    buffers = {}
    for path, model in models.items():
        model.load_state_dict(start)
        optimizer = DALS(model, lr=0.1, state_dtype=BF16, **EVERY_PATH[path])
        train_step(model, optimizer, data)
        buffers[path] = torch.cat([v.flatten() for entry in optimizer.state.values() for v in entry.values()])
    for path in ("foreach", "fused"):
        assert (buffers[path] == buffers["reference"]).double().mean() > 0.995, path
        torch.testing.assert_close(buffers[path], buffers["reference"], rtol=2.0**-7, atol=0)


def test_layouts_round_by_the_element_s_place_in_memory(seed: int) -> None:
    """A channels_last tensor's bits follow its memory, on every path."""
    results = []
    p0, g = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), torch.randn(4, 6, 3, 3)
    for arguments in EVERY_PATH.values():
        p = nn.Parameter(p0.clone())
        optimizer = DALS([("w", p)], state_dtype=BF16, **arguments)
        p.grad = g.clone()
        optimizer.step(loss=1.0)
        results.append(optimizer.state[p]["grad_ema"])
    for result in results[1:]:
        assert (result == results[0]).double().mean() > 0.99


def test_a_state_dtype_changed_under_way_is_refused_with_the_way_out(seed: int) -> None:
    model, data = Bf16Net(), batch(F32)
    optimizer = DALS(model)
    train_step(model, optimizer, data)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0]["state_dtype"] = BF16
    with pytest.raises(RuntimeError, match=r"state_dtype=torch.bfloat16.*load_state_dict\(optimizer.state_dict\(\)\)"):
        train_step(model, optimizer, data)
    assert identical(before, snapshot(model, optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    train_step(model, optimizer, data)
    assert {entry["grad_ema"].dtype for entry in optimizer.state.values()} == {BF16}


@pytest.mark.parametrize("path", EVERY_PATH)
def test_a_compensation_comes_and_goes(path: str, seed: int) -> None:
    """Turned on it starts from zeros, which is what the weights have; turned off it is dropped; checkpoints follow."""
    model, data = Bf16Net(), batch(F32)
    optimizer = DALS(model, **EVERY_PATH[path])
    train_step(model, optimizer, data)
    optimizer.param_groups[0]["compensated"] = True
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state[model.scale]["compensation"].any()
    train_step(model, optimizer, data)
    assert optimizer.state[model.conv.weight]["compensation"].any()
    saved, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    optimizer.param_groups[0]["compensated"] = False
    optimizer.load_state_dict(optimizer.state_dict())
    train_step(model, optimizer, data)
    assert "compensation" not in optimizer.state[model.scale]
    again = DALS(other, **EVERY_PATH[path])
    again.load_state_dict(saved)
    assert torch.equal(again.state[other.conv.weight]["compensation"], saved["state"][1]["compensation"])
    other.float()
    train_step(other, again, data)
    assert "compensation" not in again.state[other.scale]
    again.load_state_dict(again.state_dict())
