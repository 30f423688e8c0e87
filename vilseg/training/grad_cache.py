"""GradCache: the gradient of a whole batch in the memory of one chunk (Gao et al. 2021, section 3.2).

A contrastive loss needs all images and captions of the batch at once, but only their representations. First the representations
of every chunk are computed without a graph. The losses of all representations give the gradient with respect to each of them.
Then every chunk is computed again with a graph, and backpropagation continues from its representations into the weights. The
second pass restores the random state of the first, so that dropout drops the same units.

Images are represented by their similarities with the texts, not by their patches. The texts are embedded first, stay constant
while the chunks of images are processed, and accumulate the gradients of all chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vilseg.distributed import average_gradients
from vilseg.errors import ConfigError
from vilseg.training.batch import TensorBatch
from vilseg.training.encoded_texts import OwnTexts, SharedTexts, find_positives
from vilseg.training.objective import Objective, Representations

Chunk = TypeVar("Chunk", Tensor, TensorBatch)
Tree = TypeVar("Tree", Tensor, Representations)
"""A tensor, or nested tuples of tensors and None."""


def backward_in_chunks(objective: Objective, batch: TensorBatch, size: int) -> dict[str, Tensor]:
    """Compute the losses of ``objective(batch)``, and the gradient of ``loss`` in the parameters, averaged over the workers.

    The gradient is exact if the encoders process every image and text independently; see :func:`require_per_sample_encoders`.
    The number of communications between workers does not depend on the number of chunks: captions and phrases are gathered
    once, then the losses communicate, and gradients are averaged once at the end.

    Args:
        objective: the objective itself, not its data-parallel wrapper.
        batch: this worker's pairs of the batch.
        size: number of pairs per chunk, and number of phrases that are embedded at once.

    Returns:
        This worker's losses and metrics by name, as `Objective.forward` returns them, but detached from the graph.
    """
    device, embedder, precision = batch.seeds.device, objective.text_embedder, objective.autocast
    phrase_ids_P = objective.present_phrases(batch)
    captions = _Recomputed(
        lambda tokens: embedder.embed_captions(tokens, precision), batch.tokens.split(size), torch.cat, device
    )
    phrases = _Recomputed(
        lambda chosen: embedder.embed_phrases(chosen, precision), phrase_ids_P.split(size), torch.cat, device
    )
    captions_BD, phrases_PD = captions.joined(), phrases.joined()
    captions_QD = objective.shared_captions(captions.joined())
    texts = SharedTexts(captions_QD.detach().requires_grad_(), phrases_PD.detach().requires_grad_(), phrase_ids_P)
    represent = partial(objective.represent, texts=texts, pairs=len(batch))
    images = _Recomputed(represent, batch.split(size), objective.combine, device)
    representations = images.joined()
    own = OwnTexts(captions_BD, find_positives(batch, phrase_ids_P))
    losses = objective.losses(representations, own)
    losses["loss"].backward()
    images.backward()
    for joined, used in ((phrases_PD, texts.phrases_PD), (captions_QD, texts.captions_QD)):
        if used.grad is not None:  # the same condition on all workers, so collectives in backward match
            joined.backward(used.grad)
    captions.backward()
    phrases.backward()
    average_gradients(objective.parameters())
    if objective.training:
        objective.after_losses(representations, own)
    return {name: value.detach() for name, value in losses.items()}


def require_per_sample_encoders(objective: Objective) -> None:
    """Raise ConfigError if the features of an image or text depend on the others in its chunk (batch normalisation)."""
    for name, module in objective.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            part = "model.text_encoder" if "text_encoder" in name else "model.image_encoder"
            raise ConfigError(
                f"trainer.chunk_size cannot be used: {part} has batch normalisation, which sees one chunk at a time; "
                f"choose another encoder, set {part}.frozen=true or trainer.chunk_size=null"
            )


class _Recomputed(Generic[Chunk, Tree]):
    """Results of a function for every chunk: computed without a graph, then again with a graph when their gradients are known.

    Args:
        function: function from a chunk to tensors.
        chunks: chunks of a batch, at least one.
        combine: function that joins the results of the chunks.
        device: device whose random state is restored, as is that of the CPU.
    """

    def __init__(
        self,
        function: Callable[[Chunk], Tree],
        chunks: Sequence[Chunk],
        combine: Callable[[list[Tree]], Tree],
        device: torch.device,
    ) -> None:
        self._function: Callable[[Chunk], Tree] = function
        self._chunks: Sequence[Chunk] = chunks
        self._combine: Callable[[list[Tree]], Tree] = combine
        self._device = device
        self._states: list[list[Tensor]] = []
        self._results: list[Tree] = []
        with torch.no_grad():
            for chunk in chunks:
                self._states.append(self._random_state())
                self._results.append(tree_map_only(Tensor, Tensor.requires_grad_, function(chunk)))

    def joined(self) -> Tree:
        """Return the joined results of all chunks; their graph starts at the results, whose gradients :meth:`backward` uses."""
        return self._combine(self._results)

    def backward(self) -> None:
        """Compute every chunk again and backpropagate the gradients of the joined results through the function."""
        for chunk, state, result in zip(self._chunks, self._states, self._results, strict=True):
            self._set_random_state(state)
            pairs = zip(_tensors(self._function(chunk)), _tensors(result), strict=True)
            reached = [(again, first.grad) for again, first in pairs if again.requires_grad and first.grad is not None]
            if reached:
                torch.autograd.backward([again for again, _ in reached], [gradient for _, gradient in reached])

    def _random_state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        if self._device.type == "cuda":
            state.append(torch.cuda.get_rng_state(self._device))
        return state

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
