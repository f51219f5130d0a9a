"""KL-Top: torch's KL at k = V, naive sums below it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dither.quant.losses import kl_top


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("after_softmax", [True, False])
def test_all_of_them_is_kl(after_softmax: bool) -> None:
    student, teacher = logits(0, 2, 5, 40).requires_grad_(), logits(1, 2, 5, 40)
    expected = F.kl_div(
        student.log_softmax(-1).flatten(0, 1),
        teacher.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    loss = kl_top(student, teacher, 40, after_softmax)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    (known,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, known, rtol=1e-10, atol=1e-14)


def test_top_by_hand() -> None:
    student, teacher = logits(2, 7, 30), logits(3, 7, 30)
    first, second = 0.0, 0.0
    for c, a in zip(student, teacher, strict=True):
        index = a.argsort(descending=True)[:6]
        p, q = a.softmax(0)[index], c.log_softmax(0)[index]
        first += float((p * (p.log() - q)).sum()) / 7
        p, q = a[index].softmax(0), c[index].log_softmax(0)
        second += float((p * (p.log() - q)).sum()) / 7
    assert float(kl_top(student, teacher, 6)) == pytest.approx(first, rel=1e-12)
    assert float(kl_top(student, teacher, 6, after_softmax=False)) == pytest.approx(second, rel=1e-12)
    assert float(kl_top(teacher, teacher, 6)) == pytest.approx(0, abs=1e-14)


def test_the_first_form_can_be_negative() -> None:
    """The top class alone: p log(p / q) < 0 where the student is surer of it than the teacher."""
    teacher, student = torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0]])
    assert float(kl_top(student, teacher, 1)) < 0
    assert float(kl_top(student, teacher, 1, after_softmax=False)) == 0


def test_types_and_impossible_tokens() -> None:
    student, teacher = logits(4, 3, 20).bfloat16().requires_grad_(), logits(5, 3, 20).bfloat16()
    loss = kl_top(student, teacher, 5)
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    teacher[:, 3] = -torch.inf  # a masked token has probability 0 and counts for nothing
    assert bool(torch.isfinite(kl_top(student, teacher, 20)))


def test_wrong_arguments() -> None:
    x = torch.zeros(2, 8)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"1 .. 8, .*not {k}"):
            kl_top(x, x, k)
    with pytest.raises(ValueError, match="one shape"):
        kl_top(x, torch.zeros(2, 9), 3)
