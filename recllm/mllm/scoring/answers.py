"""What counts as yes and as no, and what a hidden state says of them: margin, probability, mass outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from recllm.errors import DataError
from recllm.mllm.chat import Request, message
from recllm.mllm.rendering import render

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel

COMPLETIONS = {"yes": "Yes.", "no": "No."}
"""What instruction rows answer (MLLM-SRec, table 1); by default their first tokens are the answer forms."""
_NORMALIZER_BYTES = 64 * 2**20  # of the float32 copy of lm_head that is held at a time

Probability = Literal["sigmoid", "paper"]


@dataclass(frozen=True)
class Answers:
    """The tokens that count as yes and as no.

    Attributes:
        yes: Token ids.
        no: Token ids, none of them a yes.
    """

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @classmethod
    def find(cls, loaded: LoadedModel, yes: Sequence[str] = (), no: Sequence[str] = ()) -> Answers:
        """Returns the tokens of the forms, as the tokenizer writes them after the generation prompt.

        Args:
            loaded: The model.
            yes: Forms such as "Yes", "yes", " Yes", each of which must be one token; without any, the first
                token of "Yes." as the chat template writes this answer: after LLaVA's "ASSISTANT:" a " Yes".
            no: As `yes`, for "No.".

        Raises:
            DataError: A form is not one token, or stands on both sides.
        """
        tokens = {side: _tokens_of(loaded, side, forms) for side, forms in (("yes", yes), ("no", no))}
        if both := set(tokens["yes"]) & set(tokens["no"]):
            raise DataError(
                f"the token {loaded.tokenizer.decode([min(both)])!r} would count as yes and as no; give "
                "forms of --yes and --no that begin differently"
            )
        return cls(tokens["yes"], tokens["no"])


def _tokens_of(loaded: LoadedModel, side: str, forms: Sequence[str]) -> tuple[int, ...]:
    if not forms:
        return (_continuation(loaded, _as_written(loaded, COMPLETIONS[side]))[0],)
    found = []
    for form in forms:
        tokens = _continuation(loaded, form)
        if len(tokens) != 1:
            pieces = [loaded.tokenizer.decode([token]) for token in tokens]
            raise DataError(
                f"--{side} {form!r} is {len(tokens)} tokens to this tokenizer ({pieces}), where one is "
                "needed; give another form of the answer"
            )
        if tokens[0] in found:
            raise DataError(f"--{side} {form!r} is the same token as a form before it; leave it out")
        found.append(tokens[0])
    return tuple(found)


_ASKED = Request("answer forms", (message("user", "x"),))


def _as_written(loaded: LoadedModel, answer: str) -> str:
    """Returns an answer with what the chat template puts before and after it, as training rows have it."""
    opening = render(loaded, _ASKED)
    chat = [*_ASKED.messages, message("assistant", answer)]
    whole = loaded.processor.apply_chat_template(chat, tokenize=False)
    return whole[len(opening) :] if whole.startswith(opening) else answer


def _continuation(loaded: LoadedModel, text: str) -> list[int]:
    opening = render(loaded, _ASKED)
    tokenize = loaded.tokenizer
    before = tokenize(opening, add_special_tokens=False).input_ids
    both = tokenize(opening + text, add_special_tokens=False).input_ids
    if both[: len(before)] != before or len(both) == len(before):
        raise DataError(
            f"the tokenizer joins the answer {text!r} with the end of the prompt, so that no token says it; "
            "give other forms of --yes and --no"
        )
    return both[len(before) :]


@dataclass(frozen=True, eq=False)
class AnswerHead:
    """The output layer, read at one position of each prompt.

    Attributes:
        weight: (vocabulary, width), in its own number type.
        bias: (vocabulary) or None.
        low_rank: LoRA's (B, A, scaling) on the output layer, for each active adapter.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    low_rank: tuple[tuple[torch.Tensor, torch.Tensor, float], ...]

    @classmethod
    @contextmanager
    def read(cls, model: Any) -> Iterator[AnswerHead]:
        """Yields the output layer of a transformers model as it is now, with what adapters make of it.

        Args:
            model: The transformers model itself, within which adapters are layers.

        Raises:
            DataError: The layer is quantized or of a kind whose rows cannot be read.
        """
        check_head(model)
        layer = model.get_output_embeddings()
        if hasattr(layer, "modules_to_save"):
            layer = layer.original_module if layer.disable_adapters else _saved(layer)
        low_rank = []
        base = layer
        if hasattr(layer, "lora_A"):
            base = layer.base_layer
            active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
            low_rank = [
                (layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name])
                for name in active
                if name in layer.lora_A
            ]
        with _whole([base.weight, *(tensor for part in low_rank for tensor in part[:2])]):
            yield cls(base.weight.detach(), base.bias, tuple(low_rank))

    def margins(self, hidden: torch.Tensor, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-odds of yes against no, and the probability mass of all other answers.

        margin = logsumexp of the yes-logits - logsumexp of the no-logits; outside = the softmax mass of the
        rest of the vocabulary, exact to float32's precision also where it is tiny. Ours; equation 4 of
        MLLM-SRec is made of the two, see `paper_probability`.

        Args:
            hidden: (prompts, width), the final hidden states at the last positions.
            answers: What counts as yes and as no.

        Returns:
            Two float32 tensors of shape (prompts,).
        """
        hidden = hidden.float()
        yes = self._logits_of(hidden, answers.yes).logsumexp(-1)
        no = self._logits_of(hidden, answers.no).logsumexp(-1)
        others = self._logsumexp_of_others(hidden, (*answers.yes, *answers.no))
        return yes - no, torch.sigmoid(others - torch.logaddexp(yes, no))

    def _logits_of(self, hidden: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
        """Products as sums: matrix products may run in TF32 where a trainer allows it."""
        rows = torch.tensor(tokens, device=self.weight.device)
        weight = self.weight[rows].float()
        for b, a, scaling in self.low_rank:
            weight = weight + scaling * (b[rows].float()[:, :, None] * a.float()[None]).sum(1)
        logits = (hidden[:, None, :] * weight.to(hidden.device)).sum(-1)
        return logits if self.bias is None else logits + self.bias[rows].float().to(hidden.device)

    def _logsumexp_of_others(self, hidden: torch.Tensor, answers: Sequence[int]) -> torch.Tensor:
        """The logsumexp over the vocabulary without the answers; only a part is in float32 at a time."""
        rows = max(1, _NORMALIZER_BYTES // (4 * max(self.weight.shape[1], len(hidden))))
        low = [(hidden @ a.float().T * scaling, b) for b, a, scaling in self.low_rank]
        parts = []
        for start in range(0, len(self.weight), rows):
            part = slice(start, start + rows)
            logits = hidden @ self.weight[part].to(hidden.device).float().T
            for projected, b in low:
                logits += projected @ b[part].float().T
            if self.bias is not None:
                logits += self.bias[part].float()
            logits[:, [token - start for token in answers if start <= token < start + rows]] = -torch.inf
            parts.append(logits.logsumexp(-1))
        return torch.stack(parts).logsumexp(0)


def check_head(model: Any) -> None:
    """Checks that `AnswerHead.read` can read a model's output layer.

    Raises:
        DataError: It cannot.
    """
    text = model.config.get_text_config()
    for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text, setting, None) not in (None, 1, 1.0):
            raise DataError(f"{type(model).__name__}: {setting} changes its logits, which is not supported")
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):
        layer = _saved(layer)
    if hasattr(layer, "lora_A"):
        if any(layer.use_dora.values()) or any(layer.lora_bias.values()) or layer.lora_variant:
            raise DataError("the adapter's LoRA on lm_head is not a plain one; merge it into the model first")
        layer = layer.base_layer
    if type(layer) is not torch.nn.Linear or not layer.weight.is_floating_point():
        raise DataError(
            f"{type(model).__name__}: its lm_head is a {type(layer).__name__} of {layer.weight.dtype}, whose "
            "rows cannot be read; leave lm_head as it is when quantizing, and merge adapters that replace it"
        )


def _saved(layer: Any) -> Any:
    names = [name for name in layer.active_adapters if name in layer.modules_to_save]
    return layer.modules_to_save[names[0]] if names else layer.original_module


@contextmanager
def _whole(weights: list[torch.Tensor]) -> Iterator[None]:
    """Gathers weights that DeepSpeed's ZeRO-3 has spread over the ranks."""
    spread = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield


def paper_probability(margin: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Returns MLLM-SRec's equation 4 as it is printed: the softmax of two probabilities, not of two logits.

    exp(p_yes) / (exp(p_yes) + exp(p_no)), which lies between 0.27 and 0.73.

    Args:
        margin: Log-odds of yes against no.
        outside: Probability mass of neither.

    Returns:
        float64. Where the probabilities saturate, different prompts still round to one value: rank by
        `paper_score`.
    """
    return torch.sigmoid((1 - outside.double()) * torch.tanh(margin.double() / 2))


def paper_score(margin: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Returns what orders prompts as `paper_probability` does, without ties where probabilities saturate.

    Equation 4 is the sigmoid of d = p_yes - p_no. The score is -log(1 - d) where d is 0 or more, else
    log(1 + d). 1 - |d| is summed from what is small, the mass outside and twice the less likely answer. Ours.

    Args:
        margin: Log-odds of yes against no.
        outside: Probability mass of neither.

    Returns:
        float64.
    """
    size, outside = margin.double().abs(), outside.double()
    inside = 1 - outside
    left = outside + 2 * inside * torch.sigmoid(-size)  # 1 - |d|
    difference = inside * torch.tanh(size / 2)  # |d|
    scale = torch.where(
        difference < 0.5, torch.log1p(-difference), left.clamp(min=torch.finfo(left.dtype).tiny).log()
    )
    return -scale * torch.sign(margin.double())
