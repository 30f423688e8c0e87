"""DINO loss and InfoNCE loss of crops: equal to loops over their formulas, gradients, and the centre of DINO."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.losses import DINOLoss, crop_info_nce_loss


def make(prototypes: int = 4) -> DINOLoss:
    return DINOLoss(prototypes, student_temperature=0.1, teacher_temperature=0.04, center_momentum=0.9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 5


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize(("views", "global_views"), [(2, 1), (2, 2), (5, 2)])
def test_it_is_the_formula(views: int, global_views: int) -> None:
    loss, student, teacher = make(), normal(views, 3, 4), normal(global_views, 3, 4, seed=1)
    loss.center.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3]))
    center = loss.center.double().tolist()
    terms = []
    for g in range(global_views):
        for v in range(views):
            if v == g:
                continue
            for b in range(3):
                target = softmax([(x - c) / 0.04 for x, c in zip(teacher[g, b].tolist(), center, strict=True)])
                guess = softmax([x / 0.1 for x in student[v, b].tolist()])
                terms.append(-sum(t * math.log(s) for t, s in zip(target, guess, strict=True)))
    assert loss(student, teacher).item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)


def test_gradient_reaches_the_student_alone() -> None:
    loss, teacher = make(), normal(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher), normal(4, 3, 4).requires_grad_())
    loss(normal(4, 3, 4).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_order_of_images_does_not_matter() -> None:
    loss, student, teacher, order = make(), normal(4, 3, 4), normal(2, 3, 4, seed=1), torch.tensor([2, 0, 1])
    assert loss(student[:, order], teacher[:, order]).item() == pytest.approx(loss(student, teacher).item())


def test_centre_follows_the_teacher_and_keeps_one_output_from_winning() -> None:
    loss = make()
    teacher = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 3, 4)
    loss.update_center(teacher)
    assert loss.center.tolist() == pytest.approx([0.1, 0, 0, 0])
    loss.update_center(teacher)
    assert loss.center.tolist() == pytest.approx([0.19, 0, 0, 0])
    for _ in range(200):
        loss.update_center(teacher)
    # The teacher's output is the same for every image. Minus the centre it is uniform, so every student output costs log K.
    assert loss(torch.zeros(3, 3, 4), teacher).item() == pytest.approx(math.log(4), abs=1e-4)


def test_centre_is_saved_with_the_run() -> None:
    loss, other = make(), make()
    loss.update_center(torch.rand(2, 3, 4))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.center, loss.center)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 3, 4), (1, 3, 4)), ((2, 3, 4), (3, 3, 4)), ((2, 3, 4), (2, 2, 4))]
)
def test_wrong_shapes_are_told(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 <= V >= G"):
        make()(torch.zeros(student), torch.zeros(teacher))


# ----------------------------------------------------------------------------------------------------------- InfoNCE


@pytest.mark.parametrize(("views", "global_views"), [(2, 1), (2, 2), (5, 2)])
def test_info_nce_is_the_formula(views: int, global_views: int) -> None:
    student = F.normalize(normal(views, 3, 4), dim=-1)
    teacher = F.normalize(normal(global_views, 3, 4, seed=1), dim=-1)
    terms = []
    for g in range(global_views):
        for v in range(views):
            if v == g:
                continue
            for i in range(3):
                cosines = [
                    sum(a * b for a, b in zip(student[v, i].tolist(), teacher[g, j].tolist(), strict=True))
                    for j in range(3)
                ]
                terms.append(-math.log(softmax([cosine / 0.1 for cosine in cosines])[i]))
    assert crop_info_nce_loss(student, teacher, 0.1).item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_the_gradient_of_info_nce_reaches_the_student_alone() -> None:
    teacher = normal(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda student: crop_info_nce_loss(student, teacher, 0.1), normal(4, 3, 4).requires_grad_()
    )
    crop_info_nce_loss(normal(4, 3, 4).requires_grad_(), teacher, 0.1).backward()
    assert teacher.grad is None


def test_info_nce_is_low_for_the_same_image_only() -> None:
    own = torch.eye(4).expand(3, 4, 4)
    right, wrong = crop_info_nce_loss(own, own[:2], 0.1), crop_info_nce_loss(own.roll(1, 1), own[:2], 0.1)
    assert right < 0.01
    assert wrong > 9
    alike = torch.ones(3, 4, 4) / 2  # collapsed: all images have the same embedding
    assert crop_info_nce_loss(alike, alike[:2], 0.1).item() == pytest.approx(math.log(4))


@pytest.mark.usefixtures("without_annotation_checks")
def test_wrong_shapes_of_info_nce_are_told() -> None:
    with pytest.raises(ValueError, match="2 <= V >= G"):
        crop_info_nce_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), 0.1)
