"""find_overlap() against a set of the bytes that each tensor touches, and by name what is legal and what is not."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_dals import DALS
from fused_dals.overlap import find_overlap
from tests.conftest import SEED
from tests.helpers import EVERY_PATH

F32, F16, F64, U8 = torch.float32, torch.float16, torch.float64, torch.uint8
ROOM = 256
MEMORY = [bytearray(ROOM), bytearray(ROOM)]


def view(memory: bytearray, dtype: torch.dtype, offset: int, dims: Sequence[tuple[int, int]]) -> Tensor:
    """A strided view from any byte on, cut to the room there is; dims are (size, stride)."""
    flat = torch.frombuffer(memory, dtype=dtype, offset=offset, count=(ROOM - offset) // dtype.itemsize)
    last, sizes = flat.numel() - 1, []
    for size, stride in dims:
        sizes.append(size if size == 0 or stride == 0 else min(size, 1 + last // stride))
        last -= max(0, sizes[-1] - 1) * stride
    return flat.as_strided(sizes, [stride for _, stride in dims])


def touched(tensor: Tensor) -> Counter[int]:
    """How many elements of the tensor use each byte."""
    width, steps = tensor.element_size(), [s * tensor.element_size() for s in tensor.stride()]
    places = itertools.product(*(range(size) for size in tensor.shape))
    starts = (tensor.data_ptr() + sum(i * s for i, s in zip(place, steps, strict=True)) for place in places)
    return Counter(start + byte for start in starts for byte in range(width))


def assert_as_byte_by_byte(tensors: list[Tensor]) -> None:
    found, counts = find_overlap(tensors), [touched(t) for t in tensors]
    if found is None:
        assert max(sum(counts, Counter()).values(), default=1) == 1
    else:
        i, j = found
        assert i <= j
        assert max(counts[i].values()) > 1 if i == j else counts[i].keys() & counts[j].keys()


dtypes = st.sampled_from([F32, F32, F32, F16, F64, U8])
sizes = st.one_of(st.integers(2, 5), st.integers(0, 9))
dims = st.lists(st.tuples(sizes, st.integers(0, 24)), max_size=4)
anything = st.builds(view, st.sampled_from(MEMORY), dtypes, st.integers(0, ROOM - 8), dims)
#: All in one lattice: steps and offsets that make neighbours interleave, so that most draws overlap nowhere.
interleaved = st.builds(
    view, st.just(MEMORY[0]), st.just(F32), st.integers(0, 12).map(lambda k: 4 * k),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 12, 24])), max_size=3),
)  # fmt: skip


@hypothesis_seed(SEED)
@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(anything, max_size=4))
def test_any_views(tensors: list[Tensor]) -> None:
    assert_as_byte_by_byte(tensors)


@hypothesis_seed(SEED)
@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(interleaved, min_size=1, max_size=3))
def test_interleaved_views(tensors: list[Tensor]) -> None:
    assert_as_byte_by_byte(tensors)


@hypothesis_seed(SEED)
@settings(max_examples=200, deadline=None, database=None)
@given(st.randoms(use_true_random=False), st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
def test_pieces_of_one_tensor(rng: random.Random, shape: list[int]) -> None:
    """Cut again and again along any dimension, by slices and steps: nothing overlaps until one piece comes twice."""
    pieces = [torch.frombuffer(bytearray(257), dtype=U8, offset=1)[: torch.Size(shape).numel()].view(shape)]
    for _ in range(4):
        piece = pieces.pop(rng.randrange(len(pieces)))
        dim, cut = rng.randrange(len(shape)), rng.randrange(5)
        if rng.random() < 0.5:
            pieces += [piece.movedim(dim, 0)[::2].movedim(0, dim), piece.movedim(dim, 0)[1::2].movedim(0, dim)]
        else:
            pieces += [piece.movedim(dim, 0)[:cut].movedim(0, dim), piece.movedim(dim, 0)[cut:].movedim(0, dim)]
    rng.shuffle(pieces)
    assert find_overlap(pieces) is None
    twice = rng.randrange(len(pieces))
    found = find_overlap([*pieces, pieces[twice]])
    assert found == ((twice, len(pieces)) if pieces[twice].numel() else None)


def base(*shape: int) -> Tensor:
    return torch.zeros(shape)


LEGAL: dict[str, Callable[[], list[Tensor]]] = {
    "nothing": lambda: [],
    "one": lambda: [base(3, 4)],
    "neighbours in one flat tensor": lambda: list(base(12).split(4)),
    "at odd offsets": lambda: [base(9)[1:4], base(9)[4:9], base(9)[0:1]],
    "columns": lambda: list(base(5, 4).unbind(1)),
    "rows of the transposed": lambda: list(base(5, 4).t().unbind(0)),
    "groups of columns": lambda: list(base(5, 12).split([3, 4, 5], dim=1)),
    "every second element": lambda: [(x := base(9))[::2], x[1::2]],
    "every third, from further on": lambda: [(x := base(30))[:12:3], x[13::3], x[2:20:3]],
    "channels_last": lambda: [base(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    "permuted": lambda: [base(2, 3, 4).permute(2, 0, 1)],
    "size 1 with stride 0": lambda: [base(1, 3).expand(1, 3), base(4, 1, 3).as_strided((4, 1, 3), (3, 0, 1))],
    "a stride that jumps back in": lambda: [base(8).as_strided((2, 3), (3, 2))],
    "a frame and what it holds": lambda: [(x := base(6, 6))[::5], x[1:5, ::5], x[1:5, 1:5]],
    "empty ones anywhere": lambda: [(x := base(4)), x[2:2], x[:0].view(0, 7), base(0)],
    "expanded to nothing": lambda: [(x := base(1)), x.expand(0)],
    "no memory": lambda: [torch.empty(3, device="meta"), torch.empty(3, device="meta").expand(2, 3)],
    "another device": lambda: [base(3), torch.empty(3, device="meta")],
    "sparse": lambda: [base(2, 2).to_sparse(), base(2, 2)],
    "lazy": lambda: [nn.UninitializedParameter(), nn.UninitializedParameter(), base(1)],
    "bytes of one word": lambda: list(base(1).view(U8).unbind()),
    "real and imaginary parts": lambda: list(torch.view_as_real(torch.zeros(5, dtype=torch.complex64)).unbind(-1)),
}

OVERLAPPING: dict[str, tuple[Callable[[], list[Tensor]], tuple[int, int]]] = {
    "the same memory": (lambda: [base(2), (x := base(4)), x.view(2, 2)], (1, 2)),
    "the same tensor": (lambda: [x := base(2), base(2), x], (0, 2)),
    "one element": (lambda: [(x := base(9))[:5], x[4:]], (0, 1)),
    "inside": (lambda: [base(3), (x := base(9))[3:5], x], (1, 2)),
    "inside, two further on": (lambda: [(x := base(9)), base(3), x[3:5]], (0, 2)),
    "another dtype": (lambda: [(x := base(9)), x.view(F16)[17:]], (0, 1)),
    "half of one word": (lambda: [(x := base(3))[1:], x.view(F16)[2:3]], (0, 1)),
    "expanded": (lambda: [base(3), base(1).expand(2)], (1, 1)),
    "expanded in one dimension": (lambda: [base(4, 1).expand(4, 3)], (0, 0)),
    "a sliding window": (lambda: [base(9).unfold(0, 3, 1)], (0, 0)),
    "a stride that meets itself": (lambda: [base(13).as_strided((3, 4), (3, 2))], (0, 0)),
    "transposed": (lambda: [(x := base(3, 3)), x.t()], (0, 1)),
    "a column twice": (lambda: [(x := base(5, 4))[:, 0], x[:, 1], x[:, :1]], (0, 2)),
    "second and third elements": (lambda: [(x := base(9))[::2], x[::3]], (0, 1)),
    "row and column": (lambda: [(x := base(5, 5))[:, 3], x[2]], (0, 1)),
    "one of several": (lambda: [(x := base(8, 8))[:, 0], x[:, 7], x[:, 1:3], x[7, 2:5]], (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name: str) -> None:
    tensors = LEGAL[name]()
    assert find_overlap(tensors) is None
    assert find_overlap(list(reversed(tensors))) is None


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping(name: str) -> None:
    make, expected = OVERLAPPING[name]
    tensors = make()
    assert find_overlap(tensors) == expected
    last = len(tensors) - 1
    assert find_overlap(list(reversed(tensors))) == (last - expected[1], last - expected[0])


def test_of_several_overlaps_one_is_named() -> None:
    flat = base(40)
    tensors = [flat[:10], flat[20:30], flat[5:15], flat[25:35]]
    assert find_overlap(tensors) in ((0, 2), (1, 3))


def test_size_does_not_matter() -> None:
    """Two gigabytes that nobody touches: arithmetic on strides, no list of elements."""
    x = torch.empty(1 << 29)
    matrix = x.view(1 << 14, 1 << 15)
    assert find_overlap([x[::2], x[1::2]]) is None
    assert find_overlap([x[::2], x[8::2]]) == (0, 1)
    assert find_overlap([x[::2], x[1::3]]) == (0, 1)
    assert find_overlap([x[::6], x[4::6], x[3::6], x[2::12], x[8::12]]) is None
    assert find_overlap([x[::6], x[4::6], x[3::6], x[2::12], x[14::12]]) == (3, 4)
    assert find_overlap([matrix[:, 5:], matrix.t()[:5]]) is None
    assert find_overlap([matrix[:, 5:], matrix[-1:, 5]]) == (0, 1)
    assert find_overlap(list(matrix[:, :1000].unbind(1))) is None
    assert find_overlap([x[:1].expand(1 << 40)]) == (0, 0)


def test_views_too_tangled_to_decide_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search gives up after MAX_STEPS; what needs no search is found all the same."""
    x = base(100)
    tangled = [x.as_strided((3, 4, 3), (17, 7, 5)), x.as_strided((3, 2), (11, 13), 1)]
    assert find_overlap(tangled) is not None
    monkeypatch.setattr("fused_dals.overlap.MAX_STEPS", 0)
    assert find_overlap(tangled) is None
    assert find_overlap(list(base(5, 4).unbind(1))) is None
    assert find_overlap([x[:1].expand(7)]) == (0, 0)


