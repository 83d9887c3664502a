"""The losses in float64 against plain numpy and torch's own; ranks are compared in tests/launchers/test_finetune.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quincunx.engine.retrieval.losses import (
    contrastive_loss,
    gather_with_gradient,
    kl_loss,
    known_positives,
    listwise_loss,
    margin_mse_loss,
    r_drop,
    ranks_first,
)

NUM_QUERIES, GROUP, WIDTH = 6, 4, 16
SPAWN_RANKS = Path(__file__).parents[2] / "launchers/spawn_ranks.py"


def make_batch(seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Unit vectors of 6 queries in groups of 4; queries 0 and 3 share a positive, and 5's second positive is 1's."""
    generator = torch.Generator().manual_seed(seed)
    queries_QD = torch.randn(NUM_QUERIES, WIDTH, generator=generator, dtype=torch.float64)
    passages_ND = torch.randn(NUM_QUERIES * GROUP, WIDTH, generator=generator, dtype=torch.float64)
    passages_ND[::GROUP] += 0.4 * queries_QD  # so that some positives rank first and some do not
    rows_N = torch.arange(100, 100 + NUM_QUERIES * GROUP)
    rows_N[3 * GROUP] = rows_N[0]  # the same passage stands twice in the batch
    rows_N[2 * GROUP + 1] = rows_N[GROUP]  # 1's positive is a hard negative of 2
    targets_Q = torch.arange(NUM_QUERIES) * GROUP
    positives_QP = torch.stack([rows_N[targets_Q], torch.full((NUM_QUERIES,), -1)], 1)
    positives_QP[5, 1] = rows_N[GROUP]
    return {
        "queries_QD": torch.nn.functional.normalize(queries_QD, dim=1).to(dtype),
        "passages_ND": torch.nn.functional.normalize(passages_ND, dim=1).to(dtype),
        "targets_Q": targets_Q,
        "positives_QP": positives_QP,
        "rows_N": rows_N,
    }


def contrastive_by_hand(batch: dict, temperature: float, all_pairs: bool, known: bool) -> tuple[list, list]:
    """Query by query and pair by pair, as the recipe's text says it: sets of ids instead of masks."""
    queries, passages = batch["queries_QD"].numpy(), batch["passages_ND"].numpy()
    rows = batch["rows_N"].tolist()
    own = [rows[i * GROUP] for i in range(NUM_QUERIES)]
    positives = [{p for p in line if p >= 0} for line in batch["positives_QP"].tolist()]
    losses, firsts = [], []
    for i in range(NUM_QUERIES):
        positive = passages[i * GROUP]
        target = queries[i] @ positive / temperature
        others = [
            queries[i] @ passages[n] / temperature
            for n in range(len(rows))
            if n != i * GROUP and not (known and rows[n] in positives[i])
        ]
        pairs = []
        for j in range(NUM_QUERIES):
            related = known and (own[j] in positives[i] or own[i] in positives[j])
            if all_pairs and i != j and not related:
                other_positive = passages[j * GROUP]
                pairs += [positive @ queries[j], queries[i] @ queries[j], positive @ other_positive]
        denominator = np.exp(target) + np.exp(others).sum() + np.exp(np.array(pairs) / temperature).sum()
        losses.append(np.log(denominator) - target)
        firsts.append(target > max(others))
    return losses, firsts


@pytest.mark.parametrize("all_pairs", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_loss_is_the_formula_written_out(all_pairs, known, temperature):
    batch = make_batch()
    excluded_QN = known_positives(batch["positives_QP"], batch["rows_N"], batch["targets_Q"]) if known else None
    losses_B, first_B = contrastive_loss(
        batch["queries_QD"],
        batch["passages_ND"],
        batch["targets_Q"],
        temperature=temperature,
        excluded_QN=excluded_QN,
        all_pairs=all_pairs,
    )
    losses, firsts = contrastive_by_hand(batch, temperature, all_pairs, known)
    np.testing.assert_allclose(losses_B.numpy(), losses, rtol=1e-12)  # float64, some fifty terms a sum
    assert first_B.tolist() == firsts
    assert len(set(firsts)) == 2, "where all agree, first_B proves little"


def test_all_pairs_and_known_positives_change_the_loss():
    batch = make_batch()
    values = {
        (all_pairs, known): sum(contrastive_by_hand(batch, 0.1, all_pairs, known)[0])
        for all_pairs in (False, True)
        for known in (False, True)
    }
    assert len({round(value, 3) for value in values.values()}) == 4


def test_slices_of_the_queries_give_the_losses_of_the_whole_batch():
    batch = make_batch()
    excluded_QN = known_positives(batch["positives_QP"], batch["rows_N"], batch["targets_Q"])
    arguments = batch["queries_QD"], batch["passages_ND"], batch["targets_Q"]
    options = {"temperature": 0.05, "excluded_QN": excluded_QN, "all_pairs": True}
    whole_B, first_B = contrastive_loss(*arguments, **options)
    for step in (1, 2, 3):
        parts = [contrastive_loss(*arguments, rows=slice(at, at + step), **options) for at in range(0, 6, step)]
        torch.testing.assert_close(torch.cat([losses for losses, _ in parts]), whole_B, rtol=1e-12, atol=0)
        assert torch.equal(torch.cat([first for _, first in parts]), first_B)


def test_a_known_positive_gets_no_probability_and_a_padded_row_is_no_passage():
    rows_N = torch.tensor([7, 8, 9, 7, 3])
    positives_QP = torch.tensor([[7, 9], [3, -1]])
    known_QN = known_positives(positives_QP, rows_N, torch.tensor([0, 4]))
    assert known_QN.tolist() == [[False, False, True, True, False], [False] * 5]
    passages_ND = torch.eye(5, requires_grad=True)
    losses_B, _ = contrastive_loss(
        torch.ones(2, 5), passages_ND, torch.tensor([0, 4]), temperature=1.0, excluded_QN=known_QN
    )
    torch.testing.assert_close(losses_B, torch.tensor([3.0, 5.0]).log())
    losses_B[0].backward()
    assert passages_ND.grad.abs().sum(1).bool().tolist() == [True, True, False, False, True]


def test_a_draw_is_not_first():
    scores_BN, targets_B = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]), torch.zeros(3, dtype=torch.long)
    assert ranks_first(scores_BN, targets_B).tolist() == [False, True, False]
    assert ranks_first(torch.ones(1, 1), targets_B[:1]).tolist() == [True], "alone it is first"


