import pytest
import torch

from fedproxy.aggregation.merge import kernels, merge, merge_round
from fedproxy.aggregation.space.product import PRODUCT, change, disputed, factored, truncated
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.tensor_files import load_tensors, save_tensors
from tests.aggregation.space.adapters import adapter, distance, minus, plus, products, same_bits, zeros

A, B = "l.lora_A.weight", "l.lora_B.weight"


def changes(start, clients=4, scale=0.3):
    updates = [adapter(seed=k + 1, scale=scale) for k in range(clients)]
    return updates, [change(start, update) for update in updates]


def test_the_product_by_hand():
    # B A = (1, 0)ᵀ(1, 0); the client has (1, 1)ᵀ(1, 1), so D = (0, 1; 1, 1). The other changes nothing.
    start = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])}
    moved = change(start, {A: torch.tensor([[0.0, 1.0]]), B: torch.tensor([[0.0], [1.0]])})
    assert moved["l"].tolist() == [[0.0, 1.0], [1.0, 1.0]]
    merged, _ = merge([moved, change(start, zeros(start))], "mean")
    assert merged["l"].tolist() == [[0.0, 0.5], [0.5, 0.5]]
    # B A + D = (1, 0.5; 0.5, 0.5): its larger eigenvalue is (1.5 + √1.25) / 2, by trace 1.5 and determinant 0.25.
    after = factored(start, merged)
    assert (after[B] @ after[A]).trace().item() == pytest.approx((1.5 + 1.25**0.5) / 2)


def test_disagreement_of_factors_by_hand():
    # A step in B_1 moves row 1 of the product by A = (1, 2): its level is (1 · 4 + 4 · 0) / 5 = 0.8. One in B_2 moves
    # row 2 with the levels (2, 4): (1 · 2 + 4 · 4) / 5 = 3.6. One in A_1 moves column 1 by B = (0, 1): 2; in A_2 4.
    start = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[0.0], [1.0]])}
    found = disputed(start, {"l": torch.tensor([[4, 0], [2, 4]], dtype=torch.uint8)})
    assert found[B].tolist() == [[1], [4]]
    assert found[A].tolist() == [[2, 4]]


def test_disagreement_of_a_coordinate_is_the_mean_over_what_a_step_in_it_moves():
    start, generator = adapter(), torch.Generator().manual_seed(3)
    before = products(start)
    levels = {layer: torch.randint(0, 9, p.shape, generator=generator).to(torch.uint8) for layer, p in before.items()}
    found = disputed(start, levels)
    for name, tensor in start.items():
        layer = name.rsplit(".lora_", 1)[0]
        for place in [(0, 0), (1, 2), (2, 1)]:
            stepped = {**start, name: tensor.double().clone()}
            stepped[name][place] += 1.0
            moved = (products(stepped)[layer] - before[layer]).square()
            assert found[name][place].item() == round(float((moved * levels[layer]).sum() / moved.sum()))


def test_a_coordinate_that_moves_nothing_is_not_disputed():
    # A component without a singular value has a zero column in B: its row of A moves nothing yet.
    start = {A: torch.tensor([[1.0, 2.0], [3.0, 1.0]]), B: torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    found = disputed(start, {"l": torch.full((2, 2), 3, dtype=torch.uint8)})
    assert found[A].tolist() == [[3, 3], [0, 0]]
    assert found[B].tolist() == [[3, 3], [3, 3]]


def test_the_largest_component_survives_by_hand():
    # B A + D = diag(1, 9) has rank 2; of rank 1 its best is diag(0, 9), so both factors are ±(0, 3).
    start = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])}
    after = factored(start, {"l": torch.tensor([[0.0, 0.0], [0.0, 9.0]])})
    assert after[A].abs().tolist() == [[0.0, 3.0]]
    assert after[B].abs().tolist() == [[0.0], [3.0]]
    assert (after[B] @ after[A]).tolist() == [[0.0, 0.0], [0.0, 9.0]]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7])
