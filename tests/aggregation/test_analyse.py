import json
import math

import numpy as np
import pytest
import torch

from fedproxy.aggregation.analyse import analyse, conflict, heterogeneity, retention, similarity, weights
from fedproxy.errors import ArtifactError, UsageError


def updates(*rows):
    return [{"b": torch.tensor(row[2:]), "a": torch.tensor(row[:2])} for row in rows]


# τ_0 = (3, 4, 0), τ_1 = (4, 3, 0), τ_2 = (-3, -4, 0): norms 5; products 24, -25, -24.
HAND = updates([3.0, 4.0, 0.0], [4.0, 3.0, 0.0], [-3.0, -4.0, 0.0])


def test_similarity_by_hand_eq_5():
    assert np.allclose(analyse(HAND).similarity, [[1, 0.96, -1], [0.96, 1, -0.96], [-1, -0.96, 1]], atol=1e-15)


def test_heterogeneity_by_hand():
    assert analyse(HAND).heterogeneity == pytest.approx([1 - 0.96 / 2, 1 - 0.96 / 2, 1.0])


def test_weights_by_hand_eq_6():
    scores = [math.exp(1.96), math.exp(1.92), math.exp(1.96)]
    assert analyse(HAND).weights == pytest.approx([score / sum(scores) for score in scores])


def test_conflict_by_hand_eq_7():
    # Signs (+ + -), (+ + -), (0 0 0): sums 1, 1, 0.
    found = conflict(HAND)
    assert found["a"].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert found["b"].tolist() == [1.0]
    analysis = analyse(HAND)
    assert analysis.conflict_histogram == [0, 0, 2, 1]
    assert analysis.conflict_mean == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_retention_by_hand_eq_10():
    # ĥ = (0, 0, 1).
    assert analyse(HAND).retention == pytest.approx([1.0, 1.0, 0.8])
    assert analyse(HAND, r0=0.9, delta=0.5).retention == pytest.approx([0.9, 0.9, 0.4])
    assert retention(torch.tensor([0.2, 0.4, 1.0]), 1.2, 2.0).tolist() == pytest.approx([1.0, 0.7, 0.0])


def test_equal_heterogeneity_up_to_rounding_keeps_everything():
    assert retention(torch.tensor([0.5, 0.5 + 1e-15, 0.5 - 1e-15], dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]
    direction = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert analyse([{"w": scale * direction} for scale in (1.0, 3.0, 0.7, 1e-3)]).retention == [1.0] * 4


def test_a_single_client_has_weight_and_retention_one_and_no_conflict():
    one = [{"w": torch.tensor([0.0, -2.0])}]
    analysis = analyse(one, r0=0.5)
    assert (analysis.weights, analysis.retention, analysis.heterogeneity) == ([1.0], [1.0], [0.0])
    assert (analysis.conflict_mean, analysis.conflict_histogram) == (0.0, [2, 0])
    assert conflict(one)["w"].tolist() == [0.0, 0.0]


def test_a_zero_update_is_similar_to_nobody():
    analysis = analyse([{"w": torch.tensor([1.0, 1.0])}, {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 2.0])}])
    assert analysis.similarity[1] == [0.0, 0.0, 0.0]
    assert analysis.heterogeneity == pytest.approx([0.5, 1.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("clients", [1, 2, 5])
def test_analysis_equals_a_straightforward_float64_reference(dtype, clients):
    generator = torch.Generator().manual_seed(clients)
    given = [
        {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in (("x", (40, 7)), ("c", 9))}
        for _ in range(clients)
    ]
    stack = np.stack(
        [np.concatenate([u["c"].double().numpy().ravel(), u["x"].double().numpy().ravel()]) for u in given]
    )
    norms = np.linalg.norm(stack, axis=1)
    cosine = (stack @ stack.T) / np.outer(norms, norms)
    others = ~np.eye(clients, dtype=bool)
    analysis = analyse(given, names=[f"c{k}" for k in range(clients)])
    assert np.allclose(analysis.similarity, cosine, atol=1e-12)
    levels = (clients - abs(np.sign(stack).sum(axis=0))) if clients > 1 else np.zeros(stack.shape[1])
    assert analysis.conflict_mean == pytest.approx(levels.mean() / clients)
    assert analysis.conflict_histogram == [int((levels == level).sum()) for level in range(clients + 1)]
    scores = np.exp((abs(cosine) * others).sum(axis=1))
    assert np.allclose(analysis.weights, scores / scores.sum())
    if clients > 1:
        away = 1 - (np.maximum(cosine, 0) * others).sum(axis=1) / (clients - 1)
        assert np.allclose(analysis.heterogeneity, away)
    found = conflict(given)
    assert np.allclose(np.concatenate([found["c"].numpy().ravel(), found["x"].numpy().ravel()]), levels / clients)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_the_analysis_is_plain_json():
    record = analyse(HAND, names=["bank", "shop", "home"]).as_dict()
    assert json.loads(json.dumps(record)) == record
    assert list(record)[:3] == ["names", "clients", "parameters"]
    assert record["names"] == ["bank", "shop", "home"]


def test_functions_on_matrices_do_not_need_updates():
    cosine = similarity(torch.tensor([[4.0, 2.0], [2.0, 4.0]], dtype=torch.float64))
    assert cosine.tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert heterogeneity(cosine).tolist() == [0.5, 0.5]
    assert weights(cosine).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_name_client_and_tensor(bad):
    with pytest.raises(ArtifactError, match=r"shop: w holds a NaN or Inf \(flat index 1\)"):
        analyse([{"w": torch.ones(2)}, {"w": torch.tensor([1.0, bad])}], names=["bank", "shop"])


def test_a_norm_beyond_float64_is_refused():
    with pytest.raises(ArtifactError, match="exceeds float64"):
        analyse([{"w": torch.tensor([1e200], dtype=torch.float64)}])


@pytest.mark.parametrize("function", [analyse, conflict])
def test_wrong_input_is_refused(function):
    with pytest.raises(UsageError, match="no update"):
        function([])
    with pytest.raises(ArtifactError, match="holds no parameters"):
        function([{}])
    with pytest.raises(ArtifactError, match="client 1: w has shape"):
        function([{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    with pytest.raises(ArtifactError, match=r"w has dtype torch\.int64"):
        function([{"w": torch.ones(2, dtype=torch.int64)}])


def test_names_must_fit():
    with pytest.raises(UsageError, match="1 names were given for 3 updates"):
        analyse(HAND, names=["bank"])