def scores(seed: int) -> torch.Tensor:
    return 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """KL(softmax(of) || softmax(to)) of each row."""
    return F.kl_div(to.log_softmax(1), of.log_softmax(1), log_target=True, reduction="none").sum(1)


def by_hand(loss, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Row by row the loss of scores [5, 4] as the papers write it."""
    if loss is kl_loss:
        return divergence(second, first)
    if loss is r_drop:
        return (divergence(first, second) + divergence(second, first)) / 2
    margins = (first[:, :1] - first[:, 1:]) - (second[:, :1] - second[:, 1:])
    return (margins**2).mean(1)


@pytest.mark.parametrize("loss", [kl_loss, margin_mse_loss, r_drop])
def test_losses_over_a_group_are_their_formulas_with_gradients_of_finite_differences(loss):
    expected = by_hand(loss, scores(1), scores(2))
    torch.testing.assert_close(loss(scores(1), scores(2)), expected, rtol=1e-12, atol=1e-14)
    assert loss(scores(1), scores(1) + 5).abs().max() < 1e-12, "a constant added to all scores changes nothing"
    other = scores(2)
    assert torch.autograd.gradcheck(lambda values: loss(values, other), scores(1).requires_grad_())


def test_listwise_loss_is_the_cross_entropy_of_column_0():
    expected = F.cross_entropy(scores(1), torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(listwise_loss(scores(1)), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(listwise_loss, scores(1).requires_grad_())


def test_r_drop_gives_both_passes_gradients_and_a_teacher_gets_none():
    for loss, both in ((r_drop, True), (kl_loss, False)):
        first, second = scores(1).requires_grad_(), scores(2).requires_grad_()
        loss(first, second).sum().backward()
        assert first.grad.abs().min() > 0 and (second.grad is not None) == both


@pytest.mark.parametrize("all_pairs", [False, True])
def test_gradients_of_the_contrastive_loss_are_those_of_finite_differences(all_pairs):
    batch = make_batch()
    excluded_QN = known_positives(batch["positives_QP"], batch["rows_N"], batch["targets_Q"])

    def losses(queries_QD, passages_ND):
        everything = gather_with_gradient(passages_ND)
        options = {"temperature": 0.2, "excluded_QN": excluded_QN, "all_pairs": all_pairs}
        return contrastive_loss(gather_with_gradient(queries_QD), everything, batch["targets_Q"], **options)[0]

    inputs = batch["queries_QD"].requires_grad_(), batch["passages_ND"].requires_grad_()
    assert torch.autograd.gradcheck(losses, inputs)


def test_16_bit_vectors_are_compared_in_float32_also_under_autocast():
    batch = make_batch(dtype=torch.bfloat16)
    wide = {name: batch[name].float() for name in ("queries_QD", "passages_ND")}
    expected, _ = contrastive_loss(*wide.values(), batch["targets_Q"], temperature=0.02, all_pairs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gathered = gather_with_gradient(batch["passages_ND"])
        losses, _ = contrastive_loss(
            batch["queries_QD"], gathered, batch["targets_Q"], temperature=0.02, all_pairs=True
        )
        narrow = scores(1).bfloat16(), scores(2).bfloat16()
        for loss in (kl_loss, margin_mse_loss, r_drop):
            torch.testing.assert_close(loss(*narrow), loss(*(values.float() for values in narrow)), rtol=0, atol=0)
    assert gathered.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


UNEQUAL_ROWS = """
import torch
import torch.distributed as dist
from quincunx.engine.retrieval.losses import gather_with_gradient

dist.init_process_group("gloo")
gather_with_gradient(torch.zeros(3 + dist.get_rank(), 2))
"""


def test_ranks_that_bring_different_numbers_of_rows_are_stopped():
    spawn = [sys.executable, str(SPAWN_RANKS), "2", sys.executable, "-c", UNEQUAL_ROWS]
    done = subprocess.run(spawn, capture_output=True, text=True, timeout=120)
    assert done.returncode and "gather different numbers of rows" in done.stderr, done.stderr
