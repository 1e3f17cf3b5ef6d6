"""The input of a loss: log-probs, logits, or hidden states and a head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from kept_cases import break_even
from oracle import OracleLayout, head_gradients, head_logits, log_prob_gradients, log_probs

import steppo_kernels as package
from fuzz.compare import near
from fuzz.draws import Draw, Numbers
from steppo_kernels import StepLayout, StepPOConfig

Leaves = dict[str, torch.Tensor]


class Policy:
    """Inputs of one depth, with the oracle's log-probs and entropies of the action tokens.

    Attributes:
        depth: ``"log_probs"``, ``"logits"`` or ``"head"``.
        inputs: the differentiated tensors by name.
        log_probs, entropies: at flat positions, NaN where no action token.
        in_place: whether backward overwrites its input.
    """

    in_place = False

    def __init__(self, draw: Draw, oracle: OracleLayout, depth: str) -> None:
        self.draw, self.oracle, self.depth = draw, oracle, depth
        self.inputs: dict[str, Numbers] = {}
        self.view = draw.view(oracle.shape)
        self.log_probs = [math.nan] * oracle.size
        self.entropies = [math.nan] * oracle.size

    @property
    def log_probs_or_zero(self) -> list[float]:
        return [0.0 if math.isnan(value) else value for value in self.log_probs]

    @property
    def entropies_or_zero(self) -> list[float]:
        return [0.0 if math.isnan(value) else value for value in self.entropies]

    def leaves(self) -> Leaves:
        return {name: numbers.leaf() for name, numbers in self.inputs.items()}

    def check_masked(self, leaves: Leaves) -> None:
        """Nothing may reach a position that is no action token."""
        actions = set(self.oracle.actions)
        masked = [at for at in range(self.oracle.size) if at not in actions]
        for name in {"log_probs", "entropy", "logits", "hidden"} & set(leaves):
            if leaves[name].grad is not None and masked:
                rows = leaves[name].grad.reshape(self.oracle.size, -1)
                assert not rows[masked].any(), f"gradient of {name} at a masked token"


class FromLogProbs(Policy):
    """Log-probs and entropies as they are."""

    def __init__(self, draw: Draw, oracle: OracleLayout) -> None:
        super().__init__(draw, oracle, "log_probs")
        for name in ("log_probs", "entropy"):
            flat = draw.floats(oracle.size, *((-3, 0) if name == "log_probs" else (0, 3)))
            flat = draw.spoiled(flat, oracle.actions)
            self.inputs[name] = draw.numbers(flat, oracle.shape, draw.half)
        self.log_probs = self.inputs["log_probs"].flat
        self.entropies = self.inputs["entropy"].flat

    def loss(
        self,
        leaves: Leaves,
        layout: StepLayout | torch.Tensor,
        config: StepPOConfig,
        arguments: dict[str, object],
        backend: str,
    ) -> package.StepPOOutput:
        rest = dict(arguments)
        if rest.get("entropy") is not None:
            rest["entropy"] = leaves["entropy"]
        given = self.view(self.draw.strided(leaves["log_probs"]))
        return package.steppo_loss(given, layout=layout, config=config, **rest, backend=backend)

    def check_gradients(
        self,
        leaves: Leaves,
        of_log_probs: Sequence[float],
        of_entropy: Sequence[float],
        condition: float,
        size: float = 0.0,
    ) -> None:
        for name, want, terms in (("log_probs", of_log_probs, size), ("entropy", of_entropy, 0.0)):
            got = leaves[name].grad
            if got is None:
                assert name == "entropy"
                continue
            assert got.dtype == self.draw.half
            near(
                f"gradient of {name}", got, want,
                dtype=self.draw.half, condition=condition, size=terms, zeros=True,
            )  # fmt: skip


class FromRows(Policy):
    """The part that logits and a head share: ids, temperatures, and the rows of logits."""

    def __init__(self, draw: Draw, oracle: OracleLayout, depth: str) -> None:
        super().__init__(draw, oracle, depth)
        self.vocabulary = draw.rng.choice([2, 3, 5, 9, 17])
        actions = set(oracle.actions)
        self.ids = [
            draw.rng.randrange(self.vocabulary)
            if at in actions
            else draw.rng.choice([-100, -1, 0, 2**40])
            for at in range(oracle.size)
        ]
        self.token_ids = self.view(
            torch.tensor(self.ids, dtype=torch.int64).reshape(oracle.shape).to(draw.device)
        )
        self.temperature: float | torch.Tensor = draw.rng.choice([1.0, 1.0, 0.7, 2.0])
        self.temperatures = [float(self.temperature)] * oracle.size
        if draw.chance(0.3):
            draw.words.append("temperature per token")
            flat = draw.spoiled(draw.floats(oracle.size, 0.5, 2), oracle.actions)
            numbers = draw.numbers(flat, oracle.shape)
            self.temperature, self.temperatures = numbers.tensor, numbers.flat

        self.sets: list[list[int]] | None = None
        self.support: package.TokenSupport | None = None
        if draw.chance(0.25):
            draw.words.append("kept sets")
            self.sets = [self._set(at in actions, at) for at in range(oracle.size)]
            whole = torch.ones(oracle.size, device=draw.device)
            self.support = package.TokenSupport.from_lists(self.sets, whole)

    def _set(self, is_action: bool, at: int) -> list[int]:
        """Return the ids of a set in any order, some of them twice; some sets are empty."""
        if self.draw.chance(0.15):
            return []
        ids = self.draw.rng.choices(range(self.vocabulary), k=self.draw.rng.randrange(1, 6))
        ids += [self.ids[at]] if is_action else []
        self.draw.rng.shuffle(ids)
        return ids

    def kept(self, at: int) -> list[int] | None:
        """Return the ids that the softmax of a token is over, None for all."""
        return (sorted(set(self.sets[at])) or None) if self.sets is not None else None

    def viewed_temperature(self) -> float | torch.Tensor:
        """Return the temperature in the form in which the ids are given."""
        one = isinstance(self.temperature, float)
        return self.temperature if one else self.view(self.temperature)

    def rows(self) -> dict[int, list[float]]:
        """Return the logits of each action token."""
        raise NotImplementedError

    def fill(self) -> None:
        self.logits = self.rows()
        for at, row in self.logits.items():
            found = log_probs(row, self.ids[at], self.temperatures[at], self.kept(at))
            self.log_probs[at], self.entropies[at] = found

    def of_rows(self, size: float) -> float:
        """Return the size of the terms of a logit's gradient from that of a log-prob's."""
        return size / min((self.temperatures[at] for at in self.logits), default=1.0)

    def of_logits(
        self, at: int, of_log_probs: Sequence[float], of_entropy: Sequence[float]
    ) -> list[float]:
        return log_prob_gradients(
            self.logits[at],
            self.ids[at],
            self.temperatures[at],
            of_log_probs[at],
            of_entropy[at],
            self.kept(at),
        )


class FromLogits(FromRows):
    """Logits."""

    def __init__(self, draw: Draw, oracle: OracleLayout) -> None:
        super().__init__(draw, oracle, "logits")
        width = self.vocabulary
        used = [at * width + v for at in oracle.actions for v in range(width)]
        flat = draw.spoiled(draw.floats(oracle.size * width, -2, 2), used)
        self.inputs["logits"] = draw.numbers(flat, (*oracle.shape, width), draw.half)
        self.in_place = draw.chance(0.2)
        self.fill()

    def rows(self) -> dict[int, list[float]]:
        flat, width = self.inputs["logits"].flat, self.vocabulary
        return {at: flat[at * width : (at + 1) * width] for at in self.oracle.actions}

    def loss(
        self,
        leaves: Leaves,
        layout: StepLayout | torch.Tensor,
        config: StepPOConfig,
        arguments: dict[str, object],
        backend: str,
    ) -> package.StepPOOutput:
        # A leaf may not be overwritten.
        given = leaves["logits"] * 1 if self.in_place else self.draw.strided(leaves["logits"])
        return package.steppo_loss_from_logits(
            given if self.in_place else self.view(given),
            self.token_ids,
            layout=layout,
            temperature=self.temperature,
            support=self.support,
            inplace_backward=self.in_place,
            config=config,
            **arguments,
            backend=backend,
        )

    def values(
        self, leaves: Leaves, mask: torch.Tensor, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return package.token_log_probs(
            self.view(leaves["logits"]),
            self.token_ids,
            temperature=self.viewed_temperature(),
            support=self.support,
            return_entropy=True,
            mask=self.view(mask),
            backend=backend,
        )

    def check_gradients(
        self,
        leaves: Leaves,
        of_log_probs: Sequence[float],
        of_entropy: Sequence[float],
        condition: float,
        size: float = 0.0,
    ) -> None:
        want = [0.0] * len(self.inputs["logits"].flat)
        width = self.vocabulary
        for at in self.logits:
            row = self.of_logits(at, of_log_probs, of_entropy)
            want[at * width : (at + 1) * width] = row
        got = leaves["logits"].grad
        assert got.dtype == self.draw.half
        near(
            "gradient of logits", got, want,
            dtype=self.draw.half, condition=condition, size=self.of_rows(size), zeros=True,
        )  # fmt: skip


class FromHead(FromRows):
    """Hidden states and an output head."""

    def __init__(self, draw: Draw, oracle: OracleLayout) -> None:
        super().__init__(draw, oracle, "head")
        width = draw.rng.choice([1, 2, 4])
        self.width = width
        used = [at * width + k for at in oracle.actions for k in range(width)]
        flat = draw.spoiled(draw.floats(oracle.size * width, -1, 1), used)
        self.inputs["hidden"] = draw.numbers(flat, (*oracle.shape, width), draw.half)
        self.inputs["weight"] = draw.uniform((self.vocabulary, width), -1, 1, draw.half)
        if draw.chance(0.5):
            self.inputs["bias"] = draw.uniform((self.vocabulary,), -1, 1, draw.half)
        self.softcap = draw.named("softcap", [None, None, 1.5, 20.0])
        self.chunk_tokens = draw.named("chunk", [None, 1, 3, 8])
        # Whether rows are gathered for sets, or multiplied all.
        self.ratio = draw.rng.choice([0, 10**6])
        flat = self.inputs["weight"].flat
        self.weight = [flat[v * width : (v + 1) * width] for v in range(self.vocabulary)]
        self.fill()

    def _hidden(self, at: int) -> list[float]:
        return self.inputs["hidden"].flat[at * self.width : (at + 1) * self.width]

    def rows(self) -> dict[int, list[float]]:
        bias = self.inputs["bias"].flat if "bias" in self.inputs else None
        return {
            at: head_logits(self._hidden(at), self.weight, bias, self.softcap)
            for at in self.oracle.actions
        }

    def _head(self, leaves: Leaves) -> dict[str, object]:
        return {
            "bias": leaves.get("bias"),
            "temperature": self.temperature,
            "softcap": self.softcap,
            "chunk_tokens": self.chunk_tokens,
            "support": self.support,
        }

    def loss(
        self,
        leaves: Leaves,
        layout: StepLayout | torch.Tensor,
        config: StepPOConfig,
        arguments: dict[str, object],
        backend: str,
    ) -> package.StepPOOutput:
        with break_even(self.ratio):
            return package.linear_steppo_loss(
                self.view(self.draw.strided(leaves["hidden"])),
                self.draw.strided(leaves["weight"]),
                self.token_ids,
                layout=layout,
                config=config,
                **self._head(leaves),
                **arguments,
                backend=backend,
            )

    def values(
        self, leaves: Leaves, mask: torch.Tensor, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with break_even(self.ratio):
            return package.linear_token_log_probs(
                self.view(leaves["hidden"]),
                leaves["weight"],
                self.token_ids,
                mask=self.view(mask),
                return_entropy=True,
                **{**self._head(leaves), "temperature": self.viewed_temperature()},
                backend=backend,
            )

    def check_gradients(
        self,
        leaves: Leaves,
        of_log_probs: Sequence[float],
        of_entropy: Sequence[float],
        condition: float,
        size: float = 0.0,
    ) -> None:
        weight_sums = [[0.0] * self.width for _ in range(self.vocabulary)]
        bias_sums = [0.0] * self.vocabulary
        hidden = [0.0] * len(self.inputs["hidden"].flat)
        # Sizes of what is summed: half precision rounds the rows before it sums them.
        size = self.of_rows(size) * len(self.logits)
        for at, logits in self.logits.items():
            of_logits = self.of_logits(at, of_log_probs, of_entropy)
            size += max((abs(value) for value in of_logits if math.isfinite(value)), default=0.0)
            hidden[at * self.width : (at + 1) * self.width] = head_gradients(
                self._hidden(at), self.weight, logits, self.softcap, of_logits,
                weight_sums, bias_sums,
            )  # fmt: skip
        wants = {
            "hidden": hidden,
            "weight": [value for row in weight_sums for value in row],
            "bias": bias_sums,
        }
        for name, numbers in leaves.items():
            assert numbers.grad.dtype == self.draw.half
            near(
                f"gradient of {name}", numbers.grad, wants[name],
                dtype=self.draw.half, scale=size, condition=condition,
            )  # fmt: skip
        self.check_masked(leaves)


DEPTHS = {"log_probs": FromLogProbs, "logits": FromLogits, "head": FromHead}


def draw_policy(
    draw: Draw,
    oracle: OracleLayout,
    depths: Sequence[str] = ("log_probs", "log_probs", "logits", "head"),
) -> FromLogProbs | FromLogits | FromHead:
    """Draw what the loss is taken of."""
    return DEPTHS[draw.named("depth", depths)](draw, oracle)
