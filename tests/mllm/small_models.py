"""Random models of each family with real processors, small enough to build in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.smolvlm import processing_smolvlm

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (  # images first, whatever stands before them, and turns without special tokens
    "{% for message in messages %}"
    "{% if message.role != 'system' %}{{ message.role | upper + ': ' }}{% endif %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT_TEMPLATE = (  # as for Mistral: the prompt to answer ends with the user's turn
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ '<<SYS>>\n' + message.content[0].text + '\n<</SYS>>\n\n' }}"
    "{% elif message.role == 'user' %}{{ '[INST] ' }}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content[0].text + '</s> ' }}{% endif %}{% endfor %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
IDEFICS_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
GEMMA_SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
INTERNVL_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
_WORDS = (
    "system user assistant describe the red blue striped mug scarf lamp what is in this image answer yes no"
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)

FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"),
    *("llava", "llava_next", "idefics3", "smolvlm"),
)
NESTED = ("gemma3", "idefics3", "smolvlm")
"""Whose processors take images prompt by prompt."""
if processing_smolvlm.num2words is None:  # spells the number of a video's frames; no test has a video
    processing_smolvlm.num2words = str
ADAPTED = ["q_proj", "v_proj", "down_proj"]


def save_small(family: str, folder: Path, *, seed: int = 0, hidden: int = 32) -> Path:
    """Writes a random float32 model of a family with its processor and returns the folder."""
    tokenizer, processor = _processor(family)
    torch.manual_seed(seed)
    model = _model(family, tokenizer, hidden)
    with torch.no_grad():  # spread the logits, so that greedy answers vary
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5 if "embed_tokens" in name or "lm_head" in name else 0.15)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # What Qwen2-VL ships: defaults of sampling that must not change what recllm decodes.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.01
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 1.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, scale: float = 0.3, layers: list[str] | str = ADAPTED) -> Path:
    """Writes a random LoRA adapter of a saved model and returns its folder; `scale` is that of LoRA's B."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1.0).mul_(scale)
    wrapped.save_pretrained(folder)
    return folder


