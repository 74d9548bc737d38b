"""What the timestep alone decides, shared out over ranks: the same result, and every linear computed by one of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import conditioning_ranks
import pytest
import ranks
from hypothesis import given
from hypothesis import strategies as st

from para_kernels.integrations.diffusers.conditioning import even_cuts

ranks.preload("conditioning_ranks")


@pytest.fixture(scope="session", params=[2, 3], ids=["2 ranks", "3 ranks"])
def of_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    world, own = request.param, tmp_path_factory.getbasetemp()
    return ranks.results_of_all(own, f"conditioning-{world}", world, conditioning_ranks.run, timeout=240.0)


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_each_linear_is_computed_by_one_rank(family: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    for way in ("shared", "graphs", "changed output"):
        total: Counter[str] = Counter()
        for found in of_ranks:
            away, work = found[family][way]
            assert away <= 1e-5
            total += work
        alone = of_ranks[0][family]["alone"]
        assert set(total) == set(alone) == set(of_ranks[0][family]["sizes"])
        if way != "graphs":  # A replay runs no Python.
            assert total == alone


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_the_work_is_even(family: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    sizes = of_ranks[0][family]["sizes"]
    for found in of_ranks:
        mine = sum(sizes[at] for at, rows in found[family]["shared"][1].items() if rows)
        assert mine <= sum(sizes.values()) / len(of_ranks) + max(sizes.values())


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_every_rank_computes_all_where_nothing_may_be_shared(
    family: str, of_ranks: list[dict[str, dict[str, Any]]]
) -> None:
    for found in of_ranks:
        alone = found[family]["alone"]
        away, work = found[family]["offloaded"]
        assert away <= 1e-5
        assert work == alone
        assert found[family]["with a cache"] == alone
        if len(of_ranks) == 2:  # Each rank has half of the samples, and all of their rows.
            assert {at: 2 * rows for at, rows in found[family]["batch"].items()} == alone


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_compiled_blocks_take_what_was_made(family: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    if "compiled" not in of_ranks[0][family]:
        pytest.skip("on two ranks alone")
    for rank, found in enumerate(of_ranks):
        compiled = found[family]["compiled"]
        assert compiled["worst"] <= 1e-5
        assert compiled["others"] > 1e-2
        graphs = compiled["graphs"]
        if (
            rank == 0 and len(of_ranks) == 2
        ):  # Two kinds of blocks, and one of SD3's that ends the text: blocks of a kind share a graph.
            assert graphs["shared", 1] == 2
        assert graphs["shared again", 1] == graphs["shared again", 2] == 0


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_what_was_made_of_another_vector_is_not_taken(family: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    for found in of_ranks:
        assert found[family]["other vector"] <= 1e-5
        assert found[family]["other argument"] <= 1e-5


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_one_rank_that_cannot_share_decides_for_all(family: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    for found in of_ranks:
        away, work = found[family]["one rank's hook"]
        assert away <= 1e-5
        assert work == found[family]["alone"]
        assert "modulations each rank makes all of them" in found[family]["summary"]


@pytest.mark.parametrize("family", conditioning_ranks.FAMILIES)
def test_it_is_taken_off_without_a_trace(family: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    assert all(found[family]["traces"] for found in of_ranks)


@given(sizes=st.lists(st.integers(1, 50), max_size=30), parts=st.integers(1, 9))
def test_even_cuts(sizes: list[int], parts: int) -> None:
    cuts = even_cuts(sizes, parts)
    assert len(cuts) == parts
    assert [i for first, stop in cuts for i in range(first, stop)] == list(range(len(sizes)))
    assert all(sum(sizes[slice(*cut)]) <= sum(sizes) / parts + max(sizes) for cut in cuts if sizes)
