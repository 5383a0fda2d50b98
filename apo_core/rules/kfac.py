"""K-FAC with a learning rate and a damping that APO tunes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast, final

import torch
from torch import Tensor, nn

from apo_core.distributed import mean_over_ranks
from apo_core.rules.kfac_factors import Factors, MatrixLayer, Observation, has_factors
from apo_core.rules.layers import Layers, require_learned, scaled
from apo_core.types import State, Tensors, phi_dtype, trainable_parameters
from apo_core.update_rule import UpdateRule

HYPERPARAMETERS = ("lr", "damping")


@final
class KFAC(UpdateRule):
    """θ' − θ = −η (A_l ⊗ B_l + γI)⁻¹ g_l for each layer l, with φ any of log η, log γ.

    symbol   meaning
    η, γ     learning rate and damping; φ is their logarithm
    A_l      E[a aᵀ] of what the layer reads, with a 1 for the bias, which is a column of g_l
    B_l      E[Ds Dsᵀ] of the derivatives by what it puts out

    ```python
    rule = apo.rules.KFAC(model)
    ...
    with rule.observe(model):  # at every step, or at every few
        F.cross_entropy(model(x), y).backward()
    if optimizer.meta_due:
        optimizer.meta_step(...)
    optimizer.step()
    ```

    The factors are read in the passes inside `observe` and nowhere else, so that a meta-step's
    passes at θ' leave them alone. They are buffers of the rule, not its `State`: they come from a
    pass, not from a gradient, and have the layers' sizes, not the parameters'. `forward` only
    reads them, a lookahead needs them even without history, and `state_dict` saves them.

    With the labels of the data these are the factors of the empirical Fisher. For the Fisher let
    labels that the model draws go backward inside the block, the data's after it:

    ```python
    with rule.observe(model):
        z = model(x)
        drawn = torch.distributions.Categorical(logits=z.detach()).sample()
        F.cross_entropy(z, drawn).backward(retain_graph=True)
    optimizer.zero_grad()
    F.cross_entropy(z, y).backward()
    ```

    Layers with factors are Linear, and Conv2d of one group. All other parameters (`plain`:
    normalizations, embeddings, other convolutions, the inside of MultiheadAttention) take the
    gradient step −ηg, with the same η: choose `per_layer` where they need another. So does a layer
    that no backward pass inside `observe` has reached yet.

    Cost a step: 2·out·in·(out + in) multiplications a layer; an observation adds N·T·(in² + out²),
    and every `interval`-th one the eigendecompositions. With DistributedDataParallel an
    observation is averaged over the ranks, which must reach the same layers.

    Differs from the paper: P18 does not say how it damps; here γ is added to A ⊗ B exactly.

    Source: P18 section 5; Martens and Grosse 2015; Grosse and Martens 2016.

    Args:
        model: the module to train; only names, shapes, devices and dtypes are read.
        lr: the initial η > 0.
        damping: the initial γ > 0, in the units of the squared gradients of single examples.
        smoothing: in [0, 1), the weight of the past in the factors' moving averages.
        interval: eigenbases are new every so many observations, at least 1.
        learn: which of "lr" and "damping" are learned; the others stay.
        per_layer: one of each for each layer.

    Attributes:
        factored: names of the layers with factors, in the order of `factors`.
        plain: names of the parameters that take the gradient step.

    Raises:
        ValueError: an argument is out of range; no layer of the model has factors.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        damping: float = 1e-3,
        smoothing: float = 0.95,
        interval: int = 10,
        learn: tuple[str, ...] = HYPERPARAMETERS,
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must lie in [0, 1), got {smoothing}.")
        if not (isinstance(interval, int) and interval >= 1):
            raise ValueError(f"`interval` must be an integer of at least 1, got {interval!r}.")
        require_learned(learn, HYPERPARAMETERS)
        self._layers = Layers(model, per_layer)
        self.layers = self._layers.names
        self.smoothing = smoothing
        self.interval = interval
        self.log_lr = self._layers.log("lr", lr, "lr" in learn)
        self.log_damping = self._layers.log("damping", damping, "damping" in learn)

        index = {name: i for i, name in enumerate(trainable_parameters(model))}
        layers, self._blocks = _matrix_layers(model, index)
        self.factored = tuple(layers)
        self.factors = nn.ModuleList(
            Factors(layer, len(block) == 2, phi_dtype(layer.weight.dtype))
            for layer, block in zip(layers.values(), self._blocks, strict=True)
        )
        held = {i for block in self._blocks for i in block}
        self.plain = tuple(name for name, i in index.items() if i not in held)
        self._plain = [index[name] for name in self.plain]
        self._observing = False

    @property
    def lr(self) -> Tensor:
        """η, () or (layers,), detached; `layers` names them."""
        return self.log_lr.detach().exp()

    @property
    def damping(self) -> Tensor:
        """γ, () or (layers,), detached."""
        return self.log_damping.detach().exp()

    @contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Average into the factors what the forward and backward passes inside the block show.

        All that goes backward in one block is one mini-batch: a mean loss, or parts of it whose
        gradients add up to the mean's (gradient accumulation), not scaled for float16. The first
        dimension that a layer reads counts the examples, those between it and the last are
        positions; a layer that is applied r times has r times as many examples, which makes its
        A ⊗ B r times too large. After an exception, the factors are as they were. Each block waits
        once for the device, to see that its sums are finite. A model of `torch.compile` runs
        uncompiled inside the block.

        Args:
            model: the one the rule was built on, or a copy.

        Raises:
            RuntimeError: inside another `observe`; no backward pass reached a layer; the sums are
                not finite.
            ValueError: `model` lacks a layer of the rule.
        """
        if self._observing:
            raise RuntimeError("`observe` must not be entered twice, got a block inside a block.")
        factors = dict(zip(self.factored, self._factors, strict=True))
        observation = Observation(self._layers_of(model), factors)
        self._observing = True
        try:
            with torch.compiler.set_stance("force_eager"):  # graphs compiled before have no hooks
                yield
        finally:
            observation.close()
            self._observing = False
        reached = list(observation.sums)
        pairs = [t for sums in observation.sums.values() for t in sums.factors()]
        if reached:
            pairs = mean_over_ranks(model, pairs)  # first, so that all ranks see what one saw
        _require_finite(reached, pairs)
        for name, A, B in zip(reached, pairs[::2], pairs[1::2], strict=True):
            factors[name].average(A, B, self.smoothing, self.interval)

    def init_state(self, params: Tensors) -> State:
        """Nothing: the memory is in the factors, which `observe` alone changes."""
        return {}

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """−η (A_l ⊗ B_l + γI)⁻¹ g_l, −ηg for the `plain` parameters, and no state.

        Raises:
            RuntimeError: inside `observe`, or before the first one.
        """
        self._require_observed()
        rates = self._layers.spread(self.log_lr)
        dampings = self._layers.spread(self.log_damping)
        updates = {i: scaled(-rates[i], grads[i], grads[i]) for i in self._plain}
        for factors, block in zip(self._factors, self._blocks, strict=True):
            if int(factors.count):
                own, layer = [grads[i] for i in block], block[0]
                steps = factors.step(own, rates[layer], dampings[layer])
                updates.update(zip(block, steps, strict=True))
            else:
                updates.update({i: scaled(-rates[i], grads[i], grads[i]) for i in block})
        return [updates[i] for i in range(len(grads))], state

    @property
    def _factors(self) -> list[Factors]:
        return [cast(Factors, factors) for factors in self.factors]

    def _layers_of(self, model: nn.Module) -> dict[str, MatrixLayer]:
        modules = dict(model.named_modules())
        missing = [name for name in self.factored if name not in modules]
        if missing:
            raise ValueError(
                f"`model` must be the module that the rule was built on, got one without the layer "
                f"`{missing[0]}`; of a wrapped model pass the module inside."
            )
        return {name: cast(MatrixLayer, modules[name]) for name in self.factored}

    def _require_observed(self) -> None:
        if self._observing:
            raise RuntimeError(
                "`observe` must be left before a step or a meta-step, got one inside the block; "
                "keep only the forward and backward pass of the mini-batch in it."
            )
        if not any(int(factors.count) for factors in self._factors):
            raise RuntimeError(
                "`rule` must have observed a mini-batch before the first step, got none; write "
                "`with rule.observe(model):` around the forward and the backward pass."
            )


def _matrix_layers(
    model: nn.Module, index: dict[str, int]
) -> tuple[dict[str, MatrixLayer], list[tuple[int, ...]]]:
    """The layers with factors and a trainable weight, and where their weight and bias stand."""
    layers: dict[str, MatrixLayer] = {}
    blocks: list[tuple[int, ...]] = []
    for name, module in model.named_modules():
        weight, bias = (f"{name}.{leaf}".lstrip(".") for leaf in ("weight", "bias"))
        if has_factors(module) and weight in index:
            layers[name] = cast(MatrixLayer, module)
            blocks.append(tuple(index[key] for key in (weight, bias) if key in index))
    if not layers:
        raise ValueError(
            "`model` must have a trainable nn.Linear, or nn.Conv2d with groups=1, got none; use "
            "another rule, such as RMSprop."
        )
    return layers, blocks


def _require_finite(names: list[str], pairs: Tensors) -> None:
    """A and B of each layer, one after the other."""
    if not names:
        raise RuntimeError(
            "`observe` must enclose a forward and a backward pass, got no gradient at any layer; "
            "call the model and backward() inside the block."
        )
    # The largest entries: a Euclidean norm overflows where they do not.
    finite = torch.stack(torch._foreach_norm(pairs, float("inf"))).isfinite()
    if not bool(finite.all()):
        raise RuntimeError(
            f"the factors of layer `{names[finite.tolist().index(False) // 2]}` must be finite, "
            "got NaN or infinity; check the mini-batch and the loss. No factor changed."
        )