def _tokenizer(special: tuple[str, ...], template: str, **named: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([_WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if "<image>" in special:  # whose templates write a space before an answer, which larger vocabularies join
        tokenizer.add_tokens([" Yes", " No"])
    if tokenizer.bos_token is not None:  # as Gemma's does, although its chat template writes one as well
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer


def _processor(family: str) -> tuple[Any, Any]:
    import transformers

    if family == "gemma3":
        extra = {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
        names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end_of_turn>"}
        tokenizer = _tokenizer(GEMMA_SPECIAL, GEMMA_TEMPLATE, extra_special_tokens=extra, **names)
        image_processor = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
        return tokenizer, transformers.Gemma3Processor(
            image_processor, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4
        )
    if family == "internvl":
        extra = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        tokenizer = _tokenizer(INTERNVL_SPECIAL, INTERNVL_TEMPLATE, extra_special_tokens=extra, **names)
        image_processor = transformers.GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=3
        )
        return tokenizer, transformers.InternVLProcessor(
            image_processor,
            tokenizer,
            transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
            image_seq_length=4,
            chat_template=INTERNVL_TEMPLATE,
        )
    if family in ("llava", "llava_next"):
        template = LLAVA_TEMPLATE if family == "llava" else LLAVA_NEXT_TEMPLATE
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = _tokenizer(LLAVA_SPECIAL, template, **names)
        # CLIP's class token is counted and left out again
        seeing = {
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        }
        size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        if family == "llava":
            image_processor, kind = transformers.CLIPImageProcessor(**size), transformers.LlavaProcessor
        else:
            image_processor = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS)
            kind = transformers.LlavaNextProcessor
        return tokenizer, kind(image_processor, tokenizer, chat_template=template, **seeing)
    if family in ("idefics3", "smolvlm"):
        names = {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
        tokenizer = _tokenizer(IDEFICS_SPECIAL, IDEFICS_TEMPLATE, **names)
        size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
        if family == "idefics3":
            return tokenizer, transformers.Idefics3Processor(
                transformers.Idefics3ImageProcessor(**size),
                tokenizer,
                image_seq_len=4,
                chat_template=IDEFICS_TEMPLATE,
            )
        return tokenizer, transformers.SmolVLMProcessor(
            transformers.SmolVLMImageProcessor(**size),
            tokenizer,
            transformers.SmolVLMVideoProcessor(**size),
            image_seq_len=4,
            chat_template=IDEFICS_TEMPLATE,
        )
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = _tokenizer(QWEN_SPECIAL, QWEN_TEMPLATE, **names)
    if family == "qwen3_vl":
        sizes = {"patch_size": 16, "merge_size": 2}
        image_processor = transformers.Qwen2VLImageProcessor(
            min_pixels=32 * 32, max_pixels=32 * 32 * 12, **sizes
        )
        return tokenizer, transformers.Qwen3VLProcessor(
            image_processor,
            tokenizer,
            transformers.Qwen3VLVideoProcessor(**sizes),
            chat_template=QWEN_TEMPLATE,
        )
    image_processor = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    kind = transformers.Qwen2VLProcessor if family == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    return tokenizer, kind(
        image_processor, tokenizer, transformers.Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE
    )


def _model(family: str, tokenizer: Any, hidden: int) -> Any:
    import transformers

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    ids |= {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, hidden // 8 - 2]}
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": hidden, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": mrope}, vision_config=vision, **_qwen_ids(ids)
        )
        return transformers.Qwen2VLForConditionalGeneration(config)
    if family == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
        vision |= {"out_hidden_size": hidden, "window_size": 56, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": mrope}, vision_config=vision, **_qwen_ids(ids)
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if family == "qwen3_vl":
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
        vision |= {"out_hidden_size": hidden, "deepstack_visual_indexes": [0], "patch_size": 16}
        vision |= {"num_position_embeddings": 64}
        config = transformers.Qwen3VLConfig(
            text_config={**text, "head_dim": hidden // 4, "rope_parameters": mrope},
            vision_config=vision,
            **_qwen_ids(ids),
        )
        return transformers.Qwen3VLForConditionalGeneration(config)
    if family == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 56}
        vision |= {"num_attention_heads": 2, "patch_size": 14}
        config = transformers.Gemma3Config(
            text_config={**text, "head_dim": hidden // 4, "sliding_window": 64},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_id=ids["<image_soft_token>"],
            tie_word_embeddings=False,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
        )
        return transformers.Gemma3ForConditionalGeneration(config)
    if family in ("llava", "llava_next"):
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 56}
        vision |= {"num_attention_heads": 2, "patch_size": 14, "projection_dim": 32}
        vision |= {"model_type": "clip_vision_model"}
        parts = {"vision_config": vision, "image_token_index": ids["<image>"]}
        if family == "llava":
            config = transformers.LlavaConfig(text_config={"model_type": "llama", **text}, **parts)
            return transformers.LlavaForConditionalGeneration(config)
        text |= {"model_type": "mistral", "sliding_window": None}
        config = transformers.LlavaNextConfig(text_config=text, image_grid_pinpoints=PINPOINTS, **parts)
        return transformers.LlavaNextForConditionalGeneration(config)
    if family in ("idefics3", "smolvlm"):
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 56}
        vision |= {"num_attention_heads": 2, "patch_size": 14}
        name = "Idefics3" if family == "idefics3" else "SmolVLM"
        config = getattr(transformers, f"{name}Config")(
            text_config={"model_type": "llama", **text},
            vision_config=vision,
            scale_factor=2,
            image_token_id=ids["<image>"],
            pad_token_id=tokenizer.pad_token_id,
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": [56, 56]}
    vision |= {"num_attention_heads": 2, "patch_size": [14, 14]}
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=vision,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
