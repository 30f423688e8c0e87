"""The gradient of a whole batch in the memory of one chunk (GradCache, Gao et al. 2021, section 3.2).

A contrastive loss needs all pictures and captions of the batch at once, but of each no more than its representation. So every
chunk is first brought to its representations without a graph; the losses of these give the gradient by each of them; then every
chunk is computed once more, now with a graph, and its gradient goes on into the weights. The random state of the first time is
there again the second time, so that dropout drops the same units.

Pictures are represented by their similarities with the texts, not by their patches: the texts come first, hold still while the
pictures pass, and gather the gradient that every chunk of pictures sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vilseg.distributed import average_gradients
from vilseg.errors import ConfigError
from vilseg.training.batch import TensorBatch
from vilseg.training.objective import Objective, Representations

Part = TypeVar("Part", Tensor, TensorBatch)


def backward_in_chunks(objective: Objective, batch: TensorBatch, size: int) -> dict[str, Tensor]:
    """Losses as ``objective(batch)`` gives them, their gradient added to the parameters and averaged over the workers.

    The gradient is exact where encoders treat every picture and text by itself; see
    :func:`require_per_sample_encoders`. Workers talk
    in the losses, between texts and pictures, and once at the end, however many chunks there are.

    Args:
        objective: bare, not wrapped by data-parallel training.
        batch: this worker's share.
        size: pairs a chunk; phrases are embedded by as many at a time.
    """
    device = batch.seeds.device
    present_P = objective.present_phrases(batch)
    captions = _Replayed(lambda tokens: {"": objective.embed_captions(tokens)}, batch.tokens.split(size), device)
    phrases = _Replayed(lambda chosen: {"": objective.embed_phrases(chosen)}, present_P.split(size), device)
    captions_BD, phrases_PD = captions.joined()[""], phrases.joined()[""]
    compared_QD = objective.compared_with_patches(captions.joined()[""])
    texts = [phrases_PD.detach().requires_grad_(), compared_QD.detach().requires_grad_()]
    represent = partial(
        objective.represent, phrases_PD=texts[0], compared_QD=texts[1], present_P=present_P, pairs=len(batch)
    )
    pictures = _Replayed(represent, batch.split(size), device)
    seen = pictures.joined()
    losses = objective.losses(seen, captions_BD, objective.positives(batch, present_P))
    losses["loss"].backward()
    pictures.backward()
    for joined, used in zip((phrases_PD, compared_QD), texts, strict=True):
        if used.grad is not None:  # on all workers alike
            joined.backward(used.grad)
    captions.backward()
    phrases.backward()
    average_gradients(objective.parameters())
    if objective.training:
        objective.update_statistics(seen, captions_BD)
    return {name: value.detach() for name, value in losses.items()}


def require_per_sample_encoders(objective: Objective) -> None:
    """Raise ConfigError where a picture's features depend on the others of its chunk."""
    for name, module in objective.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            part = "model.text_encoder" if "text_encoder" in name else "model.image_encoder"
            raise ConfigError(
                f"trainer.chunk_size cannot be used: {part} has batch normalisation, which sees one chunk at a time; "
                f"choose another encoder, set {part}.frozen=true or trainer.chunk_size=null"
            )


class _Replayed(Generic[Part]):
    """What a function gives of every chunk, computed without a graph, and again with one when the gradient is known.

    Args:
        function: of a chunk.
        chunks: at least one.
        device: whose random numbers the function draws beside those of the CPU.
    """

    def __init__(
        self, function: Callable[[Part], Representations], chunks: Sequence[Part], device: torch.device
    ) -> None:
        self._function: Callable[[Part], Representations] = function
        self._chunks: Sequence[Part] = chunks
        self._device = device
        self._states: list[list[Tensor]] = []
        self._leaves: list[Representations] = []
        with torch.no_grad():
            for chunk in chunks:
                self._states.append(self._random_state())
                self._leaves.append({name: x.requires_grad_() for name, x in function(chunk).items()})

    def joined(self) -> Representations:
        """Of all chunks, with a graph that ends at what :meth:`backward` begins with."""
        return {name: torch.cat([leaves[name] for leaves in self._leaves]) for name in self._leaves[0]}

    def backward(self) -> None:
        """Send the gradients that have reached :meth:`joined` on through the function, chunk by chunk."""
        for chunk, state, leaves in zip(self._chunks, self._states, self._leaves, strict=True):
            self._set_random_state(state)
            again = self._function(chunk)
            found = [name for name, x in again.items() if x.requires_grad and leaves[name].grad is not None]
            if found:
                torch.autograd.backward([again[name] for name in found], [leaves[name].grad for name in found])

    def _random_state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        if self._device.type == "cuda":
            state.append(torch.cuda.get_rng_state(self._device))
        return state

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)