def test_a_change_is_the_difference_of_the_products_and_a_small_one_keeps_its_digits(scale):
    start, update = adapter(), adapter(seed=1, scale=scale)
    wide = {name: tensor.double() for name, tensor in start.items()}
    exact = minus(products(plus(wide, {name: tensor.double() for name, tensor in update.items()})), products(wide))
    found = change(start, update)
    assert all((found[layer] - exact[layer]).norm() <= 1e-6 * exact[layer].norm() for layer in exact)
    assert all(found[layer].dtype == torch.float32 for layer in found)


def test_every_access_gives_the_same_bits():
    update = adapter(seed=1)
    found = change(adapter(), update)
    first = {layer: found[layer].clone() for layer in found}
    for _ in range(3):
        assert all(torch.equal(found[layer], first[layer]) for layer in sorted(found, reverse=True))
    assert same_bits(dict(change(adapter(), update)), first)


@pytest.mark.parametrize("rank", [3, 5, 8])
def test_what_fits_the_rank_is_factored_exactly(rank):
    # The target's rank is 3; the global rank 8 exceeds even a side of the matrices.
    start, target = adapter(rank), adapter(3, seed=9)
    merged = minus(products(target), products(start))
    after = factored(start, {layer: tensor.float() for layer, tensor in merged.items()})
    assert distance(products(after), products(target)) <= 1e-6


def test_the_error_is_the_tail_of_the_singular_values():
    start = adapter()
    merged, _ = merge(changes(start)[1], "h-ties")
    after = products(factored(start, merged))
    for layer, product in products(start).items():
        total = product + merged[layer].double()
        tail = torch.linalg.svdvals(total)[3:].norm().item()
        assert (total - after[layer]).norm().item() == pytest.approx(tail, rel=1e-5)


def test_the_mean_is_that_of_the_clients_products():
    # Oracle: Σ w_k B_k A_k = [w_k B_k ...][A_k; ...], so its leading triplets come from QR of the stacked factors.
    start = adapter()
    updates, vectors = changes(start)
    rows = [1, 2, 3, 4]
    after = products(factored(start, merge(vectors, "mean", rows=rows)[0]))
    clients = [plus(start, update) for update in updates]
    for layer in after:
        left = torch.cat([row / 10 * one[f"{layer}.lora_B.weight"] for row, one in zip(rows, clients, strict=True)], 1)
        right = torch.cat([one[f"{layer}.lora_A.weight"] for one in clients])
        tall, wide = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
        u, s, vh = torch.linalg.svd(tall.R @ wide.R.T)
        expected = tall.Q @ (u[:, :3] * s[:3]) @ vh[:3] @ wide.Q.T
        assert (after[layer] - expected).norm() <= 1e-6 * expected.norm()


def test_factors_merged_apart_give_another_product():
    start = adapter()
    updates, vectors = changes(start)
    apart = plus(start, merge(updates, "mean")[0])
    assert distance(products(factored(start, merge(vectors, "mean")[0])), products(apart)) > 0.01


def test_both_factors_are_balanced():
    after = factored(adapter(), merge(changes(adapter())[1], "mean")[0])
    for layer in products(after):
        b, a = after[f"{layer}.lora_B.weight"], after[f"{layer}.lora_A.weight"]
        assert torch.allclose(b.T @ b, a @ a.T, atol=1e-5)
        assert torch.allclose(b.T @ b, (b.T @ b).diagonal().diag(), atol=1e-5)


def test_a_fresh_adapter_that_nobody_moved_stays_fresh():
    start = adapter(b_scale=0.0)
    assert same_bits(factored(start, dict(change(start, zeros(start)))), start)


def test_the_first_round_begins_from_b_of_zero():
    start = adapter(b_scale=0.0)
    (update,), (vector,) = changes(start, clients=1)
    assert distance(products(factored(start, dict(vector))), products(plus(start, update))) <= 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_client_of_lower_rank_gets_the_best_product_of_its_rank(rank):
    start = adapter()
    given = truncated(start, rank)
    for layer, product in products(start).items():
        assert given[f"{layer}.lora_A.weight"].shape == (rank, product.shape[1])
        assert given[f"{layer}.lora_B.weight"].shape == (product.shape[0], rank)
        u, s, vh = torch.linalg.svd(product)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert (products(given)[layer] - best).norm() <= 1e-6 * product.norm()


