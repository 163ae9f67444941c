"""Distillation: zero where the outputs agree, otherwise positive, whatever the outputs are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from host_trainer.losses import distillation, energy

_shapes = st.sampled_from([(4, 10), (1, 2), (6, 1), (2, 3, 4), (3, 2, 5, 5)])


@given(shape=_shapes, scale=st.floats(0.01, 50), temperature=st.floats(0.5, 8), seed=st.integers(0, 99))
def test_equal_outputs_have_no_loss(
    shape: tuple[int, ...], scale: float, temperature: float, seed: int
) -> None:
    """A student that answers as its teacher has nothing to learn."""
    teacher = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert float(distillation([teacher.clone()], [teacher], temperature)) == pytest.approx(0, abs=1e-4)


@given(shape=_shapes, temperature=st.floats(0.5, 8), seed=st.integers(0, 99))
def test_other_outputs_have_a_loss_that_shrinks_towards_the_teacher(
    shape: tuple[int, ...], temperature: float, seed: int
) -> None:
    """The nearer the student, the smaller the loss."""
    generator = torch.Generator().manual_seed(seed)
    teacher, other = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    far, near = (
        float(distillation([teacher + share * (other - teacher)], [teacher], temperature))
        for share in (1, 0.1)
    )
    assert far > near > 0


def test_a_constant_shift_of_logits_is_noticed() -> None:
    """Softmax alone would not see it; the squared error does, so that a head's scale is kept."""
    teacher = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert float(distillation([teacher + 3], [teacher], 2.0)) > 1


def test_a_constant_teacher_gives_a_finite_loss() -> None:
    """Outputs without variance do not divide by zero."""
    assert torch.isfinite(distillation([torch.ones(3, 4, 4)], [torch.zeros(3, 4, 4)], 2.0))


def test_the_gradient_reaches_the_student_only() -> None:
    """The teacher's outputs are constants."""
    student = torch.randn(4, 10, requires_grad=True)
    teacher = torch.randn(4, 10)
    distillation([student], [teacher], 2.0).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0


def test_several_outputs_count_alike_and_must_match() -> None:
    """The loss is the mean over outputs; a missing output is an error."""
    a, b = torch.randn(4, 10), torch.randn(4, 3, 3)
    both = distillation([a, b + 1], [a, b], 2.0)
    assert float(both) == pytest.approx(float(distillation([b + 1], [b], 2.0)) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="zip"):
        distillation([a], [a, b], 2.0)


def test_padding_has_no_energy() -> None:
    """Where the input is spread over is told by its own places: what stands behind them changes nothing."""
    mine, theirs = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    want = energy([mine[:, :3]], [theirs[:, :3]])
    torch.testing.assert_close(energy([mine], [theirs], mask), want)
