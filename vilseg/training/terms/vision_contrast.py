"""Terms that compare the student's views with the global views of an EMA teacher: DINO loss, or InfoNCE loss of crops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vilseg.config.loss import VisionConfig
from vilseg.losses import DINOLoss, crop_info_nce_loss
from vilseg.model import ViLSeg
from vilseg.training.ema_teacher import EMATeacher, ProjectionHead
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.encoded_views import as_float32, pooled_features
from vilseg.training.terms.term import EncodedImages, Needs, SummedTerm, Term


class _Student:
    """Projection head of the student, and the EMA teacher of its encoder and head.

    Args:
        model: the student.
        config: sizes of the head and momentum of the teacher.
        prototypes: number of prototypes; with 0 the head returns its bottleneck.
    """

    def __init__(self, model: ViLSeg, config: VisionConfig, prototypes: int) -> None:
        self._model, self._config = model, config
        self.head = ProjectionHead(model.image_projection.in_features, config.hidden_dim, prototypes)

    def start_teacher(self) -> None:
        """Make the EMA teacher, a copy of the student's encoder and head."""
        self.teacher = EMATeacher(self._trained_encoder, self.head)

    def modules(self) -> dict[str, nn.Module]:
        return {"vision_head": self.head, "teacher": self.teacher}

    def encoders(self) -> list[nn.Module]:
        return [] if self._trained_encoder is None else [self.teacher["encoder"]]

    def project(self, images: EncodedImages) -> tuple[Tensor, Tensor]:
        """Return the student's head outputs for all views, the global ones first, and the teacher's for the global views.

        Shape: (V, B, K) and (G, B, K), the second without gradient.
        """
        views = images.views
        student_VBK = torch.stack(
            [
                *(self.head(views.pooled(number)) for number in range(len(views.global_))),
                *(self.head(pooled_features(view)) for view in views.local),
            ]
        )
        return student_VBK, self._project_by_teacher(images)

    @torch.no_grad()
    def _project_by_teacher(self, images: EncodedImages) -> Tensor:
        views = images.views
        features = views.global_
        if self._trained_encoder is not None and not views.cached:
            assert views.pixels_GB3HW is not None
            with images.autocast():
                features = [as_float32(self.teacher["encoder"](pixels)) for pixels in views.pixels_GB3HW]
        return torch.stack([self.teacher["head"](pooled_features(view)) for view in features])

    @torch.no_grad()
    def update_teacher(self, progress: float) -> None:
        start = self._config.teacher_momentum
        self.teacher.update_from(self._trained_encoder, self.head, start=start, progress=progress)

    @property
    def _trained_encoder(self) -> nn.Module | None:
        return None if self._model.config.image_encoder.frozen else self._model.image_encoder


def _needs(local_crops: int) -> Needs:
    return Needs(global_views=2, local_views=local_crops, second_view_gradient=True)


class DINORepresentations(NamedTuple):
    """Sums over images, because outputs of single images would be large: there may be tens of thousands of prototypes."""

    agreement: Tensor
    """Sum over images of the DINO loss, a scalar."""
    teacher_K: Tensor
    """Sum over images of the teacher's outputs, averaged over the global views."""


class DINOTerm(SummedTerm[DINORepresentations]):
    """DINO loss; ``loss.vision`` with ``form: dino`` in the configuration.

    Args:
        model: the student.
        config: temperatures, momenta and sizes of the head.
        local_crops: number of local views per image.
    """

    def __init__(self, model: ViLSeg, config: VisionConfig, local_crops: int) -> None:
        self.weight = config.weight
        self.needs = _needs(local_crops)
        self._student = _Student(model, config, config.prototypes)
        self._loss = DINOLoss(
            config.prototypes,
            student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
            center_momentum=config.center_momentum,
        )
        self._student.start_teacher()

    def modules(self) -> dict[str, nn.Module]:
        """Return head, loss (for its centre, which checkpoints must have) and teacher."""
        modules = self._student.modules()
        return {"vision_head": modules["vision_head"], "vision_loss": self._loss, "teacher": modules["teacher"]}

    def encoders(self) -> list[nn.Module]:
        """Return the teacher's encoder; empty if the image encoder is frozen, because the teacher then has no copy."""
        return self._student.encoders()

    def represent(self, images: EncodedImages) -> DINORepresentations:
        """Compute the sums over images of the loss and of the teacher's outputs."""
        student_VBK, teacher_GBK = self._student.project(images)
        agreement = self._loss(student_VBK, teacher_GBK) * len(images.batch)
        return DINORepresentations(agreement, teacher_GBK.mean(0).sum(0))

    def losses(self, representations: DINORepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the mean DINO loss over this worker's images."""
        return {"vision": representations.agreement / len(texts.captions_BD)}

    def after_losses(self, representations: DINORepresentations, texts: OwnTexts) -> None:
        """Move the centre of the DINO loss towards the mean output of the teacher."""
        self._loss.update_center(representations.teacher_K.view(1, 1, -1) / len(texts.captions_BD))

    def after_update(self, progress: float) -> None:
        """Move the teacher towards the student."""
        self._student.update_teacher(progress)


class CropRepresentations(NamedTuple):
    """Outputs of the projection heads, unit length."""

    student_BVD: Tensor
    """Outputs of the student for all views, the global ones first."""
    teacher_BGD: Tensor
    """Outputs of the teacher for the global views."""


class CropInfoNCETerm(Term[CropRepresentations]):
    """InfoNCE loss of crops; ``loss.vision`` with ``form: infonce`` in the configuration.

    Args:
        model: the student.
        config: temperature, momentum of the teacher, and sizes of the head.
        local_crops: number of local views per image.
    """

    def __init__(self, model: ViLSeg, config: VisionConfig, local_crops: int) -> None:
        self.weight = config.weight
        self.needs = _needs(local_crops)
        self._temperature = config.student_temperature
        self._student = _Student(model, config, prototypes=0)
        self._student.start_teacher()

    def modules(self) -> dict[str, nn.Module]:
        """Return head and teacher."""
        return self._student.modules()

    def encoders(self) -> list[nn.Module]:
        """Return the teacher's encoder; empty if the image encoder is frozen, because the teacher then has no copy."""
        return self._student.encoders()

    def represent(self, images: EncodedImages) -> CropRepresentations:
        """Compute the outputs of student and teacher for the views of images."""
        student_VBD, teacher_GBD = self._student.project(images)
        return CropRepresentations(student_VBD.transpose(0, 1), teacher_GBD.transpose(0, 1))

    def losses(self, representations: CropRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the InfoNCE loss of crops."""
        student, teacher = representations.student_BVD.transpose(0, 1), representations.teacher_BGD.transpose(0, 1)
        return {"vision": crop_info_nce_loss(student, teacher, self._temperature)}

    def after_update(self, progress: float) -> None:
        """Move the teacher towards the student."""
        self._student.update_teacher(progress)