def test_a_client_of_full_rank_gets_the_adapter_as_it_is():
    start = adapter()
    assert same_bits(truncated(start, 3), start)


def test_a_fresh_adapter_stays_trainable_at_a_lower_rank():
    start = adapter(b_scale=0.0)
    given = truncated(start, 2)
    for layer in products(start):
        assert torch.equal(given[f"{layer}.lora_A.weight"], start[f"{layer}.lora_A.weight"][:2])
        assert not given[f"{layer}.lora_B.weight"].any()


def test_clients_of_different_ranks_merge_what_they_changed_of_what_they_were_given():
    start = adapter()
    vectors, expected = [], products(start)
    for rank in (1, 2, 3):
        given, update = truncated(start, rank), adapter(rank, seed=rank, scale=0.3)
        vectors.append(change(given, update))
        moved = minus(products(plus(given, update)), products(given))
        expected = {layer: expected[layer] + moved[layer] / 3 for layer in expected}
    merged, _ = merge(vectors, "mean")
    total = {layer: products(start)[layer] + merged[layer].double() for layer in merged}
    assert distance(total, expected) <= 1e-6
    after = products(factored(start, merged))
    for layer in after:
        tail = torch.linalg.svdvals(expected[layer])[3:].norm().item()
        assert (after[layer] - expected[layer]).norm().item() == pytest.approx(tail, rel=1e-5)


def test_what_a_client_was_not_given_is_not_taken_away():
    start = adapter()
    given = truncated(start, 1)
    after = factored(start, merge([change(given, zeros(given))] * 2, "mean")[0])
    assert distance(products(after), products(start)) <= 1e-6


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_beyond_the_adapters_is_refused(rank):
    with pytest.raises(UsageError, match=f"rank is {rank}; it must lie between 1 and the adapter's, 3"):
        truncated(adapter(), rank)


def test_a_product_beyond_float32_is_refused():
    start = {A: torch.full((1, 2), 1e19), B: torch.full((2, 1), 1e19)}
    with pytest.raises(ArtifactError, match=r"l overflows float32\. Limit the updates' norms with clip_norm"):
        factored(start, {"l": torch.full((2, 2), 3.4e38)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_computed_with_in_float32(dtype):
    start, update = adapter(dtype=dtype), adapter(seed=1, scale=0.1, dtype=dtype)
    found = change(start, update)
    wide = [{name: tensor.float() for name, tensor in some.items()} for some in (start, update)]
    assert same_bits(dict(found), dict(change(*wide)))
    assert {tensor.dtype for tensor in factored(start, found).values()} == {dtype}


@pytest.mark.parametrize("rule", ["mean", "ties", "h-ties", "median"])
def test_computed_held_and_stored_products_merge_to_the_same_bits(rule, tmp_path, monkeypatch):
    start = adapter(shapes={"a": (300, 200), "b": (40, 9), "c": (1, 70_000)})
    vectors = [
        change(start, adapter(seed=k + 1, shapes={"a": (300, 200), "b": (40, 9), "c": (1, 70_000)})) for k in (0, 1)
    ]
    held, levels, analysis = merge_round([dict(vector) for vector in vectors], rule)
    stored = []
    for k, vector in enumerate(vectors):
        save_tensors(tmp_path / str(k), vector)
        stored.append(load_tensors(tmp_path / str(k)))
    for smallest, largest in ((1 << 62, 0), (0, 0), (0, 1 << 62)):
        monkeypatch.setattr(kernels, "SMALLEST", smallest)
        monkeypatch.setattr(kernels, "LARGEST_COMPUTED", largest)
        found, again, same = merge_round(vectors, rule)
        assert same_bits(found, held)
        assert same_bits(again, levels)
        assert same == analysis
        assert same_bits(merge(stored, rule)[0], held)


def test_one_layer_of_a_client_is_in_memory_at_a_time():
    found = change(adapter(), adapter(seed=1))
    first = found["model.0.q"]
    assert found["model.0.q"] is first
    found["model.0.up"]
    assert found["model.0.q"] is not first
    assert PRODUCT.vector is change
