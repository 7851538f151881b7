"""The prompts of the five systems: one file a paper, plain text, replaceable by files of the same names."""

from __future__ import annotations

from recllm.prompts import mllm_srec, mllmrec, mmsrarec, reveal, vlm4rec
from recllm.prompts.templates import Template

TEMPLATES: dict[str, Template] = {
    template.name: template
    for paper in (mllm_srec, vlm4rec, mllmrec, mmsrarec, reveal)
    for template in paper.TEMPLATES
}