def test_many_unlike_strides_interlaced() -> None:
    """Every pair is looked at; the remainder by 120 tells them apart."""
    x = torch.empty(1 << 22)
    views = [x.as_strided((3, 5), (840 * (i + 1), 120 * (i + 2)), i) for i in range(120)]
    assert find_overlap(views) is None
    assert find_overlap([*views, x[1080:1081]]) is not None


@pytest.mark.parametrize("count", [300, 10_000])
def test_disjoint_dense_parameters_take_no_search(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sort and a look at neighbours decide: what intersects would be searched, and no step of search is allowed."""
    monkeypatch.setattr("fused_dals.overlap.MAX_STEPS", 0)
    monkeypatch.setattr("fused_dals.overlap.combinations", None)
    params = [nn.Parameter(torch.empty(4, 3)) for _ in range(count)]
    params += list(torch.empty(count, 7).unbind())
    assert find_overlap(params) is None


def stepped(params: list[tuple[str, torch.nn.Parameter]], arguments: dict[str, Any]) -> DALS:
    optimizer = DALS(params, **arguments)
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    return optimizer


@pytest.mark.parametrize("arguments", EVERY_PATH.values(), ids=EVERY_PATH)
def test_a_step_refuses_parameters_that_share_memory(arguments: dict[str, Any]) -> None:
    memory = torch.ones(10)
    a, b = torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[4:])
    with pytest.raises(RuntimeError, match=r"parameter 'a' and parameter 'b': they share memory .*one nn\.Parameter"):
        stepped([("a", a), ("b", b)], arguments)
    assert torch.equal(memory, torch.ones(10))
    wide = torch.nn.Parameter(torch.ones(3, 1).expand(3, 4))
    with pytest.raises(RuntimeError, match="parameter 'wide': several of its elements share memory"):
        stepped([("wide", wide)], arguments)
    assert torch.equal(wide, torch.ones(3, 4))


@pytest.mark.parametrize("arguments", EVERY_PATH.values(), ids=EVERY_PATH)
def test_a_step_takes_interleaved_views(arguments: dict[str, Any]) -> None:
    memory = torch.ones(5, 4)
    columns = [(str(i), torch.nn.Parameter(memory[:, i])) for i in range(4)]
    stepped(columns, arguments)
    assert (memory < 1).all()


def test_memory_that_comes_to_be_shared_is_noticed() -> None:
    a, b = torch.nn.Parameter(torch.ones(6)), torch.nn.Parameter(torch.ones(6))
    optimizer = stepped([("a", a), ("b", b)], {})
    b.data = a.data
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step(loss=1.0)
