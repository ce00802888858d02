"""The module around every mechanism that carries a state, of one size, from token to token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import masks


class State(NamedTuple):
    """What is left of the tokens so far: the state of `fn`, and what projections still need."""

    memory: Any
    before: Any


class Recurrent(nn.Module):
    """Projections, one call of `fn`, an output projection, and a state to stream.

    A subclass gives `fn`: (*arrays, *, mask, initial_state, return_state) -> B T N V, or with
    return_state (B T N V, state); submodules `attend` and `out`; and these methods:

        _memory(batch) -> state                  that of `fn` before the first token
        _project(x) -> arrays                    what `fn` takes
        _gated(o, x) -> o                        what `out` merges; o itself unless given

    Where projections depend on the tokens before, instead of `_project`:

        _before(batch) -> before                 at the first token
        _project_after(x, before, mask) -> (arrays, before of the next tokens)
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] | None = None

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """x's tokens mixed; `mask` says what each of them sees."""
        arrays, _ = self._project_after(x, self._before(x.shape[0]), mask)
        return self._output(self.attend(*arrays, mask=mask), x)

    def init_state(self, batch: int, length: int) -> State:
        """The state before the first token, of one size for any `length`."""
        return State(self._memory(batch), self._before(batch))

    def extend(self, state: State, x: Float[Array, "B T D"]) -> tuple[State, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        arrays, before = self._project_after(x, state.before, None)
        options = dict(mask=masks.Causal(), initial_state=state.memory, return_state=True)
        o, memory = self.attend(*arrays, **options)
        return State(memory, before), self._output(o, x)

    def _output(self, o, x):
        return self.out(self._gated(o, x), x.shape[-1])

    def _before(self, batch):
        return ()

    def _project_after(self, x, before, mask):
        return self._project(x), before

    def _gated(self, o, x):
        return o
