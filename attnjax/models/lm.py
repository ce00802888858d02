"""A decoder-only language model around any causal mechanism, or several in turn.

    model = models.create("lm", vocab_size=64, features=32, depth=4, num_heads=4,
                          mixers=["lightning_attention_2", "gqa(num_kv_heads=2)"])
    logits = model.apply({"params": params}, tokens)                  # (B T) -> (B T vocabulary)
    tokens = lm.generate(model, params, prompt, steps=20)

Paper: Touvron et al., "LLaMA", arXiv:2302.13971, section 2.2: norms before each layer, SwiGLU.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from attnjax.core import layers, masks
from attnjax.core.registry import Claim
from attnjax.models import backbone, block


class State(NamedTuple):
    """What a model remembers of the tokens before `length`."""

    length: Int[Array, ""]
    blocks: Any


class LM(backbone.Backbone, kw_only=True):
    """Tokens to logits of the next token.

    Attributes (the others: `backbone.Backbone`):
      max_length: learned absolute positions for so many tokens; None leaves positions to mixers.
      tie_embeddings: the same table for tokens in and out.
    """

    vocab_size: int
    mixers: tuple[str, ...] = ("multi_head_attention(rotary_base=10000.0)",)
    activation: block.Activation = "swiglu"
    max_length: int | None = None
    tie_embeddings: bool = False

    def setup(self):
        causal = lambda record: record.layout == "sequence" and Claim.CAUSAL in record.claims
        backbone.require(self.mixers, causal, "a causal mechanism of sequences, as a lm needs")
        self.embed = nn.Embed(self.vocab_size, self.features, dtype=self.dtype)
        if self.max_length is not None:
            # as large as an embedding, else what a token is drowns where it stands
            like_embedding = nn.initializers.normal(self.features**-0.5)
            self.place = layers.Table((self.max_length, self.features), like_embedding)
        self._build_blocks()
        self.norm = nn.RMSNorm(dtype=self.dtype)
        if not self.tie_embeddings:
            self.unembed = nn.Embed(self.vocab_size, self.features)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        mask: masks.Mask | None = None,
        at: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B T F"] | Float[Array, "B P F"]:
        """Logits in float32; what `mask` hides is hidden beside the future.

        Args:
          at: positions that logits are wanted of; None is all. With many tokens in the vocabulary
            logits take most of the time.

        Raises ValueError for more than max_length tokens or a mechanism that doesn't fit.
        """
        mask = masks.Causal() if mask is None else mask & masks.Causal()
        x = self._embed(tokens, 0)
        x, _ = self._through(lambda layer, x, _: (layer(x, mask), None), x)
        return self._logits(x if at is None else jnp.take_along_axis(x, at[..., None], 1))

    def init_state(self, batch: int, length: int) -> State:
        """The state before the first of at most `length` tokens.

        Raises ValueError, naming some that do, for a mechanism that doesn't stream.
        """
        streams = lambda record: Claim.STREAMABLE in record.claims
        backbone.require(self.mixers, streams, "a mechanism that streams")
        self._check_length(length)
        body = lambda layer, _, __: (None, layer.init_state(batch, length))
        return State(jnp.zeros((), jnp.int32), self._through(body, None)[1])

    def extend(
        self, state: State, tokens: Int[Array, "B T"]
    ) -> tuple[State, Float[Array, "B T F"]]:
        """The next T tokens, a prompt or a single one: (state, logits in float32)."""

        def body(layer, x, state):
            state, x = layer.extend(state, x)
            return x, state

        x = self._embed(tokens, state.length)
        x, blocks = self._through(body, x, state.blocks)
        return State(state.length + tokens.shape[1], blocks), self._logits(x)

    def _embed(self, tokens, start):
        x = self.embed(tokens)
        if self.max_length is None:
            return x
        T = tokens.shape[1]
        self._check_length(T)
        return x + jax.lax.dynamic_slice_in_dim(self.place(), start, T)[None].astype(x.dtype)

    def _logits(self, x):
        table = (self.embed if self.tie_embeddings else self.unembed).embedding
        x = self.norm(x)
        table = table.astype(x.dtype)
        return jnp.einsum("BTD,FD->BTF", x, table, preferred_element_type=jnp.float32)

    def _check_length(self, length):
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{length} tokens must be at most max_length={self.max_length}")


@functools.partial(jax.jit, static_argnames=("model", "steps", "temperature"))
def generate(
    model: LM,
    params: PyTree,
    prompt: Int[Array, "B T"],
    *,
    steps: int,
    temperature: float | int = 0,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B S"]:
    """The `steps` tokens after `prompt`, the most likely ones or drawn at a temperature.

    Raises ValueError where steps < 1, temperature < 0, or it is above 0 and there is no key.
    """
    if steps < 1 or temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"{steps=} must be >= 1, {temperature=} >= 0 and, if above 0, with a key")
    apply = functools.partial(model.apply, {"params": params})
    keys = None if temperature == 0 else jax.random.split(key, steps)

    def extend(state, tokens, key):
        state, logits = apply(state, tokens, method="extend")
        last = logits[:, -1]
        token = last.argmax(-1) if key is None else jax.random.categorical(key, last / temperature)
        return (state, token.astype(prompt.dtype)), token

    pick = lambda part: None if keys is None else keys[part]
    state = apply(prompt.shape[0], prompt.shape[1] + steps, method="init_state")
    carry, first = extend(state, prompt, pick(0))
    step = lambda carry, key: extend(carry[0], carry[1][:, None], key)
    _, rest = jax.lax.scan(step, carry, pick(slice(1, None)), length=steps - 1)
    return jnp.concatenate([first[:, None], rest.T], 1).astype(prompt.dtype)


MODEL = LM
